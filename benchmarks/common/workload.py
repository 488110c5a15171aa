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

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance  # noqa: E402
from sdpoint_jax.models.registry import create_model  # noqa: E402
from sdpoint_jax.programs.devices import compiler_options, replicate, shard  # noqa: E402
from sdpoint_jax.training import step as steps  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
preprocess = functools.partial(steps.normalize, mean=MEAN, std=STD)


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


def random_batch(setting: Setting, seed: int = 0) -> dict[str, np.ndarray]:
    """uint8 images and int32 labels."""
    rng = np.random.default_rng(seed)
    shape = (setting.batch_size, setting.image_size, setting.image_size, 3)
    labels = rng.integers(0, setting.num_classes, setting.batch_size)
    return {"images": rng.integers(0, 256, shape, np.uint8), "labels": labels.astype(np.int32)}


def sample_instances(model) -> tuple[SDPointInstance, ...]:
    """Full resolution, an instance at the middle of the net and the earliest one, both at half the side."""
    early = STEM if model.has_stem_point else 1
    return FULL_RESOLUTION, SDPointInstance((model.num_blocks + 1) // 2, 0.5), SDPointInstance(early, 0.5)


class Workload:
    """What can be timed: `step(instance)` starts a step, `wait()` returns when all have ended."""

    def seconds_per_step(self, instances: Sequence[SDPointInstance], clock: str = "wall") -> float:
        """Mean time of steps of `instances`, one after the other, started as fast as they can be."""
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
        optimizer = steps.sgd(0.9, False, 1e-4)
        state = steps.create_state(model, optimizer, 0, (setting.image_size, setting.image_size, 3))
        self._batch, self._state, self._number = shard(random_batch(setting)), replicate(state), 0
        self.programs = steps.TrainPrograms(
            state,
            self._control(),
            self._batch,
            model=model,
            optimizer=optimizer,
            schedule=lambda step: 1e-3,
            preprocess=preprocess,
        )

    def step(self, instance: SDPointInstance) -> None:
        self._state, _ = self.programs[instance](self._state, self._control(), self._batch)
        self._number += 1

    def wait(self) -> None:
        jax.block_until_ready(self._state)

    def _control(self):
        return shard({"control": np.tile(np.array([self._number, 0], np.int32), jax.local_device_count())})["control"]


class Inference(Workload):
    """Logits of one batch of uint8 images, with running statistics, one program per instance."""

    def __init__(self, setting: Setting, dtype: str = "float32"):
        self._model = setting.model(dtype)
        self._images = jax.device_put(random_batch(setting)["images"])
        init = jax.jit(lambda key, images: self._model.init(key, preprocess(images), train=False))
        self._variables = init(jax.random.key(0), self._images[:1])
        self._programs, self._logits = {}, None

    def compile(self, instance: SDPointInstance) -> None:
        def logits(variables, images):
            return self._model.apply(variables, preprocess(images), instance=instance, train=False)

        self._programs[instance] = jax.jit(logits).lower(self._variables, self._images).compile(compiler_options())

    def step(self, instance: SDPointInstance) -> None:
        if instance not in self._programs:
            self.compile(instance)
        self._logits = self._programs[instance](self._variables, self._images)

    def wait(self) -> None:
        jax.block_until_ready(self._logits)
