"""Files that are whole at any moment, however the process that writes them ends."""

import contextlib
import os
import pathlib
import secrets


def write_atomically(path: str | os.PathLike, content: str | bytes, *, mode: int = 0o666) -> None:
    """Replace the file at `path`, or create it; text is UTF-8.

    Of several processes or threads that write the same file at once, one wins.

    Args:
        path: of the file.
        content: of the file.
        mode: the file's permissions, before the process's umask.

    Raises:
        OSError: it could not be written; names `path`, where nothing has changed.
    """
    path = pathlib.Path(path)
    writing = temporary_name(path)
    try:
        with open(writing, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            writing.unlink()
        raise OSError(f"{path}: could not be written: {error.strerror}") from error


def temporary_name(path: pathlib.Path) -> pathlib.Path:
    """Return a path beside `path` that no other program uses.

    It is hidden, as readers of whole folders (pyarrow, pandas) pass over hidden files.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.sdpoint_jax")


def temporary_pattern(name: str) -> str:
    """Return the regular expression of temporary names of a path whose last part matches `name`."""
    return rf"\.{name}\.[0-9a-f]{{16}}\.sdpoint_jax"
