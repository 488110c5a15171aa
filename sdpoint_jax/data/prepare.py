"""Prepares a data set, once: writes it where `load_dataset` finds it, as array_record files."""

import os
import re
import sys
from pathlib import Path

from sdpoint_jax.data import builder, download
from sdpoint_jax.data.dataset import FOLDER, check_on_bad_image, default_data_dir, expand_data_dir
from sdpoint_jax.data.sources import cifar, digits, folder, imagenet
from sdpoint_jax.data.sources.tfds import is_in_catalogue, open_prepared, prepared_sets
from sdpoint_jax.paths import check_local


def prepare(
    name: str,
    data_dir: str | None = None,
    *,
    source: str | None = None,
    set_name: str | None = None,
    on_bad_image: str = "error",
) -> Path:
    """Prepares a data set and returns its directory.

    Args:
        name: "digits", "cifar10", "cifar100", "imagenet2012", "folder:PATH", or another set of TFDS's catalogue.
        data_dir: where prepared sets go; by default TFDS's.
        source: the archive, or a directory that holds the archives; without it CIFAR is downloaded.
        set_name: the name to load a folder by; by default made from the folder's own. A set of this name that is there
            must have been prepared from the same images.
        on_bad_image: what to do with an image of a folder that cannot be decoded: "error" or "skip".

    Raises:
        ValueError: what is missing or wrong, in one line.
    """
    check_on_bad_image(on_bad_image)
    check_local(name)
    check_local(data_dir or default_data_dir(), "data_dir ")
    check_local(source or "", "source ")
    data_dir = expand_data_dir(data_dir)
    if name.startswith(FOLDER):
        return _prepare_folder(name.removeprefix(FOLDER), data_dir, set_name, on_bad_image)
    if name in (found := prepared_sets(data_dir)):
        return found[name]
    if name == digits.NAME:
        return builder.write(digits.image_set(), data_dir)
    if name in cifar.ARCHIVES:
        return _prepare_cifar(name, data_dir, source)
    if name == imagenet.NAME:
        return _prepare_imagenet(data_dir, source)
    return _prepare_from_catalogue(name, data_dir)


def _prepare_cifar(name, data_dir, source):
    known = cifar.ARCHIVES[name]
    if source is None:
        archive = os.path.join(data_dir, "downloads", known[0])
        download.download(cifar.URL + known[0], archive)
    else:
        archive = _find(source, known)
    checksum = download.md5(archive)
    version = next((version for version in known if cifar.MD5[version] == checksum), None)
    if version is None:
        expected = " or ".join(f"{cifar.MD5[version]} ({version})" for version in known)
        raise ValueError(f"{archive}: its MD5 checksum is {checksum}, expected {expected}; fetch it again")
    return builder.write(cifar.image_set(name, archive, version), data_dir)


def _prepare_imagenet(data_dir, source):
    if source is None:
        files = " and ".join(imagenet.ARCHIVES.values())
        raise ValueError(f"imagenet2012 needs --source=DIRECTORY with {files}, from https://image-net.org")
    if os.path.isfile(source):
        source = os.path.dirname(source) or os.curdir
    archives = {split: _find(source, [file]) for split, file in imagenet.ARCHIVES.items()}
    return builder.write(imagenet.image_set(archives), data_dir)


def _prepare_folder(root, data_dir, set_name, on_bad_image):
    root = os.path.abspath(os.path.expanduser(root))
    set_name = set_name or re.sub(r"\W+", "_", os.path.basename(root)).lower()
    if not re.fullmatch(r"[a-z]\w*", set_name):
        raise ValueError(f"--name {set_name!r}; valid: a letter, then letters, digits and underscores")
    image_set = folder.image_set(root, set_name, on_bad_image)
    directory = prepared_sets(data_dir).get(set_name) or builder.write(image_set, data_dir)
    prepared = open_prepared(set_name, data_dir)
    if prepared.description != image_set.description:
        if found := folder.find_difference(root, prepared, on_bad_image):
            raise ValueError(
                f"{directory} was prepared from other images than {root} has now: {found}; give another --name, or "
                f"remove {directory} first"
            )
    return directory


def _prepare_from_catalogue(name, data_dir):
    import tensorflow_datasets as tfds

    if not is_in_catalogue(name):
        raise ValueError(f"unknown data set {name!r}; valid: digits, folder:PATH, names of TFDS's catalogue")
    try:
        made = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        _check_network(made, data_dir)
        made.download_and_prepare()
    except ImportError as error:
        raise ValueError(f"TFDS needs TensorFlow to prepare {name} ({error}): pip install tensorflow-cpu") from None
    except AssertionError as error:  # What TFDS raises where files are to be put by hand.
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    return Path(made.data_dir)


def _check_network(made, data_dir):
    """Fails at once where TFDS would try for minutes; files that are there may be all it needs."""
    there = any(path.is_file() for path in Path(data_dir, "downloads").rglob("*"))
    if made.url_infos and not there:
        download.check_host(next(iter(made.url_infos)))


def _find(source, names):
    """Returns `source` if it is a file, else the path of the first of `names` in it."""
    if os.path.isfile(source):
        return source
    found = [path for name in names if os.path.isfile(path := os.path.join(source, name))]
    if not found:
        raise ValueError(f"{source}: no {' or '.join(names)} there")
    return found[0]


if __name__ == "__main__":  # What the command was once.
    print("error: the command is python -m sdpoint_jax prepare", file=sys.stderr)
    sys.exit(2)
