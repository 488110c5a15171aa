"""Cascades of a sweep: chosen on held-out images, reported on others, with costs that count the prefix once."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny

from sdpoint_jax.choice.cascade import CascadeRow, pareto_front, select_cascade, stages_from_name
from sdpoint_jax.cli import evaluate
from sdpoint_jax.cli.parser import Parser
from sdpoint_jax.config import to_dict
from sdpoint_jax.evaluation import cascades
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.profiling.macs import count_macs
from sdpoint_jax.programs.evaluator import Evaluator
from sdpoint_jax.storage import artefact, checkpoint

EARLY, LATE = SDPointInstance(1, 0.5), SDPointInstance(2, 0.5)


@pytest.fixture(scope="module")
def searched(swept, tmp_path_factory):
    """A folder with the sweep of the tiny net, after cascades were searched; their rows."""
    folder = tmp_path_factory.mktemp("cascades")
    shutil.copytree(swept.folder / "artefact", folder / "artefact")
    plan = cascades.plan_cascades(swept.experiment, swept.experiment.instances, "auto", split="test")
    rows, _ = cascades.evaluate_cascades(swept.experiment, plan, folder)
    return folder, rows


def logits_of(swept, split, instances):
    """Logits of the instances on a split, each net run whole by itself, and labels."""
    experiment, found = swept.experiment, artefact.load(swept.folder / "artefact")
    batches = list(experiment.evaluation_batches(split))
    images, labels, mask = (np.concatenate([batch[key] for batch in batches]) for key in ("images", "labels", "mask"))
    logits = {
        instance: experiment.model.apply(
            {"params": swept.params, "batch_stats": found.batch_stats[instance]},
            experiment.preprocess(images[mask > 0]),
            instance=instance,
            train=False,
        )
        for instance in instances
    }
    return {instance: np.asarray(some) for instance, some in logits.items()}, labels[mask > 0]


def test_what_is_reported_is_what_whole_nets_give_on_the_evaluated_split(swept, searched):
    _, rows = searched
    assert len(rows) > 1
    model = swept.experiment.model
    logits, labels = logits_of(swept, "test", swept.experiment.instances)
    for row in rows:
        stages, costs = row.cascade.stages, np.cumsum(row.macs)
        answers, reached = row.cascade.run([logits[stage] for stage in stages])
        # Confidences that rounding takes over a threshold may move an image or two.
        assert row.evaluated.n == 400 and row.evaluated.top1 == pytest.approx(
            (answers.argmax(1) == labels).mean(), abs=0.006
        )
        assert row.evaluated.mean_macs == pytest.approx(costs[reached].mean(), rel=0.01)
        assert row.macs[0] == count_macs(model, stages[0], (8, 8), 1)


def test_cascades_are_chosen_on_the_validation_split(swept, searched):
    _, rows = searched
    assert {(row.calibrated_on, row.calibration.n) for row in rows} == {("validation", 200)}
    logits, labels = logits_of(swept, "validation", swept.experiment.instances)
    for row in rows:
        answers, _ = row.cascade.run([logits[stage] for stage in row.cascade.stages])
        assert row.calibration.top1 == pytest.approx((answers.argmax(1) == labels).mean(), abs=0.011)
    assert rows == pareto_front(rows)
    single = max((logits[instance].argmax(1) == labels).mean() for instance in swept.experiment.instances)
    assert rows[-1].calibration.top1 >= single - 0.011


def test_the_artefact_keeps_them_for_a_predictor(swept, searched):
    folder, rows = searched
    kept = artefact.load(folder / "artefact")
    assert [CascadeRow.from_record(record) for record in kept.cascades] == rows
    assert kept.rows == swept.rows
    dearest = max(rows, key=lambda row: row.calibration.top1)
    assert select_cascade(rows, 1e12) == dearest
    without = artefact.load(swept.folder / "artefact")
    assert without.cascades == ()


def test_an_artefact_from_before_there_were_cascades_is_read(swept, tmp_path):
    arrays, record = checkpoint.load(swept.folder / "artefact")
    del record["cascades"]
    checkpoint.save(tmp_path / "old", arrays, record)
    assert artefact.load(tmp_path / "old").cascades == ()


def test_the_files_hold_the_rows(searched):
    folder, rows = searched
    written = json.loads((folder / "cascades.json").read_text())
    assert [CascadeRow.from_record(record) for record in written["cascades"]] == rows
    assert (written["split"], written["calibrated_on"], written["calibration_images"]) == ("test", "validation", 200)
    assert (folder / "cascades.png").read_bytes().startswith(b"\x89PNG")


def test_named_cascades_are_reported_each(swept, tmp_path):
    shutil.copytree(swept.folder / "artefact", tmp_path / "artefact")
    names = "p01_r0.50+full,p01_r0.50+p02_r0.50+full"
    plan = cascades.plan_cascades(
        swept.experiment,
        swept.experiment.instances,
        names,
        split="test",
        calibration_split="train[:500]",
        calibration_images=300,
    )
    rows, found = cascades.evaluate_cascades(swept.experiment, plan, tmp_path)
    assert list(dict.fromkeys(row.name for row in rows)) == names.split(",")
    assert {row.calibration.n for row in rows} == {300}
    assert [CascadeRow.from_record(record) for record in found.cascades] == pareto_front(rows)
    assert cascades.cascade_points(rows) == sorted(
        (row.evaluated.mean_macs, row.evaluated.top1, row.evaluated.top1_standard_error) for row in rows
    )
    table = cascades.format_table(rows, swept.rows, max(row.macs for row in swept.rows)).splitlines()
    assert len(table) == len(rows) + 2 and "p01_r0.50 (" in table[1] and "300 images" in table[-1]


@pytest.mark.parametrize("name, size", [("resnet20", 32), ("preresnet50", 224)])
def test_the_prefix_is_counted_once(name, size):
    model = create_model(name, 10)
    stages = stages_from_name("p03_r0.50+p05_r0.75+full")
    costs = cascades.stage_costs(model, stages, (size, size))
    early, middle, full = (count_macs(model, stage, size) for stage in stages)
    assert costs[0] == early and costs[1] < middle and costs[2] < full
    # The layers before a point cost what full resolution pays for them: they are the same layers at the same sizes.
    shared = full - costs[2]
    assert 0 < shared < costs[0] + costs[1]
    assert sum(cascades.stage_costs(model, (stages[0], stages[2]), (size, size))) < early + full


def test_a_pair_at_one_point_shares_all_layers_before_it():
    model, size = create_model("resnet20", 10), (32, 32)
    pair = (SDPointInstance(3, 0.5), SDPointInstance(3, 0.75))
    full, first, second = (count_macs(model, instance, size) for instance in (FULL_RESOLUTION, *pair))
    prefix = full - cascades.stage_costs(model, (pair[0], FULL_RESOLUTION), size)[1]
    assert cascades.stage_costs(model, pair, size) == (first, second - prefix)


def experiment_with(**dataset):
    config = tiny.config()
    config.dataset.update(dataset)
    return Experiment(config)


def plan(experiment, names="auto", **kwargs):
    return cascades.plan_cascades(experiment, experiment.instances, names, **{"split": "test"} | kwargs)


def test_the_validation_split_is_used_where_it_is_not_the_evaluated_one(capsys):
    assert plan(experiment_with()).calibration_split == "validation"
    assert not capsys.readouterr().out


@pytest.mark.parametrize("validation", ["test", "test[:10]", "validation+test[390:]"])
def test_training_images_take_the_place_of_a_validation_split_that_is_reported(validation, capsys):
    found = plan(experiment_with(validation_split=validation))
    assert (found.calibration_split, found.calibrated_on) == ("", "train, clean, seen in training")
    warning = capsys.readouterr().out
    assert "warning: cascades are calibrated on images that the net was trained on" in warning


def test_images_held_out_of_training_are_no_warning(capsys):
    experiment = experiment_with(train_split="train[200:]")
    assert plan(experiment, calibration_split="train[:200]").calibrated_on == "train[:200]"
    assert not capsys.readouterr().out
    assert plan(experiment, calibration_split="train[:201]").calibrated_on == "train[:201], seen in training"
    assert "--calibration-split" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names, kwargs, message",
    [
        ("auto", {"calibration_split": "test"}, "--calibration-split=test: shares images with test, on which"),
        ("auto", {"calibration_split": "test[:5]"}, "--calibration-split=test.:5.: shares images with test"),
        ("auto", {"calibration_split": "tset"}, "unknown split 'tset'"),
        ("auto", {"calibration_images": 0}, "--calibration-images=0: at least 1"),
        ("auto", {"split": "train+validation"}, "validation, and the training split, train, share images with"),
        ("p02_r0.50+full", {}, "--cascades=p02_r0.50.full: p02_r0.50 is not swept; swept are full, p01_r0.50"),
        ("full", {}, "cascade full: give at least two stages"),
        ("full+half", {}, "instance name 'half': valid are"),
        ("full+p01_r0.50", {}, "p01_r0.50 cannot go on from the prefix of full"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(names, kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan(experiment_with(), names, **kwargs)


def test_a_search_that_finds_none_says_so_and_changes_nothing(swept, tmp_path, capsys, monkeypatch):
    shutil.copytree(swept.folder / "artefact", tmp_path / "artefact")
    plan = cascades.plan_cascades(swept.experiment, [FULL_RESOLUTION, EARLY], "auto", split="test")
    monkeypatch.setattr(cascades.arithmetic, "search", lambda *_: [])
    rows, found = cascades.evaluate_cascades(swept.experiment, plan, tmp_path)
    assert rows == [] and found.cascades == ()
    assert "no cascade found: on the 200 calibration images no instance is" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"artefact", "lock"}


def test_one_instance_makes_no_cascade():
    experiment = experiment_with()
    with pytest.raises(ValueError, match="--cascades=auto: a cascade needs two instances; swept is full alone"):
        cascades.plan_cascades(experiment, [FULL_RESOLUTION], "auto", split="test")


def test_clean_training_images_are_each_used_once(swept):
    experiment = swept.experiment
    training = dataclasses.replace(plan(experiment), calibration_split="", calibration_images=450)
    with cascades._calibration_batches(experiment, training) as batches:
        found = list(batches)
    images = np.concatenate([batch["images"][batch["mask"] > 0] for batch in found])
    assert len(images) == 450 and {len(batch["images"]) for batch in found} == {200}
    source = experiment.dataset.source("train")
    known = {source[index]["image"].tobytes() for index in range(len(source))}
    assert all(image.tobytes() in known for image in images)
    assert len({image.tobytes() for image in images}) > 440  # A few digits are there twice.


def test_regrouped_rows_are_the_chosen_ones():
    rows = np.arange(12, dtype=np.int32)
    mask = (rows < 11).astype(np.float32)
    batches = [{"labels": some, "mask": used} for some, used in zip(np.split(rows, 3), np.split(mask, 3))]
    found = list(cascades.regroup(batches, rows % 2 == 1))
    assert [batch["labels"].tolist() for batch in found] == [[1, 3, 5, 7], [9, 0, 0, 0]]
    assert [batch["mask"].tolist() for batch in found] == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert [batch["labels"].tolist() for batch in cascades.regroup(batches, rows < 4)] == [[0, 1, 2, 3]]
    assert not list(cascades.regroup(batches, rows < 0))


def test_statistics_before_a_point_are_made_those_of_the_deepest_instance():
    model = tiny.net()
    modules = [*model.prefix_modules(3), "head"]
    given = {
        instance: {module: np.float32(k) for module in modules}
        for k, instance in enumerate((EARLY, LATE, FULL_RESOLUTION))
    }
    shared = cascades.share_statistics(model, given)
    assert [int(value) for value in shared[EARLY].values()] == [2, 2, 0, 0, 0]
    assert [int(value) for value in shared[LATE].values()] == [2, 2, 2, 1, 1]
    assert shared[FULL_RESOLUTION] == given[FULL_RESOLUTION]


def test_classifying_gives_the_logits_of_whole_nets_in_the_order_of_the_images(swept):
    experiment, wanted = swept.experiment, (EARLY, FULL_RESOLUTION)
    evaluator = Evaluator(
        experiment.model,
        experiment.instances,
        image_shape=experiment.image_shape,
        batch_size=experiment.evaluation_batch_size,
        preprocess=experiment.preprocess,
    )
    statistics = artefact.load(swept.folder / "artefact").batch_stats
    with experiment.evaluation_batches("test[:250]") as batches:
        found = list(evaluator.classify(swept.params, statistics, batches, wanted))
    expected, labels = logits_of(swept, "test[:250]", wanted)
    np.testing.assert_array_equal(np.concatenate([some for _, some in found]), labels)
    for instance in wanted:
        logits = np.concatenate([some[instance] for some, _ in found])
        np.testing.assert_allclose(logits, expected[instance], rtol=0, atol=1e-5 * np.abs(expected[instance]).max())


def test_the_command_evaluates_cascades(swept, tmp_path, capsys):
    config = tiny.config()
    checkpoint.save(tmp_path / "checkpoints" / "3", {"params": swept.params}, {"config": to_dict(config)})
    parser = Parser()
    evaluate.add_arguments(parser)
    flags = [f"--workdir={tmp_path}", "--cascades=p01_r0.50+full", "--calibration-images=50"]
    args = parser.parse_args(flags)
    args.config_arguments = []
    evaluate.run(args)
    shown = capsys.readouterr().out
    assert "p01_r0.50 (" in shown and "the 50 images that all was chosen on (validation)" in shown
    assert artefact.load(tmp_path / "sweep" / "artefact").cascades
