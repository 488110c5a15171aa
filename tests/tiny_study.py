"""A study small enough for tests: the digits, a net of three blocks, seconds a cell."""

import dataclasses

import grids
import results

BASE = {
    "model.name": "wrn10_1",
    "instances": "full,p01_r0.50",
    "validation_instances": "full",
    "dataset.augmentation": "shift",
    "batch_size": 40,
    "reestimate_batches": 1,
    "checkpoint_every_steps": 10,
}
STUDY = grids.Study(
    "A",
    "Does it run?",
    BASE,
    epochs=1,
    recipes=(
        grids.Recipe("sdpoint", sweeps=(grids.Sweep("full,p01_r0.50", batches=2),)),
        grids.Recipe("plain", {"instances": "full"}, sweeps=(grids.Sweep("full,p01_r0.50", batches=2, cascades=True),)),
    ),
    curves=(grids.Curve("one net", ("sdpoint",)),),
    comparisons=(grids.Comparison("sdpoint", "plain", "SDPoint", "plain"),),
    seeds=(0,),
)


def row(recipe, instance, macs, top1, seed=0, **values):
    """A row of results."""
    fields = dict(
        study="A",
        settings="0123456789ab",
        dataset="cifar10",
        train_images=15480,
        model="resnet20",
        params=269722,
        image_size="32x32",
        epochs=12.0,
        images_seen=185728,
        loss=1.0,
        n=10000,
        statistics="augmented",
        statistics_batches=50,
        statistics_images=10000,
        train_seconds=600.0,
        train_cpu_seconds=300.0,
        machine="some processor",
        versions="python 3",
    )
    return results.Row(recipe=recipe, seed=seed, instance=instance, macs=macs, top1=top1, **fields | values)


def without_times(rows):
    """The rows as they are wherever and however fast they are measured."""
    return [dataclasses.replace(row, train_seconds=None, train_cpu_seconds=None) for row in rows]
