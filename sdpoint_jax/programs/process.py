"""What a process sets for JAX, before it imports it."""

import os
import pathlib
import sys


def keep_compiled_programs() -> None:
    """Let JAX cache compiled programs for the next start, unless the environment says where, or that it should not."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := _cache_folder()):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _cache_folder():
    """Return the folder of this user's compiled programs; None, with a line on stderr, where it cannot be written."""
    # Unlike pathlib's `home`, it leaves the tilde where a user has neither HOME nor an entry in the system's list.
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder, reason = pathlib.Path(base, "sdpoint_jax", "xla"), "no home directory"
    if not base.startswith("~"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            reason = "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"
        except OSError as error:
            reason = f"{folder}: {error.strerror}"
    if not reason:
        return folder
    print(
        f"compiled programs are not cached ({reason}); JAX_COMPILATION_CACHE_DIR names another folder", file=sys.stderr
    )
    return None
