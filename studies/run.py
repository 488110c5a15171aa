"""Runs the cells of a study, one after the other: python studies/run.py A --data=folder:/path --out=DIR

Trains each net, sweeps it, and adds its rows to studies/results/STUDY.csv; a cell that is there is not run again, and
one that was stopped goes on. --list shows the cells and runs none. Another data set or length of training belongs into
another file: --data=cifar10 --epochs=160 --results=FILE.
Exit codes: 0 done, 75 stopped on request (SIGTERM or Ctrl-C) and saved, 2 error.
"""

import pathlib
import sys
from collections.abc import Sequence

import grids

from sdpoint_jax.cli.parser import FAILED, Parser, comma_separated

RESULTS = pathlib.Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or lists the cells that the command line names; returns the exit code."""
    args = _parser().parse_args(arguments)
    _set_up()
    from sdpoint_jax.training import loop, stop

    try:
        _run(args)
    except loop.Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on", file=sys.stderr)
        return stop.STOPPED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return stop.STOPPED
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    return 0


def _run(args):
    import cells
    import runner

    study = grids.STUDIES[args.study]
    source = cells.Source(args.data, args.data_dir, args.epochs, args.init_from, args.num_workers)
    seeds = comma_separated(args.seeds, int, "seeds") or study.seeds
    chosen = cells.list_cells(study, seeds, [name for name in args.cells.split(",") if name])
    output, file = pathlib.Path(args.out), pathlib.Path(args.results or RESULTS / f"{study.name}.csv")
    if args.list:
        print("\n".join(runner.list_states(chosen, source, output, file)))
    else:
        runner.run_cells(chosen, source, output, file)


def _parser():
    parser = Parser(prog="studies/run.py", description=__doc__)
    parser.add_argument("study", choices=grids.STUDIES, help="the grid; see studies/grids.py")
    parser.add_argument("--data", required=True, help="data set, as cifar10 or folder:/path/to/images")
    parser.add_argument("--data-dir", default="", help="where prepared data sets are")
    parser.add_argument("--out", default="runs/studies", help="folder for the workdirs of the trainings")
    parser.add_argument("--results", default="", help="file of the rows; by default studies/results/STUDY.csv")
    parser.add_argument("--seeds", default="", help="numbers with commas between them; by default the study's")
    parser.add_argument("--cells", default="", help="names of some recipes, with commas between them; by default all")
    parser.add_argument("--epochs", type=float, help="of a recipe of length 1; by default the study's")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images; by default a thread")
    parser.add_argument("--init-from", default="", help="checkpoint to start from, for a study of trained nets")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.add_argument("--list", action="store_true", help="show the cells, and run none")
    return parser


def _set_up():
    """Prepares the process for JAX and Grain, and keeps compiled programs from one cell to the next."""
    from absl import flags, logging

    from sdpoint_jax.programs.host_memory import keep_freed_memory
    from sdpoint_jax.programs.process import keep_compiled_programs

    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.mark_as_parsed()
    keep_freed_memory()
    keep_compiled_programs()


if __name__ == "__main__":
    raise SystemExit(main())
