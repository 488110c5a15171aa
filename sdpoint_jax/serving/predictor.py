"""Inference within a budget: loads a sweep's artefact, picks an SDPoint instance, predicts.

predictor = Predictor.load("runs/digits/sweep/artefact")
logits = predictor.predict(images, max_macs=500_000)
"""

import argparse
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.programs.devices import compiler_options
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.training.step import normalize

_LARGEST_BATCH = 256  # Larger ones are split; smaller ones padded to a power of two, so that programs stay few.


class Predictor:
    """A trained net with the statistics of the instances that were swept.

    Attributes:
        table: a row per instance: `instance` (name), `macs` of one image, `top1`, and more; see `sweep`.
        class_names: of the K classes.
        image_shape: (H, W, C) of the images it takes.
    """

    def __init__(self, params, batch_stats: Mapping[str, Any], record: Mapping[str, Any]):
        """From the parts of an artefact; see `load`."""
        self.table: Sequence[Mapping[str, Any]] = record["table"]
        self.class_names = tuple(record["class_names"])
        self.image_shape = tuple(record["image_shape"])
        self._model = create_model(record["model"]["name"], record["num_classes"], dtype=record["model"]["dtype"])
        self._preprocess = functools.partial(normalize, mean=tuple(record["mean"]), std=tuple(record["std"]))
        self._params = jax.device_put(params)
        self._batch_stats = batch_stats
        self._programs = {}

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Predictor":
        """Loads and verifies the artefact at `path`, as `runs/digits/sweep/artefact`.

        Raises:
            CheckpointError: there is none, it is damaged, or it is a checkpoint without re-estimated statistics.
        """
        arrays, record = checkpoint.load(path)
        if "table" not in record:
            raise checkpoint.CheckpointError(f"{path}: not the artefact of a sweep; evaluate.py writes one")
        return cls(arrays["params"], arrays["batch_stats"], record)

    @property
    def instances(self) -> tuple[SDPointInstance, ...]:
        """Those that can be used."""
        return tuple(SDPointInstance.from_name(row["instance"]) for row in self.table)

    def select(self, *, max_macs: float | None = None) -> SDPointInstance:
        """The most accurate instance (top-1) within a budget; of equally accurate ones the cheapest.

        Args:
            max_macs: the most MACs that one image may cost; None for no limit.

        Raises:
            ValueError: no instance is that cheap; names the cheapest.
        """
        affordable = [row for row in self.table if max_macs is None or row["macs"] <= max_macs]
        if not affordable:
            cheapest = min(self.table, key=lambda row: row["macs"])
            raise ValueError(
                f"max_macs {max_macs:g}: the cheapest instance, {cheapest['instance']}, needs {cheapest['macs']} MACs"
            )
        best = max(affordable, key=lambda row: (row["top1"], -row["macs"]))
        return SDPointInstance.from_name(best["instance"])

    def predict(
        self, images, *, max_macs: float | None = None, instance: SDPointInstance | str | None = None
    ) -> np.ndarray:
        """Classifies with one instance.

        Args:
            images: uint8 [B, H, W, C], of `image_shape`.
            max_macs: the budget for one image; see `select`.
            instance: the one to use, or its name, instead of a budget.

        Returns:
            logits [B, K], float32.

        Raises:
            ValueError: images of another shape or type, an impossible budget, or an instance that was not swept.
        """
        if max_macs is not None and instance is not None:
            raise ValueError(f"max_macs {max_macs:g} and instance {instance}: give one of them")
        if instance is None:
            instance = self.select(max_macs=max_macs)
        elif isinstance(instance, str):
            instance = SDPointInstance.from_name(instance)
        images = self._check_images(images)
        batches = np.split(images, range(_LARGEST_BATCH, len(images), _LARGEST_BATCH)) if len(images) else []
        logits = [self._predict_batch(batch, instance) for batch in batches]
        return np.concatenate([np.empty((0, self._model.num_classes), np.float32), *logits])

    def _predict_batch(self, images, instance):
        padded = 1 << (len(images) - 1).bit_length()
        images_and_padding = np.pad(images, [(0, padded - len(images)), (0, 0), (0, 0), (0, 0)])
        return np.asarray(self._program(instance)(self._params, images_and_padding))[: len(images)]

    def _program(self, instance):
        if instance not in self._programs:
            if instance not in self.instances:
                raise ValueError(
                    f"instance {instance.name}: its statistics were not re-estimated; the artefact has "
                    f"{', '.join(row['instance'] for row in self.table)}"
                )
            batch_stats = jax.device_put(self._batch_stats.get(instance.name, {}))

            def apply(params, batch_stats, images):
                variables = {"params": params, "batch_stats": batch_stats}
                return self._model.apply(variables, self._preprocess(images), instance=instance, train=False)

            program = jax.jit(apply, compiler_options=compiler_options())
            self._programs[instance] = lambda params, images: program(params, batch_stats, images)
        return self._programs[instance]

    def _check_images(self, images):
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.image_shape or images.dtype != np.uint8:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images {images.dtype} {list(images.shape)}: needs uint8 [B, {wanted}]")
        return images


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the instance for a budget: python -m sdpoint_jax.serving.predictor ARTEFACT --max-macs=500000"""
    parser = _Parser(prog="python -m sdpoint_jax.serving.predictor", description="Picks the instance for a budget.")
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max-macs", type=float, help="the most MACs that one image may cost")
    budget.add_argument("--relative-budget", type=float, help="likewise, as a share of the dearest instance's MACs")
    options = parser.parse_args(arguments)
    try:
        predictor = Predictor.load(options.artefact)
        dearest = max(row["macs"] for row in predictor.table)
        max_macs = options.max_macs if options.max_macs is not None else options.relative_budget * dearest
        instance = predictor.select(max_macs=max_macs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    row = next(row for row in predictor.table if row["instance"] == instance.name)
    print(
        f"budget of {max_macs:,.0f} MACs: instance {instance.name}, {row['macs']:,} MACs "
        f"({100 * row['macs'] / dearest:.0f} % of the dearest), top-1 {100 * row['top1']:.2f} %"
    )


if __name__ == "__main__":
    main()
