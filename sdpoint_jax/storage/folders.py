"""Folders that are whole at any moment, and of which only files of this package are ever removed.

A folder is written beside its place, in a temporary folder whose name is unique, and renamed when it is complete.
What another program or a person has put into a folder that is replaced stays in it.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator

from sdpoint_jax.paths import check_local
from sdpoint_jax.storage import files

# Lists the files of a folder that this package wrote there, as relative paths, in the order in which they may be
# removed: first those that the folder is recognised by last. None for a folder that is not ours.
OwnFiles = Callable[[pathlib.Path], list[str] | None]

_NEW, _OLD, _REMOVED = "new", "old", "removed"  # In a temporary folder.
_MARK = "sdpoint_jax.lock"  # Likewise: says that it is ours, and is locked as long as its process lives.


def check_replaceable(path: str | os.PathLike, own_files: OwnFiles, what: str) -> pathlib.Path:
    """Return the absolute path of a folder that may be written to `path`, links followed.

    Args:
        path: absent, an empty folder, or a folder of which `own_files` knows files.
        own_files: see `OwnFiles`.
        what: the kind of folder, for the message.

    Raises:
        ValueError: another file or folder is there.
        OSError: it cannot be read.
    """
    check_local(path)
    path = pathlib.Path(path).resolve()
    if os.path.lexists(path) and not (path.is_dir() and (not os.listdir(path) or own_files(path) is not None)):
        raise ValueError(f"{path}: exists and is not {what}, so it is left as it is; give another folder")
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike, own_files: OwnFiles, what: str) -> Iterator[pathlib.Path]:
    """Give, as a context, a path at which to make a folder, which becomes the one at `path` at the end.

    Args:
        path: see `check_replaceable`. It is as it was until the end, and after an error.
        own_files: see `OwnFiles`. Other files than these stay at `path`.
        what: the kind of folder, for messages.

    Raises:
        ValueError: another file or folder is at `path`, or a file of somebody else where a new one belongs.
        OSError: it could not be written; names `path`.
    """
    path = check_replaceable(path, own_files, what)
    try:
        settle(path.parent, own_files, path.name)
        with _temporary(path, own_files) as temporary:
            new = temporary / _NEW
            yield new
            for file in [new, *new.rglob("*")]:
                _flush(file)
            if path.exists():
                check_replaceable(path, own_files, what)  # Others may have written there since.
                _check_clashes(path, new, own_files(path) or [])
                shutil.copymode(path, new)
                path.rename(temporary / _OLD)
            new.rename(path)
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error.strerror or error}") from error


def remove(path: pathlib.Path, own_files: OwnFiles) -> None:
    """Remove our files from a folder, and the folder itself if nothing else is in it; others are left alone."""
    if path.is_dir() and own_files(path) is not None:
        with _temporary(path, own_files) as temporary:
            path.rename(temporary / _REMOVED)  # At no moment half a folder.


def find(path: pathlib.Path) -> pathlib.Path:
    """Return `path`, or the present place of the folder if a process was killed while it replaced it."""
    real = path.resolve()
    return path if real.exists() else _interrupted(real.parent).get(real.name, path)


def list_names(parent: pathlib.Path) -> set[str]:
    """List the names of what is in the folder `parent`, with the folders that only `find` finds."""
    return {path.name for path in parent.glob("*")} | _interrupted(parent).keys()


def settle(parent: pathlib.Path, own_files: OwnFiles, name: str | None = None) -> None:
    """Finish what killed processes have left in the folder `parent`; only for the folder `name`, if it is given."""
    for temporary in _temporaries(parent, name):
        with contextlib.suppress(OSError), (temporary / _MARK).open("a") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Fails where the process is alive.
            _settle(temporary, parent / _name_of(temporary), own_files)


def list_files(folder: pathlib.Path) -> Iterator[str]:
    """Yield the relative paths of all files below a folder, and of all links, which are not followed."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in [*names, *links]:
            yield os.path.relpath(os.path.join(place, name), folder)


@contextlib.contextmanager
def _temporary(path, own_files):
    """Give a new folder beside `path`, and settle at the end what is in it."""
    folder = files.temporary_name(path)
    folder.mkdir(parents=True)
    try:
        with (folder / _MARK).open("x") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield folder
            finally:
                _settle(folder, path, own_files)
    finally:
        if not os.path.lexists(folder / _MARK):
            with contextlib.suppress(OSError):
                folder.rmdir()  # Is there only if the mark could not be written.


def _interrupted(parent):
    """Map names of folders to where they are, if a process was killed between the two renames of `replacing`."""
    return {_name_of(found): found / _OLD for found in _temporaries(parent) if (found / _OLD).is_dir()}


def _temporaries(parent, name=None):
    names = ".+" if name is None else re.escape(name)
    pattern = re.compile(files.temporary_pattern(names))
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
            if pattern.fullmatch(entry.name) and _is_temporary(entry.path):
                yield pathlib.Path(entry.path)


def _is_temporary(folder):
    """Whether a folder with a temporary name has our mark, or only a new folder that was made again after the end."""
    names = os.listdir(folder)
    return _MARK in names or (names != [] and all(name.startswith(_NEW) for name in names))


def _name_of(temporary):
    return re.fullmatch(files.temporary_pattern("(.+)"), temporary.name)[1]


def _settle(temporary, path, own_files):
    """Put a folder back that was not replaced, remove one that was, then the temporary folder."""
    if (old := temporary / _OLD).exists() and not path.exists():
        old.rename(path)
    for gone in (temporary / _OLD, temporary / _REMOVED):
        if gone.exists():
            _dissolve(gone, path, own_files(gone) or [])
    if not any((temporary / name).exists() for name in (_OLD, _REMOVED)):  # What is left in them belongs to somebody.
        _clear(temporary)


def _clear(temporary):
    """Remove a temporary folder, its mark last: where that fails, the next command removes the rest."""
    for entry in temporary.iterdir():
        if entry.name != _MARK:
            shutil.rmtree(entry, ignore_errors=True)
    with contextlib.suppress(OSError):
        if os.listdir(temporary) == [_MARK]:
            (temporary / _MARK).unlink()
        temporary.rmdir()


def _dissolve(gone, path, own):
    """Remove our files from the folder `gone`, and move all others to `path`."""
    _carry(gone, path, own)
    for name in own:
        (gone / name).unlink(missing_ok=True)
    for place, _, _ in os.walk(gone, topdown=False):
        with contextlib.suppress(OSError):  # A file in it is in nobody's list and has no room at `path`.
            os.rmdir(place)


def _carry(gone, path, own):
    for entry in list(gone.iterdir()):
        if entry.name in own:
            continue
        inner = [name.partition("/")[2] for name in own if name.startswith(f"{entry.name}/")]
        is_folder = entry.is_dir() and not entry.is_symlink()
        if is_folder and (inner or (path / entry.name).is_dir()):
            _carry(entry, path / entry.name, inner)
        elif not os.path.lexists(path / entry.name):
            path.mkdir(parents=True, exist_ok=True)
            entry.rename(path / entry.name)


def _check_clashes(path: pathlib.Path, new: pathlib.Path, own: Iterable[str]) -> None:
    """Raise ValueError if a file at `path` that is not our own is in the way of a new one."""
    for name in sorted(set(list_files(path)) - set(own)):
        way = [new / name, *(new / name).parents[: name.count("/")]]
        if os.path.lexists(way[0]) or any(place.is_file() for place in way[1:]):
            raise ValueError(
                f"{path / name}: was not written by this package, and is in the way of a new file; move it"
            )


def _flush(path):
    """Return when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
