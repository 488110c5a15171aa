"""Paths that users give: on this machine, or addresses of a cloud storage, of which none is supported yet."""

import os
import re

_PREFIX = "folder:"  # Of the names of data sets that are folders of images.
# pathlib makes one slash of two, so the usual schemes are told with one as well.
_USUAL = "abfs|abfss|az|file|ftp|gcs|gs|hdfs|hf|http|https|oss|s3|s3a"
_ADDRESS = re.compile(rf"([a-z][a-z0-9+-]+)://|({_USUAL}):/", re.IGNORECASE)


def check_local(path: str | os.PathLike, name: str = "") -> None:
    """Raise ValueError if a path is an address, such as gs://bucket/run. An absolute path is never one.

    Args:
        path: given by the user; may begin with `folder:`.
        name: what the message begins with, such as `--workdir=`.
    """
    path = os.fsdecode(path)
    if found := _ADDRESS.match(path.removeprefix(_PREFIX)):
        scheme = found[1] or found[2]
        hint = "give a path on this machine, such as the path of a mounted bucket"
        raise ValueError(f"{name}{path}: {scheme}:// addresses are not supported; {hint}")
