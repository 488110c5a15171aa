"""Prepares a data set, once: writes it where training and evaluation find it, as array_record files.

    python -m sdpoint_jax prepare cifar10 --data-dir=DIR
    python -m sdpoint_jax prepare cifar100 --source=cifar-100-python.tar.gz
    python -m sdpoint_jax prepare imagenet2012 --source=DIRECTORY_OF_THE_TWO_TAR_FILES
    python -m sdpoint_jax prepare folder:/path/to/images --name=my_images
    python -m sdpoint_jax prepare NAME

CIFAR is downloaded without --source. A folder can be used as it is; prepared, it is faster on a network disk. Another
NAME is one of TFDS's catalogue, which may need TensorFlow.

A set that is there already is left alone. An interrupted command may be given again: a download goes on where it was,
the writing starts anew, and nothing is taken for a whole set before it is one.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to `parser`, and what it does as the description."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", metavar="NAME", help="the data set")
    parser.add_argument("--data-dir", help="where prepared sets go (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    parser.add_argument("--source", help="the archive, or the directory of the archives, that the set is made from")
    parser.add_argument("--name", help="the name to load a folder by (default: made from the folder's own)")
    parser.add_argument(
        "--on-bad-image",
        choices=("error", "skip"),
        default="error",
        help="whether an image of a folder that cannot be decoded is an error (default), or is left out",
    )


def run(args: argparse.Namespace) -> None:
    """Prepares the data set that `args` name, and prints where it is.

    Raises:
        ValueError: what is missing or wrong, in one line.
        OSError: a file that cannot be read or written.
    """
    from sdpoint_jax.data.prepare import prepare  # Late, as it takes a moment and a mistyped flag should not.

    directory = prepare(
        args.dataset, args.data_dir, source=args.source, set_name=args.name, on_bad_image=args.on_bad_image
    )
    print(f"{args.dataset} is prepared: {directory}")
