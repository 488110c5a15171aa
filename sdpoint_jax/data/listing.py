"""The files of image folders as people have them: without what systems and programs leave in them."""

import os
from collections.abc import Iterator

# Folders and files of network disks, of Windows, of macOS' archives and of Python, in lower case. Hidden ones begin
# with a dot: .ipynb_checkpoints, .DS_Store, AppleDouble's ._photo.jpg.
_SERVICE = {
    "@eadir",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "~snapshot",
    "lost+found",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "__macosx",
    "__pycache__",
}


def is_service(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left by a system or program."""
    return name.startswith(".") or name.lower() in _SERVICE


def list_files(folder: str, seen: set[str] | None = None) -> Iterator[str]:
    """Yield the paths, relative to `folder`, of the files in it at any depth, but for service files and folders.

    Links are followed. A folder that is reached in several ways is listed once, and one that holds the folder of the
    link, as with a link to itself, not at all.

    Args:
        folder: Where to look.
        seen: Real paths of folders that do not count. The real paths of all that are listed are added.
    """
    seen = set() if seen is None else seen
    here = os.path.realpath(folder)
    seen.add(here)
    links = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_service(entry.name):
            continue
        if not entry.is_dir():
            yield entry.name
        elif entry.is_symlink():
            links.append(entry)  # Last: what lies here has its name from here, whether or not a link leads there too.
        else:
            yield from _below(entry, seen)
    for entry in links:
        there = os.path.realpath(entry.path)
        if there not in seen and not f"{here}/".startswith(f"{there.rstrip('/')}/"):
            yield from _below(entry, seen)


def _below(entry, seen):
    if os.path.realpath(entry.path) not in seen:
        for name in list_files(entry.path, seen):
            yield os.path.join(entry.name, name)
