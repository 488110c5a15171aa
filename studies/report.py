"""Draws a study's figure and writes its tables, from its file of results alone: python studies/report.py A

Writes STUDY.png, STUDY.md and, for some, STUDY_headline.png beside the results, or to --output. The same file gives the
same text and, with one version of matplotlib, the same picture. Exit codes: 0 done, 2 error.
"""

import pathlib
import sys
from collections.abc import Sequence

import figures
import grids
import page
import results

from sdpoint_jax.cli.parser import FAILED, Parser
from sdpoint_jax.storage import files

RESULTS = pathlib.Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report that the command line names; returns the exit code."""
    parser = Parser(prog="studies/report.py", description=__doc__)
    parser.add_argument("study", choices=grids.STUDIES, help="the grid; see studies/grids.py")
    parser.add_argument("--results", default="", help="file of the rows; by default studies/results/STUDY.csv")
    parser.add_argument("--output", default="", help="folder to write to; by default that of the results")
    args = parser.parse_args(arguments)
    file = pathlib.Path(args.results or RESULTS / f"{args.study}.csv")
    try:
        written = write_report(grids.STUDIES[args.study], file, pathlib.Path(args.output or file.parent))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    print(f"written: {', '.join(map(str, written))}")
    return 0


def write_report(study: grids.Study, file: pathlib.Path, output: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Write the figure and the snippets of a study, and its headline if it has one.

    Args:
        study: the study.
        file: of its results.
        output: folder to write to.

    Returns:
        the paths of the picture, of the text and of the headline.

    Raises:
        ValueError: no results, or of another study.
    """
    rows = results.read(file)
    if not rows or rows[0].study != study.name:
        raise ValueError(f"{file}: no results of study {study.name}; studies/run.py {study.name} adds them")
    picture, text = output / f"{study.name}.png", output / f"{study.name}.md"
    output.mkdir(parents=True, exist_ok=True)
    figures.draw(study, rows, picture)
    files.write_atomically(text, page.write_snippets(study, rows))
    if not figures.has_headline(study, rows):
        return picture, text
    headline = output / f"{study.name}_headline.png"
    figures.draw_headline(study, rows, headline)
    return picture, text, headline


if __name__ == "__main__":
    raise SystemExit(main())
