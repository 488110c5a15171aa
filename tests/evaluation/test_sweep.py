import csv
import dataclasses
import json
import shutil
from types import SimpleNamespace

import chex
import commands
import jax
import numpy as np
import pytest
import services
import tiny

from sdpoint_jax.choice.cascade import Cascade, CascadeRow, Measured, stages_from_name
from sdpoint_jax.config import to_dict
from sdpoint_jax.evaluation import plot, sweep, table
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.storage import artefact, checkpoint
from sdpoint_jax.storage.artefact import InstanceRow, Latency
from sdpoint_jax.storage.lock import FolderLock


@pytest.fixture
def experiment(swept):
    return swept.experiment


@pytest.fixture
def params(swept):
    return swept.params


def test_every_instance_has_a_row(experiment, swept):
    rows = swept.rows
    assert [row.instance for row in rows] == list(experiment.model.instances())
    assert all(row.n == 400 and 0 <= row.top1 <= row.top5 <= 1 for row in rows)
    assert rows[0].macs == max(row.macs for row in rows)
    halves = [row.macs for row in rows if row.instance.ratio == 0.5]
    assert halves == sorted(halves)  # The later the point, the higher the cost.
    assert {row.reestimated_from for row in rows} == {"augmented training images"}


def test_the_files_hold_the_table(swept):
    output, rows = swept.folder, swept.rows
    assert table.read_table(output / "sweep.json") == (rows, None)
    with (output / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(row["instance"], int(row["macs"]), float(row["top1"])) for row in lines] == [
        (row.name, row.macs, row.top1) for row in rows
    ]
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    files = ["artefact", "lock", "sweep.csv", "sweep.json", "sweep.png"]
    assert sorted(path.name for path in output.iterdir()) == files


def test_an_interrupted_sweep_measures_only_what_is_missing(experiment, params, swept, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_GROUP", 3)
    instances, measured = experiment.instances[:6], []
    measure = sweep._measure

    def interrupted(experiment, params, group, *others):
        measured.append(group[0].name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(experiment, params, group, *others)

    monkeypatch.setattr(sweep, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(experiment, params, instances, tmp_path, split="test")
    assert not (tmp_path / "sweep.json").exists()
    rows = sweep.sweep(experiment, params, instances, tmp_path, split="test")
    assert measured == [instances[0].name, instances[3].name, instances[3].name]
    for row, other in zip(rows, swept.rows):
        assert row == dataclasses.replace(other, loss=row.loss, top1=row.top1, top5=row.top5)
        assert row.loss == pytest.approx(other.loss, rel=1e-4)
    # Other parameters are another sweep.
    moved = jax.tree.map(lambda x: x + 1e-3, params)
    sweep.sweep(experiment, moved, instances[:3], tmp_path, split="test")
    assert measured[3:] == [instances[0].name]


@pytest.fixture
def measured(monkeypatch):
    """The names of the instances that are measured, a list for each pass."""
    passes, measure = [], sweep._measure

    def note(experiment, params, group, *args):
        passes.append([instance.name for instance in group])
        return measure(experiment, params, group, *args)

    monkeypatch.setattr(sweep, "_measure", note)
    return passes


@pytest.fixture
def finished(swept, tmp_path):
    """A copy of the finished sweep, profiled and with a cascade; its folder."""
    folder = shutil.copytree(swept.folder, tmp_path / "sweep")
    found = services.with_latencies(artefact.load(folder / "artefact"))
    seen = Measured(20.0, 0.5, 300, (0.5, 0.5))
    row = CascadeRow(Cascade(stages_from_name("p01_r0.50+full"), (0.5,)), (10, 30), "validation", seen, seen)
    found = dataclasses.replace(found, cascades=(row.to_record(),))
    sweep.write_results(found, folder, ROWS[0])
    for name in ("cascades.json", "cascades.png"):
        (folder / name).write_text("{}")
    artefact.unfinished_profile(folder / "artefact").write_text('{"key": null}')
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_finished_sweep_is_not_repeated_and_loses_nothing(experiment, params, swept, finished, measured, capsys):
    before, files = artefact.load(finished / "artefact"), files_of(finished)
    rows = sweep.sweep(experiment, params, experiment.instances, finished, split="test")
    found = artefact.load(finished / "artefact")
    assert measured == [] and found.rows == rows == before.rows and found.cascades == before.cascades
    chex.assert_trees_all_equal(found.batch_stats[FULL_RESOLUTION], before.batch_stats[FULL_RESOLUTION])
    assert files_of(finished) == files
    out = capsys.readouterr().out
    assert "measured before: 7 of 7 instances" in out and "removed" not in out


def test_instances_that_are_added_are_measured_alone(experiment, params, swept, tmp_path, measured):
    sweep.sweep(experiment, params, experiment.instances[:2], tmp_path, split="test")
    rows = sweep.sweep(experiment, params, experiment.instances[:3], tmp_path, split="test")
    names = [instance.name for instance in experiment.instances[:3]]
    assert measured == [names[:2], names[2:]] and [row.name for row in rows] == names
    assert set(artefact.load(tmp_path / "artefact").batch_stats) == set(experiment.instances[:3])


def test_instances_that_are_not_asked_for_go_and_so_do_cascades_of_them(experiment, params, finished, measured, capsys):
    sweep.sweep(experiment, params, experiment.instances[:1], finished, split="test")
    found, out = artefact.load(finished / "artefact"), capsys.readouterr().out
    assert measured == [] and found.rows[0].latencies and not found.cascades
    assert f"removed from {finished}: p01_r0.50, " in out and f"removed from {finished}: the cascades" in out
    assert not (finished / "cascades.json").exists() and (finished / "latency.png").exists()


def test_other_statistics_keep_the_latencies_but_not_the_cascades(params, swept, finished, measured, capsys):
    config = tiny.config(instances="all", reestimate_images="clean")
    few = swept.experiment.instances[:2]
    sweep.sweep(Experiment(config), params, few, finished, split="test")
    found, before = artefact.load(finished / "artefact"), artefact.load(swept.folder / "artefact")
    assert measured == [[instance.name for instance in few]]
    assert all(row.latencies for row in found.rows) and not found.cascades
    assert found.rows[0].loss != before.rows[0].loss
    assert not {"cascades.json", "cascades.png", "artefact.profiling.json"} & files_of(finished).keys()


def test_other_parameters_keep_nothing_and_say_so(experiment, params, finished, measured, capsys):
    moved = jax.tree.map(lambda x: x + 1e-3, params)
    sweep.sweep(experiment, moved, experiment.instances[:1], finished, split="test")
    found, out = artefact.load(finished / "artefact"), capsys.readouterr().out
    assert measured == [["full"]] and not found.rows[0].latencies and not found.cascades
    assert "the latencies of full, measured with other parameters" in out
    assert not {"latency.png", "cascades.json", "artefact.profiling.json"} & files_of(finished).keys()


def test_images_that_were_added_are_measured_again(experiment, params, finished, measured, monkeypatch):
    monkeypatch.setattr(Experiment, "digest", lambda self, split: (401, split))
    sweep.sweep(experiment, params, experiment.instances[:1], finished, split="test")
    assert measured == [["full"]]


def test_sharing_layers_costs_a_third_of_one_by_one():
    model = create_model("resnet101", 1000)
    at_224 = SimpleNamespace(dataset=SimpleNamespace(image_size=(224, 224)))
    experiment = SimpleNamespace(model=model, config=at_224, dataset=SimpleNamespace(channels=3))
    shared, separate = sweep.count_passes(experiment, model.instances())
    assert (round(shared), round(separate)) == (15, 49)
    assert sweep.count_passes(experiment, [FULL_RESOLUTION]) == (1, 1)


def test_a_damaged_part_of_an_interrupted_sweep_is_measured_again(experiment, params, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_GROUP", 1)
    monkeypatch.setattr(sweep.plot, "plot_macs", lambda *_, **__: 1 / 0)  # As late as can be.
    instances, measured = experiment.instances[:2], []
    measure = sweep._measure
    monkeypatch.setattr(sweep, "_measure", lambda *args: measured.append(args[2][0].name) or measure(*args))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            sweep.sweep(experiment, params, instances, tmp_path, split="test")
    assert measured == [instance.name for instance in instances]
    damaged = tmp_path / "partial" / instances[1].name / "record" / "metadata"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ZeroDivisionError):
        sweep.sweep(experiment, params, instances, tmp_path, split="test")
    assert measured[2:] == [instances[1].name]
    assert f"measuring again: {tmp_path}/partial/{instances[1].name}: damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "sweep.csv",
        "sweep.png",
        "latency.png",
        "cascades.png",
        "sweep.json",
        "artefact/1.jpg",
        "artefact.profiling.json",
        "lock",
    ],
)
def test_files_that_no_sweep_wrote_are_refused_before_anything_is_measured(experiment, params, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("dear")
    with pytest.raises(ValueError, match=f"^{tmp_path / name.split('/')[0]}"):
        sweep.sweep(experiment, params, experiment.instances[:1], tmp_path, split="test")
    assert (tmp_path / name).read_text() == "dear"
    assert {path.name for path in tmp_path.iterdir()} <= {name.split("/")[0], "lock"}


def test_a_folder_called_partial_with_files_of_others_stays(tmp_path):
    checkpoint.save(tmp_path / "partial" / "full", {"a": np.zeros(1)}, {})
    (tmp_path / "partial" / "notes").mkdir()
    sweep._remove_partial(tmp_path / "partial")
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["notes"]


ROWS = [
    tiny.row("full", 100, 0.9),
    tiny.row("p01_r0.50", 30, 0.7),
    tiny.row("p01_r0.75", 60, 0.65),
    tiny.row("p02_r0.50", 60, 0.92),
]


def test_the_pareto_front_holds_what_nothing_beats():
    assert [found.name for found in table.pareto_front(ROWS)] == ["p01_r0.50", "p02_r0.50"]


def test_the_table_marks_the_front():
    lines = table.format_table(ROWS, 2 * max(row.macs for row in ROWS)).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("* p")] == ["p01_r0.50", "p02_r0.50"]
    assert "15 %" in lines[2] and "70.00 %" in lines[2]  # Of full resolution, which the table need not hold.


def test_a_baseline_comes_from_another_sweep(tmp_path):
    with pytest.raises(
        ValueError, match=f"baseline {tmp_path}: no .*; first run: python evaluate.py --workdir={tmp_path}"
    ):
        table.read_baseline(tmp_path)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"instances": [row.to_record() for row in ROWS]}))
    assert table.read_baseline(tmp_path) == ROWS[0]
    plot.plot_macs(ROWS, tmp_path / "plot.png", title="x", baseline=ROWS[0])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_two_sweeps_of_one_folder_do_not_meet(experiment, params, tmp_path):
    with FolderLock(tmp_path, "output folder"), pytest.raises(ValueError, match="output folder .*: in use by another"):
        sweep.sweep(experiment, params, experiment.instances, tmp_path, split="test")


def test_a_table_is_read_as_it_was_written():
    assert [InstanceRow.from_record(json.loads(json.dumps(row.to_record()))) for row in ROWS] == ROWS
    with pytest.raises(ValueError, match="not a row of a sweep's table: .*macs"):
        InstanceRow.from_record({"instance": "full"})


def with_latencies(row, *medians, device="gpu: a"):
    """The row, with these medians at batch sizes 1, 2, 4, ..."""
    for power, p50_ms in enumerate(medians):
        measured = Latency(device, "xla", "float32", 2**power, p50_ms, 2 * p50_ms, 9, 10**6, None, {"jax": "1"})
        row = row.with_latency(measured)
    return row


TIMED = [
    with_latencies(ROWS[0], 10.0, 16.0),
    with_latencies(ROWS[1], 8.0, 6.0),  # Saves 70 % of the MACs, and 20 % of the time of one image.
    ROWS[2],
    with_latencies(ROWS[3], 11.0, 10.0),
]
SETTING = ("gpu: a", "xla", "float32", 1)


def test_what_is_cheap_on_paper_only_is_told():
    savings = {instance.name: saving for instance, saving in table.list_savings(TIMED, SETTING).items()}
    assert {name: round(saving.macs, 3) for name, saving in savings.items()} == {
        "full": 0,
        "p01_r0.50": 0.7,
        "p01_r0.75": 0.4,
        "p02_r0.50": 0.4,
    }
    assert [saving.time and round(saving.time, 3) for saving in savings.values()] == [0, 0.2, None, -0.1]
    assert [saving.is_on_paper_only for saving in savings.values()] == [False, True, False, True]
    assert not table.Saving(macs=0.7, time=0.35).is_on_paper_only
    assert not table.Saving(macs=0.01, time=0).is_on_paper_only  # Too little to mark.


def test_the_settings_of_a_device_are_listed_in_order():
    rows = [with_latencies(row, 1.0, device="cpu: b") for row in TIMED[::-1]]
    assert [(device, size) for device, *_, size in table.list_settings(rows)] == [
        ("cpu: b", 1),
        ("gpu: a", 1),
        ("gpu: a", 2),
    ]
    assert [(device, size) for device, *_, size in table.list_settings(rows, "cpu: b")] == [("cpu: b", 1)]


def test_savings_are_against_full_resolution_wherever_it_stands():
    other = tiny.row("p03_r0.75", 100, 0.5)  # After the last convolution: it saves none.
    saved = table.list_savings([with_latencies(other, 20.0), *TIMED[::-1]], SETTING)
    assert saved[TIMED[1].instance].time == pytest.approx(0.2)
    assert table.list_savings(TIMED[1:], SETTING)[TIMED[1].instance].macs == pytest.approx(0.5)
    untimed = table.list_savings([ROWS[0], *TIMED[1:]], SETTING)
    assert {saving.time for saving in untimed.values()} == {None}


def test_the_table_shows_time_beside_macs():
    lines = table.format_latencies(TIMED, "gpu: a").splitlines()
    assert "gpu: a" in lines[0] and "batch 1" in lines[1] and "batch 2" in lines[1]
    full, cheap, late = (line.split() for line in lines[2:5])
    assert cheap == "p01_r0.50 70.00 % 70 % | 8.000 20 % *! | 6.000 62 % *".split()
    assert full == "full 90.00 % 0 % | 10.00 0 % * | 16.00 0 %".split()
    assert late == "p02_r0.50 92.00 % 40 % | 11.00 -10 % *! | 10.00 38 % *".split()
    assert lines[-1].startswith("! cheap on paper only")


def test_the_files_have_a_latency_of_each_device_side_by_side(tmp_path):
    rows = [with_latencies(row, 1.0, device="cpu: b, 2 threads") for row in TIMED]
    table.write_csv(tmp_path / "sweep.csv", rows)
    with (tmp_path / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    columns = ["p50_ms", "time_saved_percent", "on_paper_only", "images_per_second", "compile_seconds"]
    where = "gpu: a | xla | float32 | batch 2"
    assert [lines[1][f"{where} | {column}"] for column in columns] == ["6.0", "62.5", "False", "333.3", ""]
    assert [lines[2][f"{where} | {column}"] for column in columns] == [""] * 5
    assert lines[2]["cpu: b, 2 threads | xla | float32 | batch 1 | p50_ms"] == "1.0"
    assert lines[1]["macs_saved_percent"] == "70.0"

    settings = artefact.SweepSettings("net", "digits", "test", 1, "clean")
    table.write_json(tmp_path / "sweep.json", settings, rows, rows[1])
    written = json.loads((tmp_path / "sweep.json").read_text())["instances"][1]
    assert written["macs_saved_percent"] == 70
    assert [found["time_saved_percent"] for found in written["latencies"]] == [20, 62.5, 0]
    assert [found["on_paper_only"] for found in written["latencies"]] == [True, False, True]
    assert table.read_table(tmp_path / "sweep.json") == (tuple(rows), rows[1])


def test_the_plot_shows_every_setting_of_the_device(tmp_path):
    other = [with_latencies(row, 1.0, device="cpu: b") for row in TIMED]
    for device in ("gpu: a", "cpu: b"):
        plot.plot_latency(other, tmp_path / "latency.png", title="x", device=device)
        assert (tmp_path / "latency.png").stat().st_size > 10_000


def test_a_new_sweep_removes_the_plot_of_old_latencies(swept, tmp_path):
    found = artefact.load(swept.folder / "artefact")
    timed = found.with_rows([with_latencies(row, 1.0) for row in found.rows])
    sweep.write_results(timed, tmp_path, device="gpu: a")
    assert (tmp_path / "latency.png").is_file()
    sweep.write_results(found, tmp_path)
    assert not (tmp_path / "latency.png").exists()


def test_a_sweep_in_bfloat16_has_a_folder_and_a_table_of_its_own(swept, tmp_path):
    checkpoint.save(tmp_path / "run", {"params": swept.params}, {"config": to_dict(swept.experiment.config)})
    commands.run("evaluate", f"--workdir={tmp_path / 'run'}", "--dtype=bfloat16", "--instances=full,p01_r0.50")
    assert not (tmp_path / "run/sweep").exists()
    found = artefact.load(tmp_path / "run/sweep_bfloat16/artefact")
    assert (found.dtype, found.settings.dtype) == ("bfloat16", "bfloat16")
    assert json.loads((tmp_path / "run/sweep_bfloat16/sweep.json").read_bytes())["dtype"] == "bfloat16"
    exact = {row.instance: row for row in swept.rows}
    for row in found.rows:
        assert 0 < abs(row.loss - exact[row.instance].loss) < 0.02
    chex.assert_trees_all_equal(found.params, swept.params)
