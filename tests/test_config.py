import json

import pytest
import tiny
from ml_collections import ConfigDict

from sdpoint_jax import config as configs


def test_a_config_survives_json():
    config = tiny.config(ratios=(0.5,), milestones=(40, 75))
    restored = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    assert restored == config and restored.ratios == (0.5,)


def test_a_config_is_locked():
    with pytest.raises(AttributeError):
        configs.default_config().learning_rat = 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "linear"}, "config.schedule 'linear': valid are cosine, step"),
        ({"reestimate_images": "test"}, "'test': valid are augmented, clean"),
        ({"model": {"norm_parameters": "own"}}, "config.model.norm_parameters 'own': valid are shared, per_instance"),
        ({"num_epochs": 0.0}, "config.num_epochs 0.0: must be positive"),
        ({"batch_size": 0}, "config.batch_size 0: at least 1"),
        ({"learning_rate": float("nan")}, "config.learning_rate nan: must be positive"),
        ({"label_smoothing": 1.0}, "config.label_smoothing 1.0: at least 0, less than 1"),
        ({"dataset": {"image_size": (32,)}}, "config.dataset.image_size .32,.: a height and a width"),
    ],
)
def test_values_no_experiment_can_have_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        configs.check_config(tiny.config(**values))


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(ValueError, match="config key 'learning_rat': nearest are learning_rate"):
        configs.check_config(ConfigDict(configs.default_config().to_dict() | {"learning_rat": 1}))
    with pytest.raises(ValueError, match="config has no batch_size"):
        configs.check_config(ConfigDict({k: v for k, v in configs.default_config().items() if k != "batch_size"}))
    with pytest.raises(ValueError, match="config key 'model.depth'"):
        configs.from_dict({"model": {"depth": 3}})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("dataset.image_size", "224,192", (224, 192)),
        ("dataset.image_size", "(224,192)", (224, 192)),
        ("dataset.image_size", "224x192", (224, 192)),
        ("ratios", "0.5", (0.5,)),
        ("ratios", "[0.5,]", (0.5,)),
        ("points", "", ()),
        ("points", "()", ()),
        ("milestones", "30, 60.5", (30.0, 60.5)),
        ("batch_size", "0x10", 16),
        ("nesterov", "TRUE", True),
        ("model.remat", "0", False),
        ("num_epochs", "1e1", 10.0),
        ("dataset.name", "folder:/a b,c", "folder:/a b,c"),
    ],
)
def test_values_are_read_from_text_as_the_type_of_their_key(key, text, value):
    assert configs.parse_value(key, text) == value


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("dataset.image_size", "8.5,8", "must be whole numbers with commas between"),
        ("points", "1.5", "must be whole numbers with commas between"),
        ("ratios", "abc", "must be numbers with commas between"),
        ("betas", "0.9,,0.9", "must be numbers with commas between"),
        ("seed", "1.0", "must be a whole number"),
        ("learning_rate", "0,1", "must be a number"),
        ("nesterov", "None", "must be true or false"),
    ],
)
def test_text_of_another_type_is_an_error_that_names_key_and_text(key, text, message):
    with pytest.raises(ValueError, match=f"^config.{key} {text}: {message}$"):
        configs.parse_value(key, text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": (1.5,)}, r"config.points \(1.5,\): 1.5 is not among whole numbers"),
        ({"ratios": ("a",)}, r"config.ratios \('a',\): 'a' is not among finite numbers"),
        ({"betas": (0.9, float("nan"))}, "config.betas .*: nan is not among finite numbers"),
        ({"dataset": {"mean": (float("inf"),)}}, "config.dataset.mean .*: inf is not among finite numbers"),
        ({"dataset": {"image_size": (True, 8)}}, "config.dataset.image_size .*: True is not among whole numbers"),
        ({"milestones": (-1.0,)}, "config.milestones .*: at least 0"),
        ({"decay": float("nan")}, "config.decay nan: at least 0"),
    ],
)
def test_the_elements_of_tuples_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        configs.check_config(tiny.config(**values))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learningrate", "learning_rate"), ("nme", "dataset.name"), ("model.nam", "model.name"), ("epochs", "num_epochs")]
    + [("dataset.test_spilt", "dataset.test_split"), ("model.name.x", "model.name"), ("weigth_decay", "weight_decay")]
    + [("lr", "learning_rate"), ("xyzzy", "no key is near")],
)
def test_the_nearest_keys_are_named_and_not_all_of_them(key, nearest):
    message = str(configs.unknown_key(key))
    assert nearest in message and len(message) < 200


def test_a_group_of_keys_lists_what_is_in_it():
    assert "'model': a group of keys; valid are model.args, " in str(configs.unknown_key("model"))


def test_what_does_not_change_a_run_is_no_difference():
    config = tiny.config()
    assert configs.differences(config, tiny.config(keep_checkpoints=9, compile_workers=3)) == []
    assert configs.differences(config, tiny.config(seed=5)) == ["seed: 0, 5"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("resnet20", "resnet20_projection_norm"), ("preresnet164", "preresnet164_projection_norm")]
    + [("wrn28_10", "wrn28_10_projection_norm"), ("resnet50", "resnet50"), ("resnext29_8x64d", "resnext29_8x64d")],
)
def test_a_net_of_a_config_without_a_format_is_what_its_name_meant_then(old, new):
    values = configs.to_dict(configs.default_config())
    del values["format"]  # As the version before wrote it.
    values["model"]["name"] = old
    assert configs.from_dict(values).model.name == new
    assert configs.from_dict(values | {"format": 2}).model.name == old
    assert configs.from_dict(configs.to_dict(configs.from_dict(values))).model.name == new
    assert values["model"]["name"] == old


@pytest.mark.parametrize("found", [0, 3, "2"])
def test_a_config_of_another_format_is_refused(found):
    with pytest.raises(ValueError, match=f"config of format {found!r}: this version reads 1 to 2"):
        configs.from_dict(configs.to_dict(configs.default_config()) | {"format": found})
