"""From settings to a running service: which instances of an artefact are served, and the application that does it.

Needs the extra `serve`.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pydantic

from sdpoint_jax.choice.latency_table import LatencyTable
from sdpoint_jax.choice.table import InstanceRow, Latency
from sdpoint_jax.serving.controller import Controller

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sdpoint_jax.storage.artefact import Artefact


class ServiceSettings(pydantic.BaseModel):
    """How an artefact is served.

    Attributes:
        artefact: path of the artefact of a sweep that was profiled.
        objective_ms: time for an answer.
        policy: how instances are chosen; see `controller.find_policy`.
        instances: `pareto`, `all`, or names with commas between them.
        batch_sizes: of those that were profiled; none for all. As text too: `1,4,16`.
        max_queue: requests that may wait.
        max_upload_mb: largest body of a request, in MiB.
        device: whose profile to use; None for that of the device at hand.
        runtime: `xla`, `onnxruntime` or `auto`; see `Predictor`.
        model: The artefact's net, `module:Class`, where it is a user's own; its module is imported.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    artefact: str
    objective_ms: float = 100.0
    policy: str = "headroom"
    instances: str = "pareto"
    batch_sizes: tuple[int, ...] = ()
    max_queue: int = 1024
    max_upload_mb: float = 16.0
    device: str | None = None
    runtime: str = "auto"
    model: str | None = None

    @pydantic.field_validator("batch_sizes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def make_controller(
    rows: Sequence[InstanceRow], settings: ServiceSettings, *, device: str | None = None, runtime: str | None = None
) -> Controller:
    """Makes the controller of the instances that the settings name.

    Args:
        rows: the table of the artefact.
        settings: how it is served.
        device: whose profile to use; None for the only one in the table.
        runtime: likewise; None for whichever is the faster.

    Raises:
        ValueError: no latencies were measured, or a setting is not valid; names what is.
    """
    sizes = settings.batch_sizes or None
    table = LatencyTable.from_rows(rows, device=device, runtime=runtime, batch_sizes=sizes)
    names = [table.names[i] for i in table.front(range(len(table.names)))]
    if settings.instances != "pareto":
        names = list(table.names) if settings.instances == "all" else settings.instances.split(",")
    served = [table.rows[table.index_of(name)] for name in dict.fromkeys(names)]
    table = LatencyTable(served, table.setting, table.batch_sizes)
    return Controller(
        table, policy=settings.policy, objective=settings.objective_ms / 1e3, max_queue=settings.max_queue
    )


def check_settings(rows: Sequence[InstanceRow], settings: ServiceSettings) -> None:
    """Check the settings before latencies are measured, on latencies that are made up.

    Raises:
        ValueError: a setting is not valid; names what is.
    """
    from sdpoint_jax.serving.predictor import RUNTIMES  # With JAX.

    sizes = settings.batch_sizes or (1,)
    if min(sizes) < 1:
        raise ValueError(f"batch_sizes {list(sizes)}: each at least 1")
    if settings.runtime not in RUNTIMES:
        raise ValueError(f"runtime {settings.runtime!r}: valid are {', '.join(RUNTIMES)}")

    def with_made_up(row):
        latencies = [Latency("", "", "", size, row.macs, row.macs, 1, None, None, {}) for size in sizes]
        return dataclasses.replace(row, latencies=tuple(latencies))

    make_controller([with_made_up(row) for row in rows], settings)


def make_app(
    settings: ServiceSettings,
    *,
    swept: "Artefact | None" = None,
    token: str | None = None,
    compile_first: bool = False,
    stop_seconds: float = math.inf,
    on_ready: Callable[[str], None] = lambda what: None,
) -> "FastAPI":
    """Makes the application that serves an artefact: predictor, controller, engine and routes.

    Args:
        settings: how it is served.
        swept: the artefact, where it is loaded already.
        token: without one, `PUT /budget` does not exist.
        compile_first: returns when all programs are compiled; else that starts with the application, which answers
            503 before.
        stop_seconds: Time to answer what was accepted when the application stops.
        on_ready: hears how many instances are compiled, and which runtime runs them at which batch size.

    Raises:
        CheckpointError: there is no sound artefact.
        ValueError: a setting is not valid; names what is.
    """
    import numpy as np  # With JAX: the caller may have prepared the process for it just now.

    from sdpoint_jax.choice.selection import check_device
    from sdpoint_jax.serving.decoders import Decoders
    from sdpoint_jax.serving.engine import Engine
    from sdpoint_jax.serving.predictor import Predictor, describe_runtimes
    from sdpoint_jax.serving.server import Limits, create_app
    from sdpoint_jax.storage import artefact

    swept = swept or artefact.load(settings.artefact, settings.model)
    predictor = Predictor(swept, runtime=settings.runtime)
    device = check_device(predictor.rows, predictor.device, settings.device)
    runtime = predictor.runtimes[0] if len(predictor.runtimes) == 1 else None
    controller = make_controller(predictor.rows, settings, device=device, runtime=runtime)
    table = controller.table
    limits = Limits(body_bytes=int(settings.max_upload_mb * (1 << 20)))
    decoders = Decoders(predictor.image_shape, predictor.resize, pixels=limits.pixels)

    def prepare():
        decoders.start()
        predictor.compile(table.names, table.batch_sizes)
        for name in table.names:
            for size in table.batch_sizes:  # The first run of a program takes longer.
                predictor.predict(np.zeros((size, *predictor.image_shape), np.uint8), instance=name)
        gc.collect()
        gc.freeze()  # JAX and the programs are a million objects: to look through them takes 0.15 s, in mid-burst.
        on_ready(f"{len(table.names)} instances in {describe_runtimes(predictor, table.names, table.batch_sizes)}")

    if compile_first:
        prepare()
    return create_app(
        predictor,
        Engine(predictor, controller),
        prepare=(lambda: None) if compile_first else prepare,
        token=token,
        limits=limits,
        decoders=decoders,
        stop_seconds=stop_seconds,
    )
