"""Files from the network that must be right: a download goes on where it was stopped, and has a checksum."""

import hashlib
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

CHUNK = 2**20
TIMEOUT_S = 20


def download(url: str, path: str | os.PathLike) -> None:
    """Fetches `url` to `path`, which appears when it is whole; goes on where an earlier call was stopped.

    Raises:
        ValueError: the file cannot be fetched; says what to do instead.
    """
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.sdpoint_jax.part")
    try:
        _fetch(url, part)
    except OSError as error:  # URLError and time-outs are among them.
        reason = getattr(error, "reason", None) or error
        message = f"cannot fetch {url} ({reason}); fetch it elsewhere and name the file with --source"
        raise ValueError(message) from None
    part.replace(path)


def check_host(url: str) -> None:
    """Raises ValueError where the URL's host cannot be reached."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or {"http": 80, "ftp": 21}.get(parts.scheme, 443)
    try:
        socket.create_connection((parts.hostname, port), TIMEOUT_S).close()
    except OSError as error:
        raise ValueError(f"cannot reach {parts.hostname} ({error}), to fetch {url}") from None


def _fetch(url, part):
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # Nothing is left to fetch.
            return
        raise
    with response:
        if response.status != 206:  # The server does not resume.
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with open(part, "ab" if start else "wb") as file:
            _copy(response, file, tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True))
        if total and part.stat().st_size < total:
            raise OSError("the connection broke off; the same command goes on from there")


def _copy(response, file, progress):
    with progress:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            progress.update(len(chunk))


def md5(path: str | os.PathLike) -> str:
    """Returns the file's MD5 checksum, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
