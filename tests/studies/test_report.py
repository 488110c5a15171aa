import dataclasses
import pathlib

import figures
import grids
import page
import pytest
import report
import results
from tiny_study import row

from sdpoint_jax.instance import FULL_RESOLUTION

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def rows():
    """Two seeds of SDPoint and plain, two instances each, and one smaller net."""
    return [
        row("sdpoint", "p01_r0.50", 14_100_000, 0.70, seed=0),
        row("sdpoint", "p01_r0.50", 14_100_000, 0.72, seed=1),
        row("sdpoint", "full", 40_800_000, 0.80, seed=0),
        row("sdpoint", "full", 40_800_000, 0.79, seed=1),
        row("plain", "p01_r0.50", 14_100_000, 0.45, seed=0),
        row("plain", "p01_r0.50", 14_100_000, 0.46, seed=1),
        row("plain", "full", 40_800_000, 0.81, seed=0),
        row("plain", "full", 40_800_000, 0.81, seed=1),
        row("plain_24", "full", 23_000_000, 0.74, image_size="24x24"),
    ]


def test_a_file_of_results_is_read_back_as_it_was(rows, tmp_path):
    some = [*rows, row("sdpoint", "full", 1, 1 / 3, train_seconds=None)]
    results.write(tmp_path / "A.csv", some)
    assert results.read(tmp_path / "A.csv") == tuple(some)
    assert results.read(tmp_path / "none.csv") == ()


def test_a_damaged_line_is_named(rows, tmp_path):
    results.write(tmp_path / "A.csv", rows)
    text = (tmp_path / "A.csv").read_text().replace("0.45", "much")
    (tmp_path / "A.csv").write_text(text)
    with pytest.raises(ValueError, match="A.csv: line 6 is no row"):
        results.read(tmp_path / "A.csv")


def test_the_table_gives_mean_and_spread(rows):
    text = page.write_snippets(grids.STUDY_A, rows)
    cells = "| `p01_r0.50` | 14.1 M | 35 % | 71.00 (70.00 to 72.00) | 45.50 (45.00 to 46.00) | +25.50 |"
    assert cells in text.splitlines()
    assert "is above “plain, downsampled at inference only” at 1 of 1 of the instances below 70 %" in text
    assert "its lowest seed above the other's highest" in text


def test_a_net_for_one_cost_stands_beside_what_the_one_net_does_at_that_cost(rows):
    lines = page.write_snippets(grids.STUDY_A, rows).splitlines()
    assert "| `plain_24` | 24x24 | 23.0 M | 56 % | 74.00 | `p01_r0.50` 71.00 (70.00 to 72.00) | -3.00 |" in lines


def test_cascades_stand_beside_full_resolution_with_their_mean_cost(rows):
    rows += [
        row("sdpoint", "cascade_60", macs, 0.80, seed, loss=None) for seed, macs in enumerate((20_400_000, 24_480_000))
    ]
    text = page.write_snippets(grids.STUDY_A, rows)
    cells = "| `sdpoint` | 60 % | 55 % | 80.00 (80.00 to 80.00) | 79.50 (79.00 to 80.00) | +0.50 |"
    assert cells in text.splitlines() and "| `cascade_60`" not in text
    curve = grids.Curve("cascades", ("sdpoint",), "cascades")
    assert [point.macs for point in figures.points_of(grids.STUDY_A, curve, rows)] == [22_440_000]
    assert len(figures.points_of(grids.STUDY_A, grids.Curve("one net", ("sdpoint",)), rows)) == 2
    few = [dataclasses.replace(row, statistics_batches=2) for row in rows]  # Beside full resolution's with the same.
    assert cells in page.write_snippets(grids.STUDY_A, few).splitlines()


def test_one_seed_has_no_spread(rows):
    text = page.write_snippets(grids.STUDY_A, [some for some in rows if some.seed == 0])
    assert "| `full` | 40.8 M | 100 % | 80.00 | 81.00 | -1.00 |" in text.splitlines()
    assert "one seed, so no spread to compare with" in text


def test_the_same_results_give_the_same_report(rows, tmp_path):
    results.write(tmp_path / "A.csv", rows)
    once, again = (
        [path.read_bytes() for path in report.write_report(grids.STUDY_A, tmp_path / "A.csv", tmp_path / name)]
        for name in ("once", "again")
    )
    assert once == again and once[0].startswith(b"\x89PNG")


def test_the_order_of_rows_does_not_matter(rows):
    assert page.write_snippets(grids.STUDY_A, rows[::-1]) == page.write_snippets(grids.STUDY_A, rows)


def test_no_results_are_an_error(tmp_path, capsys):
    assert report.main(["B", f"--results={tmp_path / 'B.csv'}"]) == 2
    assert "no results of study B; studies/run.py B adds them" in capsys.readouterr().err


def test_a_curve_takes_the_statistics_it_names(rows):
    clean = row("sdpoint", "full", 40_800_000, 0.1, statistics="clean")
    fewer = row("sdpoint", "full", 40_800_000, 0.1, statistics_batches=1)
    points = figures.points_of(grids.STUDY_A, grids.STUDY_A.curves[0], [*rows, clean, fewer])
    assert [point.mean for point in points] == pytest.approx([0.71, 0.795])


def test_the_front_leaves_out_what_another_point_beats(rows):
    worse = row("sdpoint", "p02_r0.50", 17_000_000, 0.5)
    points = figures.points_of(grids.STUDY_A, grids.STUDY_A.curves[0], [*rows, worse])
    assert [point.first.instance for point in figures.pareto_front(points)] == ["p01_r0.50", "full"]


def test_the_headline_says_the_difference_at_its_instance(rows, tmp_path):
    from matplotlib.figure import Figure

    line = grids.Headline("sdpoint", "plain", "ours", "others", "p01_r0.50")
    study = dataclasses.replace(grids.STUDY_A, headline=line)
    axes = Figure().subplots()
    figures.write_headline(study, rows, axes)
    assert {text.get_text() for text in axes.texts} == {"ours", "others", "", "+25.5 points\nat 35 % of the cost"}
    results.write(tmp_path / "A.csv", rows)
    assert report.write_report(study, tmp_path / "A.csv", tmp_path)[2].read_bytes().startswith(b"\x89PNG")
    alone = [row for row in rows if row.recipe == "sdpoint"]
    assert not figures.has_headline(study, alone) and not figures.has_headline(grids.STUDY_A, rows)


def wrap(text):
    return f"# Results\n\n99.9 is not ours.\n<!-- study A -->\n{text}\n<!-- end of study A -->\n12345\n"


def test_a_page_made_of_the_snippets_is_right(rows):
    prose = (
        "At 35 % of the MACs, `p01_r0.50` of ResNet-77 reaches 71.00 % on CIFAR-88.\n\n```sh\nrun --seeds=7,8,9\n```\n"
    )
    text = wrap(f"{prose}\n![figure](A_17.png)\n\n{page.write_snippets(grids.STUDY_A, rows)}")
    assert page.check_page(text, rows) == []
    assert page.list_studies(text) == ["A"]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("SDPoint reaches 71.01 %.", "71.01 is not in its results"),
        ("SDPoint is -7.77 points above.", "7.77 is not in its results"),
        ("| `full` | 40.8 M | 100 % | 99.00 | 81.00 | -1.00 |", "no such line in its tables"),
        # Each number is right, but of another instance.
        ("| `full` | 14.1 M | 35 % | 71.00 (70.00 to 72.00) | 45.50 (45.00 to 46.00) | +25.50 |", "no such line"),
    ],
)
def test_a_number_that_is_not_in_the_results_is_found(rows, line, problem):
    (found,) = page.check_page(wrap(line), rows)
    assert problem in found


def test_a_study_without_an_end_is_an_error(rows):
    with pytest.raises(ValueError, match="without <!-- end of study A -->"):
        page.check_page("<!-- study A -->\n1", rows)


def test_the_results_page_says_what_the_results_say():
    text = (ROOT / "docs" / "results.md").read_text()
    for name in page.list_studies(text):
        assert page.check_page(text, results.read(ROOT / "studies" / "results" / f"{name}.csv")) == []


def test_the_results_page_says_what_its_trainings_took():
    rows = [row for file in (ROOT / "studies" / "results").glob("?.csv") for row in results.read(file)]
    trainings, hours = results.training_time(rows)
    sentence = f"The {trainings} trainings behind it took {hours:.1f} hours of processor time"
    assert sentence in (ROOT / "docs" / "results.md").read_text()


def test_trainings_that_studies_share_count_once(rows):
    again = dataclasses.replace(rows[0], study="B")
    untrained = row("paper_0", "full", 40_800_000, 0.9, images_seen=0, train_cpu_seconds=None)
    other = row("sdpoint", "full", 40_800_000, 0.9, settings="ba9876543210", train_cpu_seconds=3000.0)
    assert results.training_time([*rows, again, untrained, other]) == (3, (300 + 300 + 3000) / 3600)


def test_the_committed_tables_are_those_of_the_results():
    for file in sorted((ROOT / "studies" / "results").glob("?.csv")):
        rows = results.read(file)
        assert file.with_suffix(".md").read_text() == page.write_snippets(grids.STUDIES[file.stem], rows), file


def mean_over_draw(values):
    """The mean under the paper's draw: uniform over points, then over the ratios at a point."""
    by_point = {}
    for instance, value in values.items():
        by_point.setdefault(instance.point, []).append(value)
    return sum(sum(some) / len(some) for some in by_point.values()) / len(by_point)


def test_the_sandwich_costs_what_its_study_says():
    from sdpoint_jax.models.registry import create_model
    from sdpoint_jax.profiling.macs import count_macs, count_suffix_macs

    model = create_model("resnet20", 10)

    def cost(instance):
        return count_macs(model, instance, 32)

    def suffix(instance):
        return count_suffix_macs(model, instance, model.last_shared_point(instance), 32) if instance.point else 0

    def mean_of_draw(of):
        return mean_over_draw({instance: of(instance) for instance in model.instances()})

    full, *others = model.instances()
    sandwich = cost(full) + suffix(min(others, key=cost)) + mean_of_draw(suffix)
    assert grids.STUDY_C.recipe("paper_same_compute").length == pytest.approx(sandwich / mean_of_draw(cost), abs=0.05)


def test_the_nets_that_one_net_replaces_cost_what_its_study_says():
    from sdpoint_jax.models.registry import create_model
    from sdpoint_jax.profiling.macs import count_macs

    model = create_model("resnet20", 10)
    replaced = sum(count_macs(model, FULL_RESOLUTION, side) for side in (32, 24, 20))
    costs = {instance: count_macs(model, instance, 32) for instance in model.instances()}
    drawn = mean_over_draw(costs)
    assert grids.STUDY_F.recipe("sdpoint_set").length == pytest.approx(replaced / drawn, abs=0.05)


def test_recipes_with_another_draw_cost_what_the_paper_s_does():
    from sdpoint_jax.models.registry import create_model
    from sdpoint_jax.profiling.macs import count_macs

    model = create_model("resnet20", 10)
    costs = {instance: count_macs(model, instance, 32) for instance in model.instances()}
    weights = grids.STUDY_G.recipe("half_full").changes["sampling_weights"]
    half = sum(w * cost for w, cost in zip(weights, costs.values(), strict=True)) / sum(weights)
    ends = {i: costs[i] for i in model.instances(points=grids.STUDY_G.recipe("stage_ends").changes["points"])}
    for name, mean in {"half_full": half, "stage_ends": mean_over_draw(ends)}.items():
        assert grids.STUDY_G.recipe(name).length * mean == pytest.approx(mean_over_draw(costs), rel=0.01), name
