"""The project's programs on random images, to be timed: training steps and inference of any SDPoint instance.

Their peers are in `torch_reference`.
"""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

# Room for PyTorch beside JAX on an accelerator.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from common import report

from sdpoint_jax.config import FORMAT
from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.profiling.macs import count_cost
from sdpoint_jax.programs.devices import replicate, shard
from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.storage.artefact import Artefact, InstanceRow, SweepSettings
from sdpoint_jax.training.optimizer import SGD, LearningRate
from sdpoint_jax.training.step import Control, TrainPrograms, create_state

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
preprocess = functools.partial(normalize, mean=MEAN, std=STD)
OPTIMIZER, SCHEDULE = SGD(0.9, False, 1e-4), LearningRate(1e-3, total_steps=10**9)


class Setting(NamedTuple):
    """A net and the size of its images and batches; in a flag, as `preresnet50:224:16`."""

    name: str
    image_size: int
    batch_size: int

    @classmethod
    def parse(cls, text: str) -> "Setting":
        name, image_size, batch_size = text.split(":")
        return cls(name, int(image_size), int(batch_size))

    @classmethod
    def parse_list(cls, text: str) -> list["Setting"]:
        return [cls.parse(part) for part in text.split(",")]

    def __str__(self):
        return ":".join(map(str, self))

    @property
    def num_classes(self) -> int:
        return 1000 if self.image_size >= 64 else 10

    def model(self, dtype: str = "float32"):
        return create_model(self.name, self.num_classes, dtype=dtype)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, 3)


def random_batch(setting: Setting, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws uint8 images and int32 labels."""
    rng = np.random.default_rng(seed)
    shape = (setting.batch_size, setting.image_size, setting.image_size, 3)
    labels = rng.integers(0, setting.num_classes, setting.batch_size)
    return {"images": rng.integers(0, 256, shape, np.uint8), "labels": labels.astype(np.int32)}


def sample_instances(model) -> tuple[SDPointInstance, ...]:
    """Picks full resolution, an instance at the middle of the net and the earliest one, both at half the side."""
    early = STEM if model.has_stem_point else 1
    return FULL_RESOLUTION, SDPointInstance((model.num_blocks + 1) // 2, 0.5), SDPointInstance(early, 0.5)


class Workload:
    """What can be timed: `step(instance)` starts a step, `wait()` returns when all have ended."""

    def seconds_per_step(self, instances: Sequence[SDPointInstance], clock: str = "wall") -> float:
        """Measures the mean time of steps of `instances`, one after the other, started as fast as they can be."""
        now = report.CLOCKS[clock]
        self.wait()
        start = now()
        for instance in instances:
            self.step(instance)
        self.wait()
        return (now() - start) / len(instances)


class Training(Workload):
    """Training steps as the loop runs them, on one batch that is on the devices already."""

    def __init__(self, setting: Setting, dtype: str = "float32"):
        model = setting.model(dtype)
        state = create_state(model, OPTIMIZER, 0, setting.image_shape)
        self._batch, self._state, self._number = shard(random_batch(setting)), replicate(state), 0
        self.programs = TrainPrograms(
            state, self._batch, model=model, optimizer=OPTIMIZER, schedule=SCHEDULE, preprocess=preprocess
        )

    def step(self, instance: SDPointInstance) -> None:
        self._state, _ = self.programs[instance](self._state, Control(self._number).shard(), self._batch)
        self._number += 1

    def wait(self) -> None:
        jax.block_until_ready(self._state)


class Inference(Workload):
    """Logits of one batch of uint8 images, by the programs of a `Predictor` with drawn parameters."""

    def __init__(self, setting: Setting, dtype: str = "float32"):
        self.predictor = Predictor(drawn_artefact(setting, dtype))
        self._batch_size, self._images = setting.batch_size, jax.device_put(random_batch(setting)["images"])
        self._logits = None

    def step(self, instance: SDPointInstance) -> None:
        self._logits = self.predictor.program(instance, self._batch_size)(self._images)

    def wait(self) -> None:
        jax.block_until_ready(self._logits)


def drawn_artefact(setting: Setting, dtype: str = "float32") -> Artefact:
    """Makes an artefact of all instances whose parameters are drawn and whose accuracies are made up."""
    model = setting.model(dtype)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = jax.device_get(init(jax.random.key(0), np.zeros((1, *setting.image_shape), np.float32)))
    costs = {instance: count_cost(model, instance, setting.image_size) for instance in model.instances()}
    rows = [
        InstanceRow(instance, cost.macs, cost.params, 0.5, 0.5, 1.0, 1, "no images", 0)
        for instance, cost in costs.items()
    ]
    return Artefact(
        variables["params"],
        dict.fromkeys(costs, variables["batch_stats"]),
        tuple(rows),
        setting.name,
        dtype,
        tuple(map(str, range(setting.num_classes))),
        setting.image_shape,
        None,
        MEAN,
        STD,
        {"format": FORMAT},
        SweepSettings(setting.name, "drawn", "none", 0, "clean"),
    )
