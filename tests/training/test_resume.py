"""A run is resumed on what it began on: the same config, classes, images and parameters, wherever they lie."""

import os
import shutil

import pytest
import tiny
from folders import make_folder

from sdpoint_jax.experiment import compare_classes
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.training import restore
from sdpoint_jax.training.plan import Plan


def config_of(folder, **values):
    config = tiny.config(
        batch_size=24, evaluation_batch_size=24, instances="full", validation_instances="full", **values
    )
    config.dataset.update({"name": f"folder:{folder}", "mean": (0.5,) * 3, "std": (0.3,) * 3})
    return config


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder of images, and the workdir of a run on it that was stopped after 3 steps."""
    root = tmp_path_factory.mktemp("begun")
    plan = Plan(config_of(make_folder(root / "images")))
    run = restore.create(plan, None)
    run.step = 3
    checkpoint.save(root / "run/checkpoints/3", *run.to_record(plan))
    return root


@pytest.fixture
def images(begun, tmp_path):
    """A copy of the images, to change."""
    return shutil.copytree(begun / "images", tmp_path / "images")


def resume(begun, folder, **values):
    return restore.restore(Plan(config_of(folder, **values)), begun / "run")


def rename(images, old, new):
    for split in ("train", "test"):
        (images / split / old).rename(images / split / new)


def test_another_path_to_the_same_images_resumes(begun, images, monkeypatch, tmp_path):
    assert resume(begun, images).step == 3
    monkeypatch.chdir(tmp_path)
    assert resume(begun, "./images/").step == 3
    os.symlink(images, tmp_path / "link")
    assert resume(begun, "link").step == 3


def test_a_relative_path_is_recorded_as_an_absolute_one(images, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan = Plan(config_of("images"))
    assert plan.config.dataset.name == f"folder:{images}"


def test_a_renamed_class_is_refused(begun, images):
    rename(images, "cat", "zebra")
    message = "checkpoints/3: trained on other classes than those of folder:.*: without cat; new zebra$"
    with pytest.raises(ValueError, match=message):
        resume(begun, images)


def test_an_added_class_is_refused(begun, images):
    make_folder(images, classes=["ant"])
    with pytest.raises(ValueError, match="trained on other classes .*: new ant$"):
        resume(begun, images)


def test_classes_in_another_order_are_told():
    assert compare_classes(["b", "a"], ["a", "b"]) == "the same in another order, class 0 is a, was b"


def test_added_images_are_refused_unless_asked_for(begun, images, capsys):
    make_folder(images, per_class=14)
    message = (
        r"the images have changed since .*checkpoints/3 \(training images: 36 then, 42 now; validation images: 36 "
    )
    with pytest.raises(ValueError, match=message + ".*--config.dataset.on_changed_images=continue"):
        resume(begun, images)
    assert resume(begun, images, **{"dataset": {"on_changed_images": "continue"}}).step == 3
    assert "training images: 36 then, 42 now" in capsys.readouterr().out


def test_replaced_images_are_refused(begun, images):
    shutil.copy(images / "train/cat/000.png", images / "train/dog/000.png")
    (images / "train/cat/001.png").write_bytes((images / "train/cat/001.png").read_bytes() + b"\0")
    with pytest.raises(ValueError, match="training images: 36 then and now, but others"):
        resume(begun, images)


def test_what_changes_no_result_binds_no_run(begun, images):
    changed = {"test_split": "train", "on_bad_image": "skip", "num_threads": 1, "validation_split": "test[:100%]"}
    assert resume(begun, images, dataset=changed, on_nonfinite="skip", log_every_steps=7).step == 3


def test_more_epochs_say_how_to_train_on(begun, images):
    message = f"num_epochs: 1.0, 2.0; .*another --workdir and --config.init_from={begun}/run$"
    with pytest.raises(ValueError, match=message):
        resume(begun, images, num_epochs=2.0)


def test_parameters_to_start_from_may_have_moved_but_not_changed(begun, images, tmp_path):
    config = config_of(images, init_from=str(begun / "run"))
    plan = Plan(config)
    initial = restore.load_initial(plan.experiment, plan.shapes_of_state())
    run = restore.create(plan, initial)
    checkpoint.save(tmp_path / "run/checkpoints/0", *run.to_record(plan))
    shutil.copytree(begun / "run", tmp_path / "moved")
    config.init_from = str(tmp_path / "moved")
    assert restore.restore(Plan(config), tmp_path / "run").initial == initial.checksum
    arrays, record = checkpoint.load_newest(begun / "run")
    arrays["params"]["head"]["dense"]["bias"][0] += 1
    checkpoint.save(tmp_path / "other", arrays, record)
    config.init_from = str(tmp_path / "other")
    with pytest.raises(ValueError, match="init_from: .*other', whose parameters are others"):
        restore.restore(Plan(config), tmp_path / "run")


@pytest.fixture
def others(tmp_path):
    """Images of other classes, as many."""
    return make_folder(tmp_path / "others", classes=("ant", "bee", "cow"))


def test_parameters_of_other_classes_need_a_new_classifier(begun, others):
    config = config_of(others, init_from=str(begun / "run"))
    plan = Plan(config)
    message = "config.init_from .*run: trained on other classes .*: without cat, dog, fox; new ant, bee, cow; "
    with pytest.raises(ValueError, match=message + "config.reset_head=True"):
        restore.load_initial(plan.experiment, plan.shapes_of_state())
    plan = Plan(config_of(others, init_from=str(begun / "run"), reset_head=True))
    initial = restore.load_initial(plan.experiment, plan.shapes_of_state())
    assert restore.create(plan, initial).train.params["head"]["dense"]["kernel"].shape[-1] == 3


def test_a_teacher_of_other_classes_is_refused(begun, others):
    with pytest.raises(ValueError, match="config.teacher .*run: trained on other classes"):
        Plan(config_of(others, teacher=str(begun / "run"), distillation=0.5))


def test_parameters_of_another_net_say_which_it_is(begun, images):
    config = config_of(images, init_from=str(begun / "run"))
    config.model.name = "wrn16_1"
    plan = Plan(config)
    with pytest.raises(ValueError, match="it is of a wrn10_1: config.model.name=wrn10_1"):
        restore.load_initial(plan.experiment, plan.shapes_of_state())


def test_a_run_of_an_earlier_version_is_known_by_its_paths(begun, images, tmp_path, monkeypatch):
    _, arrays, record = checkpoint.newest(begun / "run/checkpoints")
    old = {key: value for key, value in record.items() if key not in ("images", "initial", "teacher")}
    for key, value in {"name": "folder:images", "validation_split": "test", "test_split": "test"}.items():
        old["config"]["dataset"][key] = value
    checkpoint.save(tmp_path / "run/checkpoints/3", arrays, old)
    monkeypatch.chdir(tmp_path)
    assert restore.restore(Plan(config_of(images)), tmp_path / "run").step == 3
    with pytest.raises(ValueError, match="another config .there, here.: dataset.name: 'folder:.*/images', 'folder:"):
        restore.restore(Plan(config_of(begun / "images")), tmp_path / "run")
