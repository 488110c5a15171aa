"""Nets of a user's own: the one that docs/your_net.md shows, by every door, and what others bring."""

import functools
import pathlib
import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import error_of, run
from flax import linen as nn

from sdpoint_jax import Predictor, SDPointNet
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.net import draws_random_numbers
from sdpoint_jax.models.registry import create_model, make_model
from sdpoint_jax.programs.evaluator import Evaluator
from sdpoint_jax.storage import artefact
from sdpoint_jax.training.objective import forward_set
from sdpoint_jax.training.step import device_keys

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "your_net.md"
CHEAP = SDPointInstance(1, 0.5)
FLAGS = {
    "model.name": "mynets:VGG",
    "model.args": "widths=(4, 8, 8)",
    "instances": "full,p01_r0.50",
    "validation_instances": "full",
    "batch_size": 40,
    "num_epochs": 0.2,
    "reestimate_batches": 2,
    "dataset.image_size": "8,8",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the page's net, trained for six steps and swept by its commands."""
    folder = tmp_path_factory.mktemp("project")
    source = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    (folder / "mynets.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        run("train", "--workdir=run", *(f"--config.{key}={value}" for key, value in FLAGS.items()))
        run("evaluate", "--workdir=run", "--model=mynets:VGG")
        yield folder
        sys.modules.pop("mynets", None)


def test_the_sweep_names_the_net_and_its_attributes(project):
    found = artefact.load("run/sweep/artefact")
    assert (found.model, found.model_args) == ("mynets:VGG", "widths=(4, 8, 8)")
    assert [row.name for row in found.rows] == ["full", "p01_r0.50"]


def test_a_predictor_computes_the_net_with_the_statistics_of_the_instance(project):
    from mynets import VGG

    model, found = VGG(num_classes=10, widths=(4, 8, 8)), artefact.load("run/sweep/artefact")
    images = tiny.batch(3)["images"]
    variables = {"params": found.params, "batch_stats": found.batch_stats[CHEAP]}
    x = (images / np.float32(255) - np.float32(found.mean)) / np.float32(found.std)
    expected = model.apply(variables, x.astype(np.float32), instance=CHEAP, train=False)
    for given in ("mynets:VGG", VGG, model):
        predictor = Predictor.load("run/sweep/artefact", "xla", model=given)
        np.testing.assert_allclose(predictor.predict(images, instance=CHEAP), expected, rtol=1e-4, atol=1e-5)


def test_the_module_of_a_net_is_not_imported_unless_it_is_allowed(project, capsys):
    message = "mynets:VGG, whose code would run: allow it with --model=mynets:VGG"
    assert message in error_of(capsys, "evaluate", "--workdir=run")
    assert message in error_of(capsys, "export", "run/sweep/artefact", "--output=exported")
    with pytest.raises(ValueError, match=message):
        Predictor.load("run/sweep/artefact")
    with pytest.raises(ValueError, match="--model=mynets:Other: the artefact names the net mynets:VGG"):
        Predictor.load("run/sweep/artefact", model="mynets:Other")
    run("select", "run/sweep/artefact", "--relative-budget=1")  # Reads the table, and runs no net.


def test_an_onnx_file_of_it_gives_its_logits(project):
    onnxruntime = pytest.importorskip("onnxruntime", exc_type=ImportError)
    run("export", "run/sweep/artefact", "--model=mynets:VGG", "--format=onnx", "--output=exported_onnx")
    images = tiny.batch(3)["images"]
    session = onnxruntime.InferenceSession("exported_onnx/p01_r0.50.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    expected = Predictor.load("run/sweep/artefact", "xla", model="mynets:VGG").predict(images, instance=CHEAP)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"model.name": "mynets:VGG", "model.dtype": "bfloat16"}, "config.model: model VGG: has no attribute 'dtype'"),
        ({"model.name": "mynets:VGG", "model.cross_device_norm": True}, "has no attribute 'axis_name'"),
        ({"model.name": "mynets:VGG", "model.args": "width=3"}, "has no attribute 'width': valid are widths"),
        ({"model.name": "mynets:VGG", "model.args": "3, 4"}, "give keyword arguments, as widths=(8, 16), depth=2"),
        ({"model.name": "mynets:VGC"}, "mynets has no subclass of sdpoint_jax.SDPointNet of this name; it has VGG"),
        ({"model.name": "nonets:VGG"}, "No module named 'nonets'; the module must be installed or in the working"),
        ({"model.name": "resnet21"}, "config.model: model 'resnet21': valid are resnet"),
        ({"model.downsampling": "average"}, "config.model.downsampling 'average': valid are avg, max, strided, blur"),
    ],
)
def test_a_net_that_cannot_be_made_is_one_line(project, capsys, flags, message):
    error = error_of(capsys, "train", "--workdir=none", *(f"--config.{key}={value}" for key, value in flags.items()))
    assert message in error and not pathlib.Path("none").exists()


class Block(nn.Module):
    """A convolution, one of several normalisations, and dropout."""

    features: int
    kind: str = "batch"
    momentum: float = 0.9
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3))(x)
        if self.kind == "batch":
            x = nn.BatchNorm(not train, momentum=self.momentum, name="any_name")(x)
        else:
            x = nn.GroupNorm(2)(x)
        return nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))


class Head(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Net(SDPointNet):
    kind: str = "batch"
    momentum: float = 0.9
    rate: float = 0.0

    def setup(self):
        self.stem = Block(4, self.kind, self.momentum, self.rate)
        self.blocks = [Block(4, self.kind, self.momentum, self.rate) for _ in range(2)]
        self.head = Head(self.num_classes)


def _evaluator(model, instances=(FULL_RESOLUTION, CHEAP)):
    return Evaluator(model, instances, image_shape=tiny.IMAGE_SHAPE, batch_size=16, preprocess=tiny.preprocess)


def test_batchnorm_of_any_momentum_is_reestimated_alike_and_without_dropout():
    params = tiny.variables(Net(num_classes=10))["params"]
    batches = [tiny.batch(16, seed) for seed in range(2)]
    found = [
        _evaluator(Net(num_classes=10, momentum=momentum, rate=rate)).reestimate(params, batches)
        for momentum, rate in ((0.9, 0.0), (0.5, 0.0), (0.5, 0.5))
    ]
    for other in found[1:]:
        chex.assert_trees_all_equal(found[0][CHEAP], other[CHEAP])
    x = tiny.preprocess(np.concatenate([batch["images"] for batch in batches]))
    stem = nn.Conv(4, (3, 3)).apply({"params": params["stem"]["Conv_0"]}, x)
    np.testing.assert_allclose(found[0][CHEAP]["stem"]["any_name"]["mean"], stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_a_net_without_batchnorm_has_nothing_to_reestimate_and_is_evaluated():
    model = Net(num_classes=10, kind="group")
    evaluator, params = _evaluator(model), tiny.variables(model)["params"]
    assert not evaluator.has_statistics
    statistics = evaluator.reestimate(params, iter(()))  # No batch is read.
    batch = tiny.batch(16) | {"mask": np.ones(16, np.float32)}
    metrics = evaluator.evaluate(params, statistics, [batch])
    assert metrics[CHEAP].count == 16 and metrics[CHEAP].loss != metrics[FULL_RESOLUTION].loss


def test_dropout_draws_by_the_key_alone_and_instances_share_the_masks_of_their_prefix():
    model = Net(num_classes=10, rate=0.5)
    params, x = tiny.variables(model)["params"], tiny.preprocess(tiny.batch(4)["images"])
    run_with = functools.partial(forward_set, model, params, x)

    def logits(seed, instances=(FULL_RESOLUTION, CHEAP)):
        return run_with(instances, {"params": jax.random.key(seed)})

    first, again, other = logits(0), logits(0), logits(1)
    np.testing.assert_array_equal(first[CHEAP], again[CHEAP])
    assert np.abs(first[CHEAP] - other[CHEAP]).max() > 0
    # An instance by itself draws what it draws beside others.
    np.testing.assert_allclose(logits(0, (CHEAP,))[CHEAP], first[CHEAP], rtol=1e-5, atol=1e-6)
    assert draws_random_numbers(model, tiny.IMAGE_SHAPE)
    assert not draws_random_numbers(model.clone(rate=0.0), tiny.IMAGE_SHAPE)


def test_keys_depend_on_the_seed_the_step_and_the_device_alone():
    keys = [device_keys(seed, step, range(4)) for seed in (-1, 0, 1) for step in (0, 1)]
    rows = np.concatenate(keys)
    assert rows.dtype == np.uint32 and len(np.unique(rows, axis=0)) == len(rows) == 24
    # A host of several has the rows of its own devices.
    np.testing.assert_array_equal(device_keys(1, 1, range(2, 4)), keys[-1][2:])


def test_a_net_itself_keeps_its_attributes():
    made = make_model(Net(num_classes=10, rate=0.25), 10, downsampling="max")
    assert (made.rate, made.downsampling) == (0.25, "max")
    with pytest.raises(ValueError, match="model Net: has 10 classes, needs 3"):
        make_model(Net(num_classes=10), 3)
    experiment = Experiment(tiny.config(**{"instances": "full,p01_r0.50"}), Net)
    assert experiment.model == Net(num_classes=10)


@pytest.mark.parametrize("operation", ["max", "strided", "blur"])
def test_the_operation_of_a_point_is_a_value(operation):
    model = create_model("wrn10_1", 10, downsampling=operation)
    variables, x = tiny.variables(model), tiny.preprocess(tiny.batch(2)["images"])
    apply = functools.partial(model.apply, variables, x, train=False)
    average = tiny.net().apply(variables, x, instance=CHEAP, train=False)
    assert np.abs(apply(instance=CHEAP) - average).max() > 1e-4
    np.testing.assert_array_equal(apply(instance=FULL_RESOLUTION), tiny.net().apply(variables, x, train=False))


def test_the_operations_of_points_are_what_their_names_say():
    from sdpoint_jax.models.downsample import downsample

    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    found = {name: downsample(jnp.asarray(x), 0.5, name)[0, :, :, 0] for name in ("avg", "max", "strided", "blur")}
    np.testing.assert_array_equal(found["avg"], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(found["max"], [[5, 7], [13, 15]])
    np.testing.assert_array_equal(found["strided"], [[0, 2], [8, 10]])
    np.testing.assert_array_equal(found["blur"], [[1.25, 3], [8.25, 10]])  # Edges are repeated.


class NoBlocks(SDPointNet):
    def setup(self):
        self.stem, self.head = Block(4), Head(self.num_classes)


class EmptyBlocks(NoBlocks):
    def setup(self):
        self.stem, self.blocks, self.head = Block(4), [], Head(self.num_classes)


class SameName(NoBlocks):
    def setup(self):
        self.stem, self.head = Block(4), Head(self.num_classes)
        self.blocks = [Block(4, name="stem")]


@pytest.mark.parametrize(
    "net, message",
    [
        (NoBlocks, "NoBlocks.setup: assigns no blocks; a net needs stem, blocks and head"),
        (EmptyBlocks, r"EmptyBlocks.setup: blocks \(\); needs a list of at least one block"),
        (SameName, "SameName.setup: two parts share a name: .*stem"),
    ],
)
def test_a_net_that_lacks_a_part_says_which(net, message):
    with pytest.raises(ValueError, match=message) as error:
        net(num_classes=3).part_names  # noqa: B018
    assert "\n" not in str(error.value)
