"""Picks the instance for a budget: python -m sdpoint_jax select runs/digits/sweep/artefact --max-macs=5_000_000"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max-macs", type=float, help="the most MACs that one image may cost")
    budget.add_argument("--relative-budget", type=float, help="the same as a share of the full cost")


def run(args: argparse.Namespace) -> None:
    """Prints the most accurate instance within the budget."""
    from sdpoint_jax.serving.predictor import Predictor  # Late: JAX takes seconds.

    predictor = Predictor.load(args.artefact)
    full_cost = max(row.macs for row in predictor.rows)
    max_macs = args.max_macs if args.max_macs is not None else args.relative_budget * full_cost
    instance = predictor.select(max_macs=max_macs)
    row = next(row for row in predictor.rows if row.instance == instance)
    print(
        f"budget of {max_macs:,.0f} MACs: instance {row.name}, {row.macs:,} MACs "
        f"({100 * row.macs / full_cost:.0f} % of the full cost), top-1 {100 * row.top1:.2f} %"
    )
