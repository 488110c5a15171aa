"""Picks the instance for a budget: python -m sdpoint_jax select runs/digits/sweep/artefact --max-macs=5_000_000

Limits may be combined. Latency and memory are those that `profile` has measured, for one call on --batch-size images.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    parser.add_argument("--max-macs", type=float, help="the most MACs that one image may cost")
    parser.add_argument("--relative-budget", type=float, help="the same as a share of the full cost, as 0.5")
    parser.add_argument("--max-latency-ms", type=float, help="the longest median time of one call")
    parser.add_argument("--max-memory-mb", type=float, help="the most memory of one call, in MB of 10^6 bytes")
    parser.add_argument("--min-top1", type=float, help="the top-1 accuracy that is needed, in 0..1")
    parser.add_argument("--batch-size", type=int, default=1, help="images of one call, 1 by default")
    parser.add_argument("--device", help="where latency and memory were measured; by default the one at hand")
    parser.add_argument("--runtime", help="xla or onnxruntime; by default the one measured to be the faster")
    parser.add_argument(
        "--prefer",
        default="most accurate",
        help="most accurate (default), cheapest, or cheapest within one standard error",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the instance within the budget."""
    from sdpoint_jax.choice.selection import Budget, check_device, select
    from sdpoint_jax.profiling.macs import full_macs
    from sdpoint_jax.storage import artefact  # Late: JAX takes seconds.
    from sdpoint_jax.storage.device import describe_device

    limits = (args.max_macs, args.relative_budget, args.max_latency_ms, args.max_memory_mb, args.min_top1)
    if not any(limit is not None for limit in limits):
        flags = "--max-macs --relative-budget --max-latency-ms --max-memory-mb --min-top1"
        raise ValueError(f"no budget: give at least one of the arguments {flags}")
    swept = artefact.load(args.artefact)
    rows, full_cost = swept.rows, full_macs(swept)
    max_macs = args.max_macs
    if args.relative_budget is not None:
        if max_macs is not None:
            raise ValueError(f"--max-macs={max_macs:g} --relative-budget={args.relative_budget:g}: give one of them")
        max_macs = args.relative_budget * full_cost
    budget = Budget(max_macs, args.max_latency_ms, args.max_memory_mb, args.min_top1, args.batch_size)
    device = args.device
    if budget.is_of_measurements and not device:
        device = check_device(rows, describe_device())
    row = select(rows, budget, device=device, runtime=args.runtime, prefer=args.prefer)
    given = [f"{max_macs:,.0f} MACs"] if max_macs is not None else []
    given += [f"{args.max_latency_ms:g} ms"] if args.max_latency_ms is not None else []
    given += [f"{args.max_memory_mb:g} MB"] if args.max_memory_mb is not None else []
    given += [f"at least {100 * args.min_top1:g} % top-1"] if args.min_top1 is not None else []
    print(
        f"budget of {' and '.join(given)}: instance {row.name}, {row.macs:,} MACs "
        f"({100 * row.macs / full_cost:.0f} % of the full cost), top-1 {100 * row.top1:.2f} %"
    )
