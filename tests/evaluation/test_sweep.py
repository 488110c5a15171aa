import csv
import json
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpoint_jax.evaluation import sweep
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.serving.predictor import Predictor, main
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.training.step import normalize


@pytest.fixture(scope="module")
def experiment():
    return Experiment(tiny.config(instances="all"))


@pytest.fixture(scope="module")
def params(experiment):
    return tiny.variables(experiment.model)["params"]


@pytest.fixture(scope="module")
def swept(experiment, params, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep")
    rows = sweep.sweep(experiment, params, experiment.instances, output, split="test")
    return output, rows


def test_every_instance_has_a_row(experiment, swept):
    _, rows = swept
    assert [row["instance"] for row in rows] == [instance.name for instance in experiment.model.instances()]
    assert all(row["n"] == 400 and 0 <= row["top1"] <= row["top5"] <= 1 for row in rows)
    assert rows[0]["macs"] == max(row["macs"] for row in rows)
    halves = [row["macs"] for row in rows if row["ratio"] == 0.5]
    assert halves == sorted(halves)  # Later is dearer.
    assert {row["reestimated_from"] for row in rows} == {"augmented training images"}


def test_the_files_hold_the_table(swept):
    output, rows = swept
    assert json.loads((output / "sweep.json").read_text())["instances"] == rows
    with (output / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["instance"], int(row["macs"]), float(row["top1"])) for row in table] == [
        (row["instance"], row["macs"], row["top1"]) for row in rows
    ]
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == ["artefact", "sweep.csv", "sweep.json", "sweep.png"]


def test_the_artefact_holds_parameters_once_and_statistics_of_each_instance(swept, params):
    output, rows = swept
    arrays, record = checkpoint.load(output / "artefact")
    chex.assert_trees_all_equal(arrays["params"], params)
    assert set(arrays["batch_stats"]) == {row["instance"] for row in rows}
    assert record["table"] == rows


def test_an_interrupted_sweep_measures_only_what_is_missing(experiment, params, swept, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_GROUP", 3)
    instances, measured = experiment.instances[:6], []
    measure = sweep._measure

    def interrupted(experiment, params, group, split):
        measured.append(group[0].name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(experiment, params, group, split)

    monkeypatch.setattr(sweep, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(experiment, params, instances, tmp_path, split="test")
    assert not (tmp_path / "sweep.json").exists()
    rows = sweep.sweep(experiment, params, instances, tmp_path, split="test")
    assert measured == [instances[0].name, instances[3].name, instances[3].name]
    for row, other in zip(rows, swept[1]):
        assert row == other | {"loss": pytest.approx(other["loss"], rel=1e-4), "top1": row["top1"], "top5": row["top5"]}
    # Other parameters are another sweep.
    moved = jax.tree.map(lambda x: x + 1e-3, params)
    sweep.sweep(experiment, moved, instances[:3], tmp_path, split="test")
    assert measured[3:] == [instances[0].name]


def test_sharing_layers_costs_a_third_of_one_by_one():
    model = create_model("resnet101", 1000)
    at_224 = SimpleNamespace(dataset=SimpleNamespace(image_size=(224, 224)))
    experiment = SimpleNamespace(model=model, config=at_224, dataset=SimpleNamespace(channels=3))
    shared, separate = sweep.count_passes(experiment, model.instances())
    assert (round(shared), round(separate)) == (15, 49)
    assert sweep.count_passes(experiment, [FULL_RESOLUTION]) == (1, 1)


def test_a_damaged_part_of_an_interrupted_sweep_is_measured_again(experiment, params, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_GROUP", 1)
    monkeypatch.setattr(sweep, "plot", lambda *_, **__: 1 / 0)  # As late as can be.
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


def row(name, macs, top1):
    instance = SDPointInstance.from_name(name)
    return {
        "instance": name,
        "point": instance.point,
        "ratio": instance.ratio,
        "macs": macs,
        "top1": top1,
        "top5": None,
        "loss": 1.0,
        "n": 9,
    }


ROWS = [row("full", 100, 0.9), row("p01_r0.50", 30, 0.7), row("p01_r0.75", 60, 0.65), row("p02_r0.50", 60, 0.92)]


def test_the_pareto_front_holds_what_nothing_beats():
    assert [found["instance"] for found in sweep.pareto_front(ROWS)] == ["p01_r0.50", "p02_r0.50"]


def test_the_table_marks_the_front():
    lines = sweep.format_table(ROWS).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("* p")] == ["p01_r0.50", "p02_r0.50"]
    assert "30 %" in lines[2] and "70.00 %" in lines[2]


def test_a_baseline_comes_from_another_sweep(tmp_path):
    with pytest.raises(
        ValueError, match=f"baseline {tmp_path}: no .*; first run: python evaluate.py --workdir={tmp_path}"
    ):
        sweep.baseline_row(tmp_path)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"instances": ROWS}))
    assert sweep.baseline_row(tmp_path) == ROWS[0]
    sweep.plot(ROWS, tmp_path / "plot.png", title="x", baseline=ROWS[0])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def predictor(swept):
    return Predictor.load(swept[0] / "artefact")


@pytest.fixture(scope="module")
def test_images(experiment):
    batch = next(iter(experiment.evaluation_batches("test")))
    return batch["images"], batch["labels"]


def test_the_most_accurate_instance_within_the_budget_is_picked():
    record = {
        "table": ROWS,
        "class_names": ["a", "b"],
        "image_shape": [8, 8, 1],
        "num_classes": 2,
        "mean": [0.5],
        "std": [0.2],
    }
    predictor = Predictor({}, {}, record | {"model": {"name": "wrn10_1", "dtype": "float32"}})
    picked = [predictor.select(max_macs=budget).name for budget in (30, 59, 60, 99, 1000, None)]
    assert picked == ["p01_r0.50", "p01_r0.50", "p02_r0.50", "p02_r0.50", "p02_r0.50", "p02_r0.50"]
    with pytest.raises(ValueError, match="max_macs 29: the cheapest instance, p01_r0.50, needs 30 MACs"):
        predictor.select(max_macs=29)


@pytest.mark.parametrize("name", ["full", "p01_r0.50", "p03_r0.75"])
def test_predictions_are_those_of_the_net_with_the_instances_statistics(
    experiment, swept, predictor, test_images, name
):
    arrays, _ = checkpoint.load(swept[0] / "artefact")
    images = normalize(jnp.asarray(test_images[0][:13]), (0.305,), (0.376,))
    variables = {"params": arrays["params"], "batch_stats": arrays["batch_stats"][name]}
    instance = SDPointInstance.from_name(name)
    expected = experiment.model.apply(variables, images, instance=instance, train=False)
    for given in (name, instance):
        np.testing.assert_allclose(
            predictor.predict(test_images[0][:13], instance=given), expected, rtol=1e-4, atol=1e-5
        )


def test_the_predictor_is_as_accurate_as_the_table_says(experiment, predictor):
    batches = [b for b in experiment.evaluation_batches("test")]
    images = np.concatenate([b["images"] for b in batches])[:400]
    labels = np.concatenate([b["labels"] for b in batches])[:400]
    for found in predictor.table:
        top1 = (predictor.predict(images, instance=found["instance"]).argmax(1) == labels).mean()
        assert top1 == pytest.approx(found["top1"], abs=1 / 400)


def test_a_budget_uses_the_instance_that_select_names(predictor, test_images):
    cheapest = min(predictor.table, key=lambda found: found["macs"])
    by_budget = predictor.predict(test_images[0], max_macs=cheapest["macs"])
    np.testing.assert_array_equal(by_budget, predictor.predict(test_images[0], instance=cheapest["instance"]))
    assert predictor.predict(test_images[0][:0]).shape == (0, 10)


def test_an_instance_that_was_not_swept_is_refused(experiment, params, tmp_path):
    sweep.sweep(experiment, params, (FULL_RESOLUTION,), tmp_path, split="test")
    predictor = Predictor.load(tmp_path / "artefact")
    with pytest.raises(ValueError, match="p02_r0.50: its statistics were not re-estimated; the artefact has full"):
        predictor.predict(np.zeros((1, 8, 8, 1), np.uint8), instance="p02_r0.50")


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 1)), np.zeros((8, 8, 1), np.uint8), np.zeros((2, 8, 9, 1), np.uint8)]
)
def test_images_of_another_kind_are_refused(predictor, images):
    with pytest.raises(ValueError, match=r"images .*: needs uint8 \[B, 8, 8, 1\]"):
        predictor.predict(images)


def test_a_checkpoint_of_a_run_is_no_artefact(tmp_path, params):
    checkpoint.save(tmp_path / "run", {"params": params}, {"config": {}})
    with pytest.raises(checkpoint.CheckpointError, match="not the artefact of a sweep"):
        Predictor.load(tmp_path / "run")


def test_the_command_picks(swept, capsys):
    output, rows = swept
    main([str(output / "artefact"), "--relative-budget=0.99"])
    assert "budget of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(output / "artefact"), "--max-macs=1"])
    assert capsys.readouterr().err.startswith("error: max_macs 1: the cheapest instance")
