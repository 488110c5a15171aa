"""A cascade's programs give what the nets of its stages give whole: reusing the prefix changes nothing."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.programs.cascade import CascadePrograms, GatherKey, StageKey
from sdpoint_jax.programs.evaluator import Evaluator

ROOT = pathlib.Path(__file__).parents[2]
SIZES = (2, 4, 8)


class Case:
    """A net with statistics of one re-estimation, and its cascades' programs."""

    def __init__(self, name, image_shape, cascade):
        self.stages = tuple(map(SDPointInstance.from_name, cascade.split("+")))
        self.model, self.shape = create_model(name, 5), image_shape
        self.preprocess = functools.partial(normalize, mean=(0.3,) * image_shape[-1], std=(0.4,) * image_shape[-1])
        zeros = np.zeros((1, *image_shape), np.float32)
        init = jax.jit(lambda: self.model.init(jax.random.key(0), zeros, train=False)["params"])
        self.params = jax.device_get(init())
        kwargs = dict(image_shape=image_shape, preprocess=self.preprocess)
        evaluator = Evaluator(self.model, self.stages, batch_size=16, **kwargs)
        self.statistics = evaluator.reestimate(self.params, [{"images": self.images(16, seed=1)}])
        self.programs = CascadePrograms(self.model, **kwargs)

    def images(self, count, seed=0):
        return np.random.RandomState(seed).randint(0, 256, (count, *self.shape)).astype(np.uint8)

    @functools.cached_property
    def _whole(self):
        return {
            instance: jax.jit(functools.partial(self.model.apply, instance=instance, train=False))
            for instance in self.stages
        }

    def whole(self, images):
        """The logits of each stage, run whole by itself: [stages, B, K]."""
        x = self.preprocess(images)
        return np.stack(
            [
                self._whole[instance]({"params": self.params, "batch_stats": self.statistics[instance]}, x)
                for instance in self.stages
            ]
        )

    def run(self, images, stop_at, sizes=SIZES):
        """Runs the cascade; image i stops at the stage `stop_at[i]`."""
        return self.programs.run(self.stages, Script(stop_at), self.params, self.statistics, images, sizes)


class Script:
    """Decides by a list which images go on, one batch of the largest size after the other."""

    def __init__(self, stop_at):
        largest = SIZES[-1]
        self.batches = [stop_at[start : start + largest] for start in range(0, len(stop_at), largest)]

    def __call__(self, logits):
        stage = len(logits) - 1
        if stage == 0:
            self.running = self.batches.pop(0)
        goes_on = self.running > stage
        self.running = self.running[goes_on]
        return logits[-1], goes_on


CASES = {
    "pre-activation": ("wrn10_1", (8, 8, 1), "p01_r0.50+p02_r0.75+full"),
    "post-activation": ("resnet20", (16, 16, 1), "p01_r0.50+p01_r0.75+full"),
    "stem point": ("resnet18", (32, 32, 3), "stem_r0.50+p02_r0.50+p08_r0.50"),
}


@pytest.fixture(scope="module")
def cases():
    return functools.cache(lambda name: Case(*CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_stage_at_which_an_image_stops_run_whole(cases, name):
    case = cases(name)
    images, stop_at = case.images(19), np.random.RandomState(2).randint(0, 3, 19)
    answers, reached = case.run(images, stop_at)
    np.testing.assert_array_equal(reached, stop_at)
    whole = case.whole(images)
    np.testing.assert_allclose(answers, whole[stop_at, np.arange(19)], rtol=0, atol=1e-5 * np.abs(whole).max())
    apart = np.abs(np.diff(whole, axis=0)).max((1, 2))
    assert (apart > 1e-2).all()  # The stages can be told from each other.


@pytest.mark.parametrize("stop_at", [[0] * 8, [2] * 8, [0, 2, 0, 0, 0, 0, 0, 0], [1] * 5, [2, 1, 1, 2, 2], [1], []])
def test_any_images_may_go_on(cases, stop_at):
    case, stop_at = cases("pre-activation"), np.array(stop_at, int)
    images = case.images(len(stop_at), seed=3)
    answers, reached = case.run(images, stop_at)
    np.testing.assert_array_equal(reached, stop_at)
    assert answers.shape == (len(stop_at), 5)
    if len(images):
        expected = case.whole(images)[stop_at, np.arange(len(images))]
        np.testing.assert_allclose(answers, expected, rtol=1e-5, atol=1e-5)


def test_those_that_go_on_run_in_the_smallest_batch_that_holds_them(cases, monkeypatch):
    case = cases("pre-activation")
    ran = []
    run_stage = case.programs._run_stage
    monkeypatch.setattr(case.programs, "_run_stage", lambda *args: ran.append(len(args[-1])) or run_stage(*args))
    case.run(case.images(7), np.array([0, 1, 2, 0, 0, 1, 0]))
    assert ran == [8, 4, 2]
    ran.clear()
    case.run(case.images(7), np.zeros(7, int))
    assert ran == [8]  # Nobody goes on: no other stage runs.


def test_after_compile_nothing_else_is_compiled():
    case = Case(*CASES["pre-activation"])
    first, middle, last = case.stages
    pair = (first, last)
    compiled = dict(case.programs.compile([case.stages, pair], SIZES))
    starts = [(None, first, True), (1, middle, True), (2, last, False), (1, last, False)]
    assert (
        set(compiled)
        == set(case.programs)
        == {
            *(StageKey(start, instance, size, keeps) for start, instance, keeps in starts for size in SIZES),
            *(GatherKey(point, *sizes) for point in (1, 2) for sizes in ((8, 4), (8, 2), (4, 2))),
        }
    )
    for count in range(1, 17):
        case.run(case.images(count), np.random.RandomState(count).randint(0, 3, count))
    assert len(case.programs) == len(compiled) and StageKey(None, first, 2, True) in case.programs


def test_stages_out_of_order_and_batch_sizes_that_are_none_are_refused(cases):
    programs, early, late = cases("pre-activation").programs, SDPointInstance(1, 0.5), SDPointInstance(2, 0.5)
    with pytest.raises(ValueError, match="stage p01_r0.50: cannot go on from the prefix of p02_r0.50"):
        programs.keys((late, early), SIZES)
    with pytest.raises(ValueError, match="p07_r0.50: the net has no point 7"):
        programs.keys((late, SDPointInstance(7, 0.5)), SIZES)
    with pytest.raises(ValueError, match=r"batch_sizes \[0, 4\]: give at least one, each at least 1"):
        programs.keys((early, FULL_RESOLUTION), (4, 0))


SECOND_START = """
import functools, json, jax, numpy as np
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.programs.cascade import CascadePrograms
from sdpoint_jax.programs.devices import compiler_options
model, device = create_model("wrn10_1", 5), jax.devices()[3]
variables = jax.device_put(model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)), train=False), device)
compiler_options()
lowered = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: lowered.append(event) if event.startswith("/jax/core/compile/jaxpr_to_mlir") else None
)
preprocess = functools.partial(normalize, mean=(0.3,), std=(0.4,))
programs = CascadePrograms(model, image_shape=(8, 8, 1), preprocess=preprocess, device=device)
stages = (SDPointInstance(1, 0.5), FULL_RESOLUTION)
decide = lambda logits: (logits[-1], np.arange(len(logits[-1])) < 1)
statistics = dict.fromkeys(stages, variables["batch_stats"])
images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1)
answers, reached = programs.run(stages, decide, variables["params"], statistics, images, [1, 4])
print(json.dumps([len(lowered), answers.tolist(), reached.tolist()]))
"""


def test_a_second_start_on_another_of_several_devices_compiles_nothing(tmp_path):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SECOND_START]
    first, second = (
        json.loads(subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True).stdout)
        for _ in range(2)
    )
    assert first[0] == 3 and second == [0, *first[1:]]  # Two stages and the gathering.
    assert first[2] == [1, 0, 0, 0]
