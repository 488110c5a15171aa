"""Counts what the SDPoint instances of a net cost: python -m sdpoint_jax cost --model=preresnet101 --image-size=224"""

import argparse
import re
import signal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--model", required=True, help="name of the net, as in preresnet101")
    parser.add_argument("--image-size", required=True, type=_image_size, help="side, or HEIGHTxWIDTH, in pixels")
    parser.add_argument("--ratios", type=_ratios, help="downsampling ratios; 0.5,0.75 by default")
    parser.add_argument("--num-classes", type=int, default=1000, help="1000 by default")
    parser.add_argument("--channels", type=int, default=3, help="of the images, 3 by default")
    parser.add_argument(
        "--layers", metavar="INSTANCE", help="list the layers of this instance instead, as in p05_r0.75"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the table that the flags ask for."""
    from sdpoint_jax.instance import DEFAULT_RATIOS, SDPointInstance
    from sdpoint_jax.models.registry import create_model  # Late: JAX takes seconds.
    from sdpoint_jax.profiling import macs

    model = create_model(args.model, args.num_classes)
    if args.layers is None:
        instances = model.instances(args.ratios or DEFAULT_RATIOS)
        report = macs.format_instances(model, instances, args.image_size, args.channels)
    else:
        layers = macs.list_layers(model, SDPointInstance.from_name(args.layers), args.image_size, args.channels)
        report = macs.format_layers(layers)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # A reader that has seen enough, as `head`, is no error.
    print(report)


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
