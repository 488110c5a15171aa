"""Counts what the SDPoint instances of a net cost: python -m sdpoint_jax cost --model=preresnet101 --image-size=224

Costs are read off the net's own trace, and the net is checked on the way: an instance that fails is one line that names
the part and the shape. Instances that are equal at this image size are listed once.

With `--device=tpu-v5e`, or the peak rates of any other, the table has the bytes that memory moves and an estimate of
the time that they and the MACs take there: on accelerators, time follows bytes rather than MACs.
"""

import argparse
import dataclasses
import os
import re
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--model", required=True, help="name of the net, as in preresnet101, or mynets:VGG")
    parser.add_argument("--model-args", default="", metavar="ARGS", help="attributes, as in 'widths=(8, 16), depth=2'")
    parser.add_argument("--image-size", required=True, type=_image_size, help="side, or HEIGHTxWIDTH, in pixels")
    parser.add_argument("--ratios", type=_ratios, help="downsampling ratios; 0.5,0.75 by default")
    parser.add_argument("--num-classes", type=int, default=1000, help="1000 by default")
    parser.add_argument("--channels", type=int, default=3, help="of the images, 3 by default")
    parser.add_argument(
        "--layers", metavar="INSTANCE", help="list the layers of this instance instead, as in p05_r0.75"
    )
    parser.add_argument("--device", help="add bytes, and times on this device, as in tpu-v5e or h100")
    parser.add_argument("--peak-tflops", type=float, help="10^12 operations a second, instead of the device's")
    parser.add_argument("--bandwidth-gbps", type=float, help="10^9 bytes a second, instead of the device's")
    parser.add_argument("--batch-size", type=int, help="images on one device, 128 by default; adds bytes")
    parser.add_argument(
        "--dtype", help="of the computation: bfloat16, the default of nets with a dtype, or float32; adds bytes"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the table that the flags ask for."""
    from sdpoint_jax.instance import DEFAULT_RATIOS, SDPointInstance
    from sdpoint_jax.models.registry import create_model  # Late: JAX takes seconds.
    from sdpoint_jax.profiling import macs, roofline
    from sdpoint_jax.profiling.check import check_model

    flags = (args.device, args.peak_tflops, args.bandwidth_gbps, args.batch_size, args.dtype)
    wants_bytes = any(flag is not None for flag in flags)
    if wants_bytes and args.layers:
        raise ValueError("--layers lists MACs, parameters and activations: without the flags of a device")
    model = create_model(args.model, args.num_classes, dtype=args.dtype or "float32", args=args.model_args)
    if wants_bytes and args.dtype is None and hasattr(model, "dtype"):
        model = create_model(args.model, args.num_classes, dtype="bfloat16", args=args.model_args)
    instances = model.instances(args.ratios or DEFAULT_RATIOS)
    checked = check_model(model, args.image_size, args.channels, args.ratios or DEFAULT_RATIOS)
    if args.layers:
        layers = macs.list_layers(model, SDPointInstance.from_name(args.layers), args.image_size, args.channels)
        report = macs.format_layers(layers)
    elif wants_bytes:
        batch_size = 128 if args.batch_size is None else args.batch_size
        device = _device(args)
        report = roofline.format_estimates(model, instances, args.image_size, batch_size, device, args.channels)
    else:
        report = macs.format_instances(model, instances, args.image_size, args.channels)
        report += f"\n{checked}"
    try:
        print(report, flush=True)
    except BrokenPipeError:  # A reader that has seen enough, as `head`, is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # The process's end flushes once more.


def _device(args):
    """Returns the device that the flags name or describe; None if they do neither."""
    from sdpoint_jax.profiling import roofline

    rates = {}
    if args.peak_tflops is not None:
        rates |= {"bfloat16_tflops": args.peak_tflops, "float32_tflops": args.peak_tflops}
    if args.bandwidth_gbps is not None:
        rates["bandwidth_gbps"] = args.bandwidth_gbps
    if args.device is not None:
        return dataclasses.replace(roofline.get_device(args.device), **rates)
    if not rates:
        return None
    if len(rates) < 3:
        raise ValueError("without --device, both --peak-tflops and --bandwidth-gbps are needed")
    return roofline.Device("of the flags", **rates)


def _image_size(text):
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: valid are a side, 224, or a height and a width, 224x320")
    return int(match[1]), int(match[2] or match[1])


def _ratios(text):
    try:
        return tuple(float(ratio) for ratio in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: valid are numbers in (0, 1), as in 0.5,0.75") from None
