"""PyTorch's weights arrive in the right place, whole; what does not fit is named."""

import argparse
import pathlib
import pickle
import re
import sys

import commands
import jax
import numpy as np
import pytest
import tiny
import torch_formulation as formulation
from flax.traverse_util import flatten_dict

from sdpoint_jax.config import to_dict
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.interop.torch_import import (
    import_torch_state_dict,
    read_state_dict,
    rename_tensors,
    torch_tensors,
    unwrap,
)
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.storage import artefact, checkpoint

NET = "resnet20_projection_norm"
CLASSES = 10


@pytest.fixture
def model():
    return create_model(NET, CLASSES)


@pytest.fixture
def state_dict():
    return formulation.named_state_dict(formulation.net_shapes(NET, CLASSES))


@pytest.mark.parametrize("name", [*formulation.RELEASE, *formulation.SMALL])
def test_every_net_of_the_release_has_the_releases_names_and_shapes(name):
    shapes = {tensor: wanted.shape for tensor, wanted in torch_tensors(create_model(name, 10)).items()}
    released = formulation.net_shapes(name, 10)
    assert shapes == {tensor: shape for tensor, shape in released.items() if "num_batches_tracked" not in tensor}


def test_torchvisions_resnext_is_the_releases():
    assert create_model("resnext50_32x4d", 10) == create_model("resnext50", 10)


def test_timms_name_of_weights_is_that_of_the_net():
    assert create_model("resnet50.a1_in1k", 10) == create_model("resnet50", 10)


def test_every_variable_of_the_net_is_filled_with_float32(model, state_dict):
    variables = flatten_dict(import_torch_state_dict(state_dict, model))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = flatten_dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images))
    assert {path: leaf.shape for path, leaf in variables.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    assert {(type(leaf), leaf.dtype) for leaf in variables.values()} == {(np.ndarray, np.dtype("float32"))}


def test_axes_go_from_pytorchs_order_to_ours(model, state_dict):
    variables = import_torch_state_dict(state_dict, model)
    block = variables["params"]["block_04"]
    theirs, ours = state_dict["layer2.0.conv1.weight"], block["conv1"]["kernel"]
    assert ours.shape == (3, 3, 16, 32) and ours[0, 2, 5, 7] == theirs[7, 5, 0, 2]
    theirs, ours = state_dict["fc.weight"], variables["params"]["head"]["dense"]["kernel"]
    assert ours.shape == (64, 10) and ours[6, 3] == theirs[3, 6]
    np.testing.assert_array_equal(block["shortcut_norm"]["scale"], state_dict["layer2.0.downsample.1.weight"])
    statistics = variables["batch_stats"]["block_04"]["norm2"]
    np.testing.assert_array_equal(statistics["mean"], state_dict["layer2.0.bn2.running_mean"])
    np.testing.assert_array_equal(statistics["var"], state_dict["layer2.0.bn2.running_var"])


def test_all_tensors_that_do_not_fit_are_named_in_one_error(model, state_dict):
    del state_dict["layer1.0.conv1.weight"], state_dict["bn1.running_var"]
    state_dict["layer4.0.conv1.weight"] = np.zeros(3, np.float32)
    transposed = state_dict["layer2.0.conv1.weight"].transpose(1, 0, 2, 3)
    state_dict["layer2.0.conv1.weight"] = transposed
    state_dict["layer3.1.bn2.bias"][5] = np.nan
    state_dict["fc.bias"][0] = np.inf
    state_dict["bn1.bias"] = np.arange(16)
    with pytest.raises(ValueError) as error_info:
        import_torch_state_dict(state_dict, model)
    message = str(error_info.value)
    assert "\n" not in message
    faults = message.split(": ", 1)[1].split("; ")
    assert faults == [
        "missing bn1.running_var, layer1.0.conv1.weight",
        "surplus layer4.0.conv1.weight",
        "not of a float type bn1.bias",
        "wrong shape layer2.0.conv1.weight (16, 32, 3, 3), not (32, 16, 3, 3)",
        "not finite fc.bias, layer3.1.bn2.bias",
    ]


class Huge:
    """A tensor that would not fit into memory."""

    shape = (1 << 40,)

    def __array__(self, *_, **__):
        raise AssertionError("was read")


def test_tensors_of_other_shapes_and_names_are_not_read(model, state_dict):
    with pytest.raises(ValueError, match=r"surplus more; wrong shape bn1.bias \(1099511627776,\), not \(16,\)"):
        import_torch_state_dict(state_dict | {"bn1.bias": Huge(), "more": Huge()}, model)


def test_a_state_dict_of_another_net_is_refused(state_dict):
    with pytest.raises(ValueError, match=r"missing bn2.*surplus.*bn1.weight"):
        import_torch_state_dict(state_dict, create_model("preresnet20", CLASSES))


def test_num_batches_tracked_may_be_there_or_not(model, state_dict):
    without = {name: array for name, array in state_dict.items() if not name.endswith("num_batches_tracked")}
    assert len(without) < len(state_dict)
    _assert_equal(import_torch_state_dict(without, model), import_torch_state_dict(state_dict, model))


def test_the_prefix_of_data_parallel_training_is_dropped(model, state_dict):
    prefixed = {f"module.{name}": array for name, array in state_dict.items()}
    _assert_equal(import_torch_state_dict(prefixed, model), import_torch_state_dict(state_dict, model))


def test_other_float_types_become_float32(model, state_dict):
    halves = {name: array.astype(np.float16) for name, array in state_dict.items()}
    expected = {name: array.astype(np.float32) for name, array in halves.items()}
    _assert_equal(import_torch_state_dict(halves, model), import_torch_state_dict(expected, model))
    doubles = {name: array.astype(np.float64) for name, array in state_dict.items()}
    _assert_equal(import_torch_state_dict(doubles, model), import_torch_state_dict(state_dict, model))
    doubles["fc.bias"][0] = 1e300
    with pytest.raises(ValueError, match="not finite fc.bias"):
        import_torch_state_dict(doubles, model)


def test_pytorchs_own_tensors_will_do_and_are_copied(model, state_dict):
    torch = pytest.importorskip("torch")
    expected = import_torch_state_dict(state_dict, model)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state_dict.items()}
    tensors["fc.bias"].requires_grad_()
    imported = import_torch_state_dict(tensors, model)
    tensors["bn1.weight"].zero_()
    _assert_equal(imported, expected)


def test_images_may_have_another_number_of_channels(model, state_dict):
    state_dict["conv1.weight"] = state_dict["conv1.weight"][:, :1]
    assert import_torch_state_dict(state_dict, model, channels=1)["params"]["stem"]["conv"]["kernel"].shape[2] == 1
    with pytest.raises(ValueError, match=r"wrong shape conv1.weight \(16, 1, 3, 3\), not \(16, 3, 3, 3\)"):
        import_torch_state_dict(state_dict, model)


def test_another_number_of_classes_needs_a_reset_head(state_dict):
    model = create_model(NET, 4)
    with pytest.raises(
        ValueError, match=r"fc.weight \(10, 64\), not \(4, 64\).*another number of classes.*--reset-head"
    ):
        import_torch_state_dict(state_dict, model)
    variables = import_torch_state_dict(state_dict, model, reset_head=True)
    head = variables["params"]["head"]["dense"]
    assert head["kernel"].shape == (64, 4) and head["bias"].shape == (4,)
    # PyTorch's default: uniform in +-1 / sqrt(inputs).
    assert 0.9 / 8 < np.abs(head["kernel"]).max() <= 1 / 8
    rest = import_torch_state_dict(state_dict, create_model(NET, CLASSES))
    del variables["params"]["head"], rest["params"]["head"]
    _assert_equal(variables, rest)


@pytest.mark.parametrize("spoil", ["missing", "not finite"])
def test_a_reset_head_ignores_the_classifier_of_the_file(model, state_dict, spoil):
    if spoil == "missing":
        del state_dict["fc.weight"], state_dict["fc.bias"]
    else:
        state_dict["fc.weight"][:] = np.nan
    variables = import_torch_state_dict(state_dict, model, reset_head=True)
    assert np.isfinite(variables["params"]["head"]["dense"]["kernel"]).all()
    other = import_torch_state_dict(state_dict, model, reset_head=True, seed=1)
    assert (other["params"]["head"]["dense"]["kernel"] != variables["params"]["head"]["dense"]["kernel"]).any()


def test_a_safetensors_file_is_imported_as_a_checkpoint(tmp_path, capsys, model, state_dict):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(state_dict, tmp_path / "net.safetensors")
    commands.run("import", tmp_path / "net.safetensors", f"--model={NET}", f"--output={tmp_path / 'imported'}")
    assert "imported" in capsys.readouterr().out
    variables, record = checkpoint.load_newest(tmp_path / "imported")
    _assert_equal(variables, import_torch_state_dict(state_dict, model))
    assert record["model"] == {"name": NET} and record["num_classes"] == CLASSES and record["channels"] == 3
    assert record["imported_from"] == "net.safetensors" and not record["reset_head"]


@pytest.mark.parametrize("ending", [".pth.tar", ".pth", ".pt", ".th", ".bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickled_checkpoint_of_the_release_is_imported(tmp_path, model, state_dict, ending, zipped):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in state_dict.items()}
    released = {"epoch": 115, "arch": NET, "state_dict": tensors, "best_prec1": torch.tensor(79.5), "optimizer": {}}
    content = released if ending == ".pth.tar" else tensors
    torch.save(content, tmp_path / f"net{ending}", _use_new_zipfile_serialization=zipped)
    commands.run("import", tmp_path / f"net{ending}", f"--model={NET}", f"--output={tmp_path / 'imported'}")
    variables, _ = checkpoint.load(tmp_path / "imported")
    _assert_equal(variables, import_torch_state_dict(state_dict, model))


def _prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


class Loss:
    """As a training script has them."""


# What training scripts save, around the tensors of a net, and what is then passed over.
WRAPPERS = {
    "bare": (lambda net: net, []),
    "model": (lambda net: {"model": net, "optimizer": {"state": {}}, "epoch": 3}, ["optimizer (dict)", "epoch (int)"]),
    "net": (lambda net: {"net": _prefixed("module.", net), "acc": 93.1}, ["acc (float)"]),
    "model_state_dict": (lambda net: {"model_state_dict": net, "loss": np.float64(0.1)}, [r"loss \(numpy.*scalar\)"]),
    "options": (
        lambda net: {"model": net, "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x")), "loss": Loss()},
        [r"args \(argparse.Namespace\)", r"loss \(.*Loss\)"],
    ),
    "average": (lambda net: {"n_averaged": np.int64(9)} | _prefixed("module.", net), ["n_averaged"]),
    "timm": (
        lambda net: {"arch": "x", "state_dict": net, "state_dict_ema": {name: 0 * t for name, t in net.items()}},
        [r"arch \(str\)", r"state_dict_ema \(dict\)"],
    ),
    "lightning": (
        lambda net: {
            "epoch": 9,
            "pytorch-lightning_version": "2.5",
            "state_dict": _prefixed("model._orig_mod.", net)
            | {"criterion.weight": net["fc.bias"], "train_acc.total": net["fc.bias"]},
            "loops": {"fit_loop": {"state_dict": {}}},
            "hyper_parameters": argparse.Namespace(lr=0.1),
        },
        [r"epoch \(int\)", r"hyper_parameters \(argparse.Namespace\)", "criterion.weight", "train_acc.total"],
    ),
    "criterion": (lambda net: {"net": net | {"criterion.centers": net["fc.weight"]}}, ["criterion.centers"]),
    "inside": (lambda net: {"checkpoint": {"model": net, "step": 7}}, []),
    "the only one": (lambda net: {"my_favourite": net, "best": 1.0}, [r"best \(float\)"]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap, others", WRAPPERS.values(), ids=WRAPPERS)
def test_a_net_is_found_in_what_a_training_script_saved(tmp_path, state_dict, wrap, others, zipped):
    torch = pytest.importorskip("torch")
    content = wrap({name: torch.from_numpy(array) for name, array in state_dict.items()})
    if "n_averaged" in content:
        content["n_averaged"] = torch.tensor(9)
    torch.save(content, tmp_path / "net.ckpt", _use_new_zipfile_serialization=zipped)
    found, beside = read_state_dict(tmp_path / "net.ckpt")
    tensors, dropped = unwrap(found, state_dict)
    _assert_equal({name: np.asarray(tensor) for name, tensor in tensors.items()}, state_dict)
    listed = [*beside, *dropped]
    assert all(any(re.fullmatch(other, found) or other == found for found in listed) for other in others), listed


def test_several_nets_in_a_file_are_told_apart_by_their_keys(tmp_path, capsys, model, state_dict):
    torch = pytest.importorskip("torch")
    one = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    other = {name: tensor + 1 for name, tensor in one.items()}
    path, output = tmp_path / "net.pth", tmp_path / "imported"
    torch.save({"teacher": {"net": one}, "student": {"net": other}}, path)
    arguments = ["import", path, f"--model={NET}", f"--output={output}"]
    assert "net.pth: holds several state dicts; --key may be teacher.net, student.net" in commands.error_of(
        capsys, *arguments
    )
    assert "has no state dict 'x'; --key may be teacher.net, student.net" in commands.error_of(
        capsys, *arguments, "--key=x"
    )
    commands.run(*arguments, "--key=student.net")
    assert "passed over in the file: teacher (dict)" in capsys.readouterr().out
    expected = import_torch_state_dict({name: tensor.numpy() for name, tensor in other.items()}, model)
    _assert_equal(checkpoint.load(output)[0], expected)


def test_the_hint_names_the_layer_that_may_be_the_classifier(tmp_path, capsys, state_dict):
    torch = pytest.importorskip("torch")
    names = {name: name.replace("fc.", "classifier.last.") for name in state_dict}
    torch.save({names[name]: torch.from_numpy(array) for name, array in state_dict.items()}, tmp_path / "net.pth")
    arguments = ["import", tmp_path / "net.pth", f"--model={NET}", f"--output={tmp_path / 'imported'}"]
    assert "--rename=classifier.last:fc if that is the classifier" in commands.error_of(capsys, *arguments)
    commands.run(*arguments, "--rename=classifier.last:fc")


def test_the_command_resets_the_head(tmp_path, state_dict):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(state_dict, tmp_path / "net.safetensors")
    arguments = [str(tmp_path / "net.safetensors"), f"--model={NET}", f"--output={tmp_path / 'imported'}"]
    commands.run("import", *arguments, "--num-classes=3", "--reset-head")
    variables, record = checkpoint.load(tmp_path / "imported")
    assert variables["params"]["head"]["dense"]["kernel"].shape == (64, 3)
    assert record["num_classes"] == 3 and record["reset_head"]


class _Malicious:
    """Pickled, a call that makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.victim),)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_a_malicious_pickle_does_not_run(tmp_path, how):
    torch = pytest.importorskip("torch")
    path, victim = tmp_path / "net.pth.tar", tmp_path / "victim"
    content = {"state_dict": {"fc.bias": _Malicious(victim)}}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    message = "not written by torch.save" if how == "plain pickle" else r"holds no state dict, but state_dict \(dict\)"
    with pytest.raises(ValueError, match=message):
        read_state_dict(path)
    assert not victim.exists()
    if how == "plain pickle":  # It is one: unsafe loading runs it.
        pickle.loads(path.read_bytes())
        assert victim.exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("net.onnx", b"", "unknown ending; valid are .pth.tar, .pth, .pt, .th, .bin, .ckpt, .safetensors"),
        ("net.safetensors", b"damaged" * 9, "no sound safetensors file"),
        ("net.pth", b"damaged", "net.pth: damaged, or not written by torch.save"),
        ("net.pth", b"", "net.pth: damaged, or not written by torch.save"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_and_an_exit_code(tmp_path, capsys, name, content, message):
    pytest.importorskip("safetensors")
    (tmp_path / name).write_bytes(content)
    assert message in commands.error_of(
        capsys, "import", str(tmp_path / name), f"--model={NET}", f"--output={tmp_path / 'imported'}"
    )
    assert not (tmp_path / "imported").exists()


def test_wrong_arguments_are_one_line_and_an_exit_code(tmp_path, capsys, state_dict):
    safetensors = pytest.importorskip("safetensors.numpy")
    path, output = tmp_path / "net.safetensors", f"--output={tmp_path / 'imported'}"
    safetensors.save_file(state_dict, path)
    assert "nowhere.pth" in commands.error_of(capsys, "import", tmp_path / "nowhere.pth", f"--model={NET}", output)
    assert "model 'resnet51': valid are resnet5" in commands.error_of(
        capsys, "import", path, "--model=resnet51", output
    )
    assert "another number of classes" in commands.error_of(
        capsys, "import", path, f"--model={NET}", output, "--num-classes=3"
    )
    assert "required: --output" in commands.error_of(capsys, "import", path, f"--model={NET}")
    del state_dict["fc.bias"]
    safetensors.save_file(state_dict, path)
    assert "no vector fc.bias" in commands.error_of(capsys, "import", path, f"--model={NET}", output)


def test_a_file_without_a_state_dict_is_an_error(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "list.pth")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "net.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install safetensors"):
        read_state_dict(tmp_path / "net.safetensors")


def test_names_are_renamed_by_their_parts_in_the_order_given(tmp_path, state_dict):
    safetensors = pytest.importorskip("safetensors.numpy")
    others = {f"backbone.{name.replace('fc.', 'linear.')}": array for name, array in state_dict.items()}
    safetensors.save_file(others, tmp_path / "net.safetensors")
    renames = ["--rename=linear:head.fc", "--rename=backbone:", "--rename=head.fc:fc"]
    commands.run(
        "import", tmp_path / "net.safetensors", f"--model={NET}", *renames, f"--output={tmp_path / 'imported'}"
    )
    variables, record = checkpoint.load(tmp_path / "imported")
    _assert_equal(variables, import_torch_state_dict(state_dict, create_model(NET, CLASSES)))
    assert record["format"] == 2  # So that the name of the net is known to be of this version.


@pytest.mark.parametrize(
    "rename, message",
    [
        ("linear:fc", "--rename=linear:fc: no tensor has 'linear' in its name; there are conv1.weight, .*, ..."),
        ("con:conv", "--rename=con:conv: no tensor has 'con'"),
        ("fc", "--rename=fc: give OLD:NEW, as linear:fc"),
        (":fc", "--rename=:fc: give OLD:NEW, as linear:fc"),
        ("layer1:layer2", "--rename=layer1:layer2: gives two tensors the same name"),
    ],
)
def test_a_rename_that_does_not_fit_is_named(state_dict, rename, message):
    with pytest.raises(ValueError, match=message):
        rename_tensors(state_dict, [rename])


def test_a_net_without_shortcut_parameters_takes_the_names_of_the_rest():
    tensors = torch_tensors(create_model("resnet20", 10))
    assert not any("downsample" in name for name in tensors) and len(tensors) == 19 + 19 * 4 + 2


@pytest.mark.parametrize("statistics", ["imported", "reestimated"])
def test_imported_weights_can_be_evaluated_with_their_own_statistics(tmp_path, statistics):
    model = tiny.net()
    variables = tiny.variables(model)
    own = jax.tree.map(lambda x: x + np.float32(0.25), variables["batch_stats"])
    checkpoint.save(tmp_path, {"params": variables["params"], "batch_stats": own}, {"config": to_dict(tiny.config())})
    flags = [f"--workdir={tmp_path}", f"--statistics={statistics}"]
    commands.run("evaluate", *flags, *(["--instances=full"] if statistics == "reestimated" else []))
    swept = artefact.load(tmp_path / "sweep" / "artefact")
    (row,) = swept.rows
    assert row.instance == FULL_RESOLUTION
    if statistics == "reestimated":
        assert row.reestimated_from == "augmented training images" and row.reestimate_images > 0
        return
    assert row.reestimated_from == "imported with the parameters" and row.reestimate_images == 0
    _assert_equal(swept.batch_stats[FULL_RESOLUTION], own)
    experiment = Experiment(tiny.config())
    losses = []
    with experiment.evaluation_batches("test") as batches:
        for batch in batches:
            x = experiment.preprocess(batch["images"])
            logits = model.apply({"params": variables["params"], "batch_stats": own}, x, train=False)
            losses.append(np.asarray(cross_entropy(logits, batch["labels"]))[batch["mask"] > 0])
    np.testing.assert_allclose(row.loss, np.concatenate(losses).mean(), rtol=1e-4)


def _assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
