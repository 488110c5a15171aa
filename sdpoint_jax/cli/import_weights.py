"""Imports PyTorch weights of the SDPoint release, of torchvision, of timm or of others as a checkpoint.

    python -m sdpoint_jax import checkpoint.pth.tar --model=preresnet101 --output=runs/preresnet101
    python -m sdpoint_jax import resnet20.th --model=resnet20 --rename=linear:fc --output=runs/resnet20

A checkpoint as a training script or Lightning leaves it will do: the net's tensors are found in it, and what else it
holds is listed. Files are read as plain data; PyTorch is not needed.
"""

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "file", type=pathlib.Path, help="ending in .pth.tar, .pth, .pt, .th, .bin, .ckpt or .safetensors"
    )
    parser.add_argument("--model", required=True, help="name of the net, as in preresnet101")
    parser.add_argument(
        "--output", required=True, type=pathlib.Path, help="folder of the checkpoint: new, empty or a checkpoint"
    )
    parser.add_argument("--num-classes", type=int, help="as many as in the file by default")
    parser.add_argument("--channels", type=int, default=3, help="of the images, 3 by default")
    parser.add_argument("--reset-head", action="store_true", help="draw a new classifier instead of importing one")
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD:NEW",
        help="call part of the tensors' names otherwise first, as linear:fc; may be given several times",
    )
    parser.add_argument(
        "--key",
        help="which state dict of a file with several, as model_ema; by default state_dict, model, or the only one",
    )


def run(args: argparse.Namespace) -> None:
    """Imports the file and writes the checkpoint."""
    from sdpoint_jax import config  # Late: JAX takes seconds.
    from sdpoint_jax.interop import torch_import
    from sdpoint_jax.storage import checkpoint

    checkpoint.check_replaceable(args.output)
    variables, record = torch_import.import_file(
        args.file,
        args.model,
        num_classes=args.num_classes,
        channels=args.channels,
        reset_head=args.reset_head,
        renames=args.rename,
        key=args.key,
    )
    checkpoint.save(args.output, variables, record | {"format": config.FORMAT})
    if others := record["passed_over"]:
        print(f"passed over in the file: {torch_import.some(others, 12)}")
    print(f"imported {args.file} as {args.model} with {record['num_classes']} classes: {args.output}")
