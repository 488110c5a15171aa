import dataclasses
import os
import signal

import cells
import grids
import pytest
import results
import run
import runner
from tiny_study import STUDY, without_times

from sdpoint_jax.training import loop

pytestmark = pytest.mark.xdist_group("studies")  # One worker trains the cells, once.
SOURCE = cells.Source("digits")
CELLS = cells.list_cells(STUDY, [0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Both cells of the tiny study: the output folder and the file of results."""
    folder = tmp_path_factory.mktemp("study")
    runner.run_cells(CELLS, SOURCE, folder / "out", folder / "A.csv")
    return folder / "out", folder / "A.csv"


def test_a_cell_adds_a_row_for_each_instance(finished):
    rows = [row for row in results.read(finished[1]) if not row.is_cascade]
    assert [(row.recipe, row.instance) for row in rows] == [
        (recipe, instance) for recipe in ("sdpoint", "plain") for instance in ("full", "p01_r0.50")
    ]
    assert {row.n for row in rows} == {400} and {row.images_seen for row in rows} == {30 * 40}
    assert {row.statistics_images for row in rows} == {2 * 200}
    assert rows[1].macs < rows[0].macs
    assert all(0.05 < row.top1 < 1 and row.train_seconds > 0 for row in rows)
    assert len({row.settings for row in rows}) == 2


def test_a_cell_adds_a_row_for_the_best_cascade_of_each_cost(finished):
    full, cheap, *found = [row for row in results.read(finished[1]) if row.recipe == "plain"]
    affordable = [percent for percent in grids.CASCADE_COSTS if percent / 100 * full.macs > cheap.macs]
    assert [row.instance for row in found] == [f"cascade_{percent}" for percent in affordable]
    for row, percent in zip(found, affordable):
        assert cheap.macs <= row.macs <= percent / 100 * full.macs
        assert (row.n, row.loss, row.train_images) == (400, None, full.train_images)
    assert len({row.macs for row in found}) > 1


def test_a_cell_that_is_there_is_not_run_again(finished, monkeypatch, tmp_path):
    before = finished[1].read_bytes()
    monkeypatch.setattr(cells, "run_cell", lambda *_: pytest.fail("a cell was run"))
    runner.run_cells(CELLS, SOURCE, tmp_path, finished[1])
    assert finished[1].read_bytes() == before


def test_a_stopped_cell_goes_on_and_gives_the_same_numbers_to_the_bit(finished, tmp_path, monkeypatch):
    out, file = tmp_path / "out", tmp_path / "A.csv"
    finish, count = loop.Loop._finish_step, iter(range(10**6))

    def stop_after_twelve(self, *args):
        if next(count) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, *args)

    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted):
        patch.setattr(loop.Loop, "_finish_step", stop_after_twelve)
        runner.run_cells(CELLS[:1], SOURCE, out, file)
    assert not file.exists() and "begun" in runner.list_states(CELLS[:1], SOURCE, out, file)[0]
    runner.run_cells(CELLS[:1], SOURCE, out, file)
    assert without_times(results.read(file)) == without_times(results.read(finished[1])[:2])
    assert all(row.train_seconds > 0 for row in results.read(file))


def test_a_sweep_that_is_missing_needs_no_second_training(finished, monkeypatch):
    out, file = finished
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("trained again"))
    other = file.with_name("other.csv")
    results.write(other, results.read(file)[2:])
    runner.run_cells(CELLS[:1], SOURCE, out, other)
    assert results.read(other)[-2:] == results.read(file)[:2]


def test_a_net_with_averaged_parameters_is_swept_with_these(finished, tmp_path):
    averaged = dataclasses.replace(STUDY.recipes[0], name="averaged", changes={"ema_decay": 0.9})
    study = dataclasses.replace(STUDY, recipes=(averaged,))
    runner.run_cells(cells.list_cells(study, [0]), SOURCE, tmp_path / "out", tmp_path / "A.csv")
    plain, mean = results.read(finished[1])[0], results.read(tmp_path / "A.csv")[0]
    assert (plain.recipe, plain.instance) == ("sdpoint", mean.instance)
    assert plain.loss != mean.loss


def test_a_training_that_was_killed_has_no_time(finished, tmp_path):
    config = cells.make_config(CELLS[0], SOURCE)
    times = tmp_path / "seconds.jsonl"
    times.write_text('{"begins": true}\n{"begins": true}\n{"begins": false, "finished": true, "wall": 2, "cpu": 1}\n')
    assert cells._read_times(times) == {"train_seconds": None, "train_cpu_seconds": None}
    times.write_text('{"begins": true}\n{"begins": false, "finished": true, "wall": 2, "cpu": 1}\n')
    assert cells._read_times(times) == {"train_seconds": 2, "train_cpu_seconds": 1}
    assert config.seed == 0


def test_results_of_other_settings_are_not_mixed(finished):
    _, file = finished
    longer = dataclasses.replace(SOURCE, epochs=2.0)
    with pytest.raises(ValueError, match="A/sdpoint/0 with 1 epochs .* give --results=ANOTHER_FILE"):
        runner.remaining_sweeps(CELLS[0], longer, results.read(file))
    elsewhere = dataclasses.replace(SOURCE, data="folder:/images/cifar100")
    with pytest.raises(ValueError, match="study A on digits, not of A on cifar100"):
        runner.remaining_sweeps(CELLS[0], elsewhere, results.read(file))


def test_the_place_of_the_data_is_no_setting():
    here, there = (cells.make_config(CELLS[0], cells.Source(f"folder:/{place}/images")) for place in "ab")
    assert cells.digest_settings(here) == cells.digest_settings(there)
    longer = cells.make_config(CELLS[0], cells.Source("folder:/a/images", epochs=2.0))
    assert cells.digest_settings(longer) != cells.digest_settings(here)


def test_every_prefix_of_a_grid_is_a_result():
    listed = cells.list_cells(grids.STUDY_A, grids.STUDY_A.seeds)
    assert [cell.name for cell in listed[:3]] == ["A/sdpoint/0", "A/plain/0", "A/plain_24/0"]
    assert [cell.seed for cell in listed] == sorted(cell.seed for cell in listed)


@pytest.mark.parametrize("study", grids.STUDIES.values(), ids=grids.STUDIES)
def test_curves_and_comparisons_are_of_recipes(study):
    named = [name for curve in study.curves for name in curve.recipes]
    named += [name for comparison in study.comparisons for name in (comparison.recipe, comparison.baseline)]
    for name in named:
        study.recipe(name)
    assert len({recipe.name for recipe in study.recipes}) == len(study.recipes)
    for sweep in {sweep for recipe in study.recipes for sweep in recipe.sweeps}:
        assert sweep.images in ("augmented", "clean")


@pytest.mark.parametrize("study", grids.STUDIES.values(), ids=grids.STUDIES)
def test_this_version_has_what_every_recipe_asks_for(study):
    source = cells.Source("folder:/images", init_from="/original")
    for cell, recipe in zip(cells.list_cells(study, [0]), study.recipes, strict=True):
        assert cells.digest_settings(cells.make_config(cell, source)), recipe.name  # Or NotAvailableError.


def test_a_key_that_this_version_lacks_makes_a_cell_unavailable(tmp_path, capsys):
    recipes = (
        grids.Recipe("new_key", {"training.magic": 1}),
        grids.Recipe("new_net", {"model.name": "resnet21"}),
        grids.Recipe("new_draw", {"sampling": "magic"}),
    )
    listed = cells.list_cells(dataclasses.replace(STUDY, recipes=recipes), [0])
    states = runner.list_states(listed, SOURCE, tmp_path, tmp_path / "A.csv")
    assert "not available: this version has no config.training.magic" in states[0]
    assert "not available: this version has no net 'resnet21'" in states[1]
    assert "not available: config.sampling 'magic'" in states[2]
    runner.run_cells(listed, SOURCE, tmp_path, tmp_path / "A.csv")
    assert capsys.readouterr().out.count("not available") == 3


def test_a_study_of_trained_nets_needs_one():
    cell = cells.list_cells(grids.STUDY_D, [0], ["paper_0"])[0]
    with pytest.raises(cells.NotAvailableError, match="give --init-from"):
        cells.make_config(cell, SOURCE)


def test_the_net_that_training_starts_from_can_be_the_teacher():
    source = dataclasses.replace(SOURCE, init_from="runs/original")
    taught, paper = (
        cells.make_config(cells.list_cells(grids.STUDY_D, [0], [name])[0], source) for name in ("taught_3", "paper_3")
    )
    assert (taught.init_from, taught.teacher, taught.instances_per_step) == ("runs/original", "runs/original", 3)
    assert (paper.init_from, paper.teacher, paper.instances_per_step) == ("runs/original", "", 1)
    moved = dataclasses.replace(source, init_from="elsewhere")
    elsewhere = cells.make_config(cells.list_cells(grids.STUDY_D, [0], ["taught_3"])[0], moved)
    assert cells.digest_settings(elsewhere) == cells.digest_settings(taught)


def test_length_zero_sweeps_the_given_net(finished, tmp_path):
    out, file = finished
    recipe = grids.Recipe("untrained", length=0.0, sweeps=STUDY.recipes[0].sweeps)
    study = dataclasses.replace(STUDY, recipes=(recipe,), needs_init=True)
    source = dataclasses.replace(SOURCE, init_from=str(cells.workdir_of(CELLS[0], SOURCE, out)))
    runner.run_cells(cells.list_cells(study, [0]), source, tmp_path, tmp_path / "A.csv")
    rows = results.read(tmp_path / "A.csv")
    assert [row.top1 for row in rows] == [row.top1 for row in results.read(file)[:2]]
    assert {(row.images_seen, row.epochs, row.train_seconds) for row in rows} == {(0, 0.0, None)}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cells=magic"], "no recipe 'magic'; valid are sdpoint, plain"),
        (["--seeds=a"], "--seeds=a: give numbers"),
        (["--data=digits", "--results={file}"], "is no row of a study's results"),
    ],
)
def test_an_error_is_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "_set_up", lambda: None)
    (tmp_path / "A.csv").write_text("study\nA\n")
    flags = [flag.format(file=tmp_path / "A.csv") for flag in flags]
    assert run.main(["A", "--data=digits", f"--out={tmp_path}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
