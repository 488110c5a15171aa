"""Programs on disk are found again by what they compute, and by nothing less."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.resnet import ResNet
from sdpoint_jax.programs import cache as program_cache
from sdpoint_jax.training import step as steps

pytestmark = pytest.mark.xdist_group("cache")  # One worker makes the first run, once.
ROOT = pathlib.Path(__file__).parents[2]

# One step of one instance; prints how many programs JAX lowered, and a sum over all results.
STEP = """
import functools, json, sys, jax, numpy as np
from sdpoint_jax.programs import devices, evaluator as evaluation
from sdpoint_jax.training import step as steps
from sdpoint_jax.training.optimizer import SGD, LearningRate
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.resnet import ResNet

model = ResNet(architecture=Architecture((1,), 4, 4, preactivation=True, stem=4, imagenet_stem=False), num_classes=10)
preprocess = functools.partial(normalize, mean=(0.5,), std=(0.25,))
shape, rng = (8, 8, 1), np.random.default_rng(0)
images = rng.integers(0, 256, (4, *shape), np.uint8)
batch = devices.shard({"images": images, "labels": np.arange(4, dtype=np.int32)})
optimizer, instance = SGD(0.9, False, 0.0), SDPointInstance(1, float(sys.argv[1]))
state = steps.create_state(model, optimizer, 0, shape)
params, _ = devices.replicate(state.params), devices.compiler_options()
lowered = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: lowered.append(event) if event.startswith("/jax/core/compile/jaxpr_to_mlir") else None
)
programs = steps.TrainPrograms(
    state, batch, model=model, optimizer=optimizer, schedule=LearningRate(0.1, 10), preprocess=preprocess
)
state, metrics = programs[instance](devices.replicate(state), steps.Control(0).shard(), batch)
evaluator = evaluation.Evaluator(model, [instance], image_shape=shape, batch_size=4, preprocess=preprocess)
statistics = evaluator.reestimate(jax.device_get(state.params), [{"images": images}])
total = float(sum(np.abs(x).astype(np.float64).sum() for x in jax.tree.leaves((jax.device_get(state), statistics))))
print(json.dumps([len(lowered), total]))
"""


def run(cache, ratio=0.5, root=ROOT, **environment):
    command = [sys.executable, "-c", STEP, str(ratio)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": ""}
        | environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    lowered, total = json.loads(done.stdout.splitlines()[-1])
    return lowered, total, done.stderr


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A cache folder after a first run, and what that run found."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, run(cache)


def kept(cache):
    return sorted((cache / "sdpoint_jax").glob("*"))


def test_the_next_start_loads_the_same_programs_and_traces_nothing(first):
    cache, (lowered, total, errors) = first
    assert lowered == 5 and len(kept(cache)) == 5 and not errors  # Gradients, update, and three parts.
    assert run(cache) == (0, total, "")


def test_of_another_instance_only_what_is_its_own_is_compiled(first, tmp_path):
    shutil.copytree(first[0], tmp_path, dirs_exist_ok=True)
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}  # For JAX's own; ours are kept however quick.
    lowered, _, _ = run(tmp_path, ratio=0.75, **quick)
    assert lowered == 2  # Its gradients and its suffix; the prefix is that of the first.
    assert len(kept(tmp_path)) == len(kept(first[0])) + 2


def test_other_sources_are_other_programs(first, tmp_path):
    shutil.copytree(first[0], tmp_path / "cache")
    shutil.copytree(ROOT / "sdpoint_jax", tmp_path / "sdpoint_jax")
    with (tmp_path / "sdpoint_jax" / "instance.py").open("a") as file:
        file.write("# The same, but who knows?\n")
    assert run(tmp_path / "cache", root=tmp_path) == first[1]


def test_what_jax_had_is_not_kept(first, tmp_path):
    cache, (_, total, _) = first
    (cache / "sdpoint_jax").rename(tmp_path / "aside")
    assert run(cache) == (5, total, "")
    assert not kept(cache)
    (tmp_path / "aside").rename(cache / "sdpoint_jax")


def test_a_damaged_program_is_compiled_anew(first, tmp_path):
    shutil.copytree(first[0] / "sdpoint_jax", tmp_path / "sdpoint_jax")
    sound = {path: path.read_bytes() for path in kept(tmp_path)}
    for path, content in sound.items():
        path.write_bytes(content[: len(content) // 2])
    lowered, total, errors = run(tmp_path)
    assert (lowered, total) == first[1][:2]
    assert "compiled anew" in errors and str(tmp_path) in errors
    assert all(path.stat().st_size > len(sound[path]) / 2 for path in sound)
    assert run(tmp_path) == (0, total, "")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A function that fetches a program from a cache in `tmp_path`, and returns whether it was compiled."""
    path, images = tmp_path / "sdpoint_jax" / "abc", jnp.ones(3)
    monkeypatch.setattr(program_cache, "_path", lambda _: path)
    program_cache._warn_once.cache_clear()

    def fetch():
        compiled = []

        def compile_it():
            unique = float(time.time_ns() % 10**9)  # So that JAX's cache lacks it.
            compiled.append(jax.jit(lambda x: x * unique).lower(images).compile())
            return compiled[0]

        assert program_cache.fetch("what", compile_it, jax.devices()[:1])(images).shape == (3,)
        return bool(compiled)

    fetch.path = path
    return fetch


def test_kept_programs_belong_to_the_user_alone_whatever_the_umask(cached):
    before = os.umask(0)
    try:
        assert cached() and not cached()
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (cached.path, cached.path.parent)]
    assert [f"{mode:o}" for mode in modes] == ["600", "700"]


@pytest.mark.parametrize("mode", [0o660, 0o602])
@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_program_that_others_may_write_is_not_loaded(cached, which, mode):
    cached()
    path = cached.path if which == "file" else cached.path.parent
    path.chmod(mode | (0o100 if which == "folder" else 0))
    before = cached.path.stat()
    with pytest.warns(
        UserWarning, match=f"^{path}: others may write to it .mode {path.stat().st_mode & 0o777:o}; "
    ) as found:
        assert cached()
    assert len(found) == 1 and cached()  # Said once.
    assert cached.path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_program_of_another_user_is_not_loaded_and_stays(cached, which):
    cached()
    path = cached.path if which == "file" else cached.path.parent
    os.chown(path, 65534, -1)
    cached.path.parent.chmod(0o1777)  # Anybody may add files, nobody may replace those of others.
    content = cached.path.read_bytes()
    with pytest.warns(UserWarning, match=rf"^{path}: belongs to \w+ \(?65534.*, not to root .0."):
        assert cached()
    assert cached.path.read_bytes() == content


def test_neither_a_link_nor_an_altered_file_is_loaded(cached):
    cached()
    other = cached.path.with_name("other")
    cached.path.rename(other)
    cached.path.symlink_to(other)
    assert cached() and not cached.path.is_symlink()
    cached.path.write_bytes(b"y" + cached.path.read_bytes()[1:])
    with pytest.warns(UserWarning, match=f"^{cached.path}: not usable.*: its checksum does not match"):
        assert cached()


def test_a_program_under_the_name_of_another_one_is_not_loaded(cached, monkeypatch):
    cached()
    other = cached.path.with_name("other")
    cached.path.rename(other)
    monkeypatch.setattr(program_cache, "_path", lambda _: other)
    with pytest.warns(UserWarning, match=f"^{other}: not usable.*: its checksum does not match"):
        assert cached()


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_cache(first, tmp_path):
    (tmp_path / "sdpoint_jax").write_text("in the way")
    lowered, total, errors = run(tmp_path)
    assert (lowered, total) == first[1][:2]
    assert errors.count("cannot be kept") == 1 and str(tmp_path) in errors  # Once, not for each program.


def test_without_jaxs_cache_there_is_none(first, tmp_path):
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[1] == first[1][1]
    assert not list(tmp_path.iterdir())


def gradient(instance=FULL_RESOLUTION, model="resnet20", mean=0.5, smoothing=0.0, **kwargs):
    return functools.partial(
        steps.gradient_step,
        instances=(instance,),
        model=create_model(model, 10, **kwargs),
        preprocess=functools.partial(normalize, mean=(mean,), std=(1.0,)),
        label_smoothing=smoothing,
    )


def test_all_that_differs_is_described():
    shapes = [jax.ShapeDtypeStruct((2,), dtype) for dtype in (np.float32, np.int32, jnp.bfloat16)]
    different = [
        gradient(),
        *(gradient(instance) for instance in create_model("resnet20", 10).instances()[1:]),
        gradient(model="preresnet20"),
        gradient(mean=0.25),
        gradient(smoothing=0.1),
        gradient(dtype="bfloat16"),
        gradient(axis_name="devices"),
        gradient(remat=True),
        gradient(downsampling="max"),
        *shapes,
        *((gradient(), shape) for shape in shapes),
        {"a": 1},
        {"b": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        ("a", 1),
        (("a",), 1),
        None,
        "None",
    ]
    assert len({program_cache.describe(what) for what in different}) == len(different)
    assert program_cache.describe(gradient()) == program_cache.describe(gradient())
    assert program_cache.describe(SDPointInstance(1, 0.5)) != program_cache.describe(SDPointInstance(2, 0.5))


def test_settings_of_jax_are_part_of_the_name():
    path = program_cache._path(gradient())
    with jax.default_matmul_precision("highest"):
        assert program_cache._path(gradient()) != path
    assert program_cache._path(gradient()) == path is not None


class OtherNet(ResNet):
    """Of the same fields as ours."""


NOT_COVERED = {
    "function of another package": gradient,
    "lambda": lambda x: x,
    "partial of another package": functools.partial(normalize, mean=gradient),
    "net of another package": OtherNet(architecture=create_model("resnet20", 10).architecture, num_classes=10),
    "class of another package": OtherNet,
    "class": ResNet,
    "NumPy array": np.ones(2),
    "JAX array": jnp.ones(2),
    "object": object(),
    "set": {1, 2},
    "optimizer, a tuple of functions inside others": optax.sgd(0.1),
}


@pytest.mark.parametrize("code", NOT_COVERED.values(), ids=NOT_COVERED)
def test_what_the_digest_does_not_cover_is_not_described(code):
    with pytest.raises(TypeError, match="no description"):
        program_cache.describe({"part": (code,)})
