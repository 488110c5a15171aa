"""The cells of a grid, one after the other, and the rows that they add to the file of results."""

import pathlib
from collections.abc import Iterable, Sequence

import cells
import grids
import results
from cells import Cell, Source
from results import Row

from sdpoint_jax import progress
from sdpoint_jax.storage.lock import FolderLock


def run_cells(chosen: Sequence[Cell], source: Source, output: pathlib.Path, file: pathlib.Path) -> None:
    """Runs cells in their order, each with its sweeps that are not in the file yet, and adds their rows to it.

    Args:
        chosen: the cells.
        source: of their data.
        output: folder of all workdirs, of one such process at a time.
        file: of results. A stop loses nothing: the rows of a sweep are added when it is done.

    Raises:
        ValueError: the file holds rows of another data set, or of a cell with other settings.
        Interrupted: see `sdpoint_jax.training.loop.train`, also for its other errors.
    """
    with FolderLock(output, "output folder"):
        for cell in chosen:
            try:
                sweeps = remaining_sweeps(cell, source, results.read(file))
                if sweeps:
                    progress.say(f"{cell.name}: trains, or goes on")
                for added in cells.run_cell(cell, source, output, sweeps) if sweeps else ():
                    results.write(file, [*results.read(file), *added])
                    progress.say(f"{cell.name}: {len(added)} rows added to {file}")
            except cells.NotAvailableError as error:
                progress.say(f"{cell.name}: not available: {error}")


def remaining_sweeps(cell: Cell, source: Source, rows: Iterable[Row]) -> tuple[grids.Sweep, ...]:
    """Lists the sweeps of a cell that are not among the rows.

    Raises:
        NotAvailableError: see `cells.make_config`.
        ValueError: the rows are of another data set, or of the same cell with other settings.
    """
    settings = cells.digest_settings(cells.make_config(cell, source))
    done = set()
    for row in rows:
        if (row.study, row.dataset) != (cell.study.name, source.name):
            raise ValueError(
                f"the results are of study {row.study} on {row.dataset}, not of {cell.study.name} on {source.name}: "
                "give --results=ANOTHER_FILE"
            )
        if (row.recipe, row.seed) != (cell.recipe.name, cell.seed):
            continue
        if row.settings != settings:
            raise ValueError(
                f"the results hold {cell.name} with {row.epochs:g} epochs and settings {row.settings}, not {settings}: "
                "give --results=ANOTHER_FILE, or remove its rows"
            )
        done.add((row.statistics, row.statistics_batches))
    return tuple(sweep for sweep in cell.recipe.sweeps if (sweep.images, sweep.batches) not in done)


def list_states(chosen: Sequence[Cell], source: Source, output: pathlib.Path, file: pathlib.Path) -> list[str]:
    """Describes cells, a line each: `done`, `begun`, `to do` or `not available`, with the reason."""
    rows = results.read(file)
    return [f"{cell.name:<28} {_state(cell, source, output, rows)}" for cell in chosen]


def _state(cell, source, output, rows):
    try:
        left = len(remaining_sweeps(cell, source, rows))
        workdir = cells.workdir_of(cell, source, output)
    except cells.NotAvailableError as error:
        return f"not available: {error}"
    if not left:
        return "done"
    return f"begun in {workdir}" if workdir.exists() else "to do"
