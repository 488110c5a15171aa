"""What a study says in Markdown: tables and findings made from its rows alone, and the check of a page against them.

A page shows a study between the comments `<!-- study A -->` and `<!-- end of study A -->`.
"""

import re
from collections.abc import Sequence

import figures
import grids
import results
from grids import Comparison, Study
from results import Point, Row

_BELOW = 0.7  # Of the cost of full resolution: where a method for low costs must show what it is worth.


def write_snippets(study: Study, rows: Sequence[Row]) -> str:
    """Writes the tables and findings of a study as Markdown; the same rows give the same text."""
    parts = [_write_counts(rows)]
    for comparison in study.comparisons:
        pairs = _pair(study, comparison, rows)
        if pairs:
            heading = f"`{comparison.recipe}` against `{comparison.baseline}`:"
            parts += [heading, _comparison_table(comparison, pairs), _finding(comparison, pairs)]
    if study.x == "macs" and (table := _table_of_separate_nets(study, rows)):
        parts.append(table)
    if table := _table_of_cascades(study, rows):
        parts.append(table)
    return "\n\n".join([*parts, _table_of_trainings(study, rows)]) + "\n"


def _write_counts(rows):
    first = rows[0]
    seeds = sorted({len({row.seed for row in rows if row.recipe == recipe}) for recipe in {row.recipe for row in rows}})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"{first.model} ({first.params:,} parameters), {first.train_images:,} training images, "
        f"{first.n:,} test images; {count} {'seed' if count == '1' else 'seeds'} of each recipe. "
        "Where there are several seeds: mean (lowest to highest)."
    )


def _pair(study: Study, comparison: Comparison, rows: Sequence[Row]) -> list[tuple[Point, Point]]:
    """Pairs the points of two recipes that are of the same instance and have the same statistics.

    A study of the statistics compares full resolution alone.
    """
    if study.x != "macs":
        rows = [row for row in rows if row.instance == "full"]

    def key(point):
        first = point.first
        return first.instance, first.statistics, first.statistics_batches

    baseline = {key(point): point for point in results.points(rows, comparison.baseline)}
    found = [(point, baseline.get(key(point))) for point in results.points(rows, comparison.recipe)]
    return [(point, other) for point, other in found if other]


def _comparison_table(comparison, pairs):
    several = len({(p.first.statistics, p.first.statistics_batches) for p, _ in pairs}) > 1
    full_cost = max(point.macs for point, _ in pairs)
    head = ["instance", "MACs", "of full", *(["statistics from"] if several else []), comparison.label]
    lines = _table_head([*head, comparison.baseline_label, "difference"])
    for point, other in pairs:
        first = point.first
        cells = [f"`{first.instance}`", _macs(first.macs), _percent_of(first.macs, full_cost)]
        if several:
            unit = "batch" if first.statistics_batches == 1 else "batches"
            cells.append(f"{first.statistics_batches} {unit}, {first.statistics}")
        lines.append(_line([*cells, _top1(point), _top1(other), f"{100 * (point.mean - other.mean):+.2f}"]))
    return "\n".join(lines)


def _finding(comparison, pairs):
    """Says how often the recipe is above its baseline, by more than the spread where there is one."""
    where, full_cost = "of these", max(point.macs for point, _ in pairs)
    cheap = [(point, other) for point, other in pairs if point.macs < _BELOW * full_cost]
    if cheap:
        where, pairs = f"of the instances below {100 * _BELOW:.0f} % of full resolution's MACs", cheap
    if min(len(point.rows) for pair in pairs for point in pair) == 1:
        above, spread = sum(point.mean > other.mean for point, other in pairs), "one seed, so no spread to compare with"
    else:
        above, spread = (
            sum(point.low > other.high for point, other in pairs),
            "its lowest seed above the other's highest",
        )
    return f"{comparison.label} is above “{comparison.baseline_label}” at {above} of {len(pairs)} {where} ({spread})."


def _table_of_separate_nets(study, rows):
    """Sets nets that were trained for one cost each beside the best instance of the first recipe at that cost."""
    names = dict.fromkeys(name for curve in study.curves if curve.instances == "full" for name in curve.recipes)
    nets = [point for name in names for point in results.points(rows, name) if point.first.instance == "full"]
    one_net = figures.points_of(study, study.curves[0], rows)
    if not nets or not one_net:
        return ""
    label, full_cost = study.curves[0].label, max(point.macs for point in one_net)
    lines = _table_head(
        ["net trained for one cost", "input", "MACs", "of full", "top-1", f"{label}, at most that cost", "difference"]
    )
    for net in sorted(nets, key=lambda point: -point.macs):
        first = net.first
        cells = [
            f"`{first.recipe}`",
            first.image_size,
            _macs(first.macs),
            _percent_of(first.macs, full_cost),
            _top1(net),
        ]
        affordable = [point for point in one_net if point.macs <= first.macs]
        if affordable:
            best = max(affordable, key=lambda point: point.mean)
            difference = f"{100 * (best.mean - net.mean):+.2f}"
            lines.append(_line([*cells, f"`{best.first.instance}` {_top1(best)}", difference]))
        else:
            lines.append(_line([*cells, "none costs so little", "-"]))
    return "\n".join(lines)


def _table_of_cascades(study, rows):
    """Sets the cascades of each recipe beside its full resolution."""
    lines = _table_head(["cascades of", "mean MACs, at most", "mean MACs", "top-1", "full resolution", "difference"])
    for recipe in study.recipes:
        alone = [point for point in results.points(rows, recipe.name) if point.first.instance == "full"]
        full_with = {(full.first.statistics, full.first.statistics_batches): full for full in alone}
        for point in results.points(rows, recipe.name, cascades=True):
            full = full_with[point.first.statistics, point.first.statistics_batches]
            most = point.first.instance.removeprefix(results.CASCADE)
            cells = [f"`{recipe.name}`", f"{most} %", _percent_of(point.macs, full.macs), _top1(point), _top1(full)]
            lines.append(_line([*cells, f"{100 * (point.mean - full.mean):+.2f}"]))
    return "\n".join(lines) if len(lines) > 2 else ""


def _table_of_trainings(study, rows):
    """Says how long each recipe trained."""
    lines = _table_head(["recipe", "seeds", "epochs", "images seen", "minutes", "minutes of processor"])
    for recipe in study.recipes:
        found = {row.seed: row for row in rows if row.recipe == recipe.name}
        if found:
            some = list(found.values())
            cells = [f"`{recipe.name}`", str(len(found)), f"{some[0].epochs:g}", f"{some[0].images_seen:,}"]
            lines.append(_line([*cells, _minutes(some, "train_seconds"), _minutes(some, "train_cpu_seconds")]))
    return "\n".join(lines)


def _minutes(rows, field):
    """Means over the seeds whose time is known."""
    known = [getattr(row, field) for row in rows if getattr(row, field) is not None]
    return f"{sum(known) / len(known) / 60:.1f}" if known else "-"


def _table_head(names):
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _macs(macs):
    return f"{macs / 1e6:.1f} M"


def _percent_of(part, whole):
    return f"{100 * part / whole:.0f} %"


def _top1(point):
    if len(point.rows) == 1:
        return f"{100 * point.mean:.2f}"
    return f"{100 * point.mean:.2f} ({100 * point.low:.2f} to {100 * point.high:.2f})"


# The check of a page.

_BEGIN = re.compile(r"<!-- study ([A-Z]) -->")
_NO_PROSE = re.compile(r"```.*?```|`[^`\n]*`|<!--.*?-->|\]\([^)]*\)", flags=re.S)
_NUMBER = re.compile(r"(?<![A-Za-z\d.])(?<![A-Za-z]-)\d+(?:,\d{3})*(?:\.\d+)?")  # Not within names, as ResNet-20.


def list_studies(text: str) -> list[str]:
    """Lists the names of the studies that a page shows, in its order."""
    return _BEGIN.findall(text)


def check_page(text: str, rows: Sequence[Row]) -> list[str]:
    """Finds what a page says of a study that its results do not.

    Args:
        text: the page, in Markdown. Code, comments and the targets of links are not looked at.
        rows: of one study, at least one.

    Returns:
        a sentence for each line of a table that `write_snippets` does not write, and for each number elsewhere that
        does not occur in what it writes; none where all is well.
    """
    study = grids.STUDIES[rows[0].study]
    snippets = write_snippets(study, rows)
    lines, numbers = set(snippets.splitlines()), set(_numbers(snippets))
    problems = []
    for block in _blocks(text, study.name):
        for line in block.splitlines():
            if line.startswith("|") and line not in lines:
                problems.append(f"study {study.name}: no such line in its tables: {line}")
        prose = "\n".join(line for line in block.splitlines() if not line.startswith("|"))
        problems += [
            f"study {study.name}: {number} is not in its results" for number in _numbers(prose) if number not in numbers
        ]
    return problems


def _blocks(text, name):
    """Returns the parts of a page that are of one study."""
    parts = text.split(f"<!-- study {name} -->")[1:]
    end = f"<!-- end of study {name} -->"
    for part in parts:
        if end not in part:
            raise ValueError(f"the page has <!-- study {name} --> without {end}")
    return [part.partition(end)[0] for part in parts]


def _numbers(text):
    return _NUMBER.findall(_NO_PROSE.sub(" ", text))
