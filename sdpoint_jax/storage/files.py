"""Files that are whole at any moment, however the process that writes them ends."""

import contextlib
import os
import pathlib
import secrets


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces the file at `path`, or creates it; text is UTF-8.

    Of several processes or threads that write the same file at once, one wins.

    Raises:
        OSError: it could not be written; names `path`, where nothing has changed.
    """
    path = pathlib.Path(path)
    writing = path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")
    try:
        with writing.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            writing.unlink()
        raise OSError(f"{path}: could not be written: {error.strerror}") from error
