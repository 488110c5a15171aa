"""The HTTP service: one image in, its classes out, on the SDPoint instance that the load allows.

Needs the extra `serve`.

Routes: `POST /predict`, `GET /instances`, `/stats`, `/healthz`, `/readyz`, `/metrics`, `/` (a page), `/docs`; and
`PUT /budget` where a token was given at start.
"""

import asyncio
import collections
import contextlib
import dataclasses
import difflib
import hmac
import math
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import numpy as np
import prometheus_client
import pydantic
from fastapi import FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.requests import ClientDisconnect

from sdpoint_jax.choice.selection import Budget, pareto_front
from sdpoint_jax.serving import reference
from sdpoint_jax.serving.clients import Clients, Usage, host_of
from sdpoint_jax.serving.contents import EXPECTED, NPY, ContentError, format_of, read_npy
from sdpoint_jax.serving.decoders import Decoders, TooLate
from sdpoint_jax.serving.engine import Engine, Late, Refusal
from sdpoint_jax.serving.observed import Delay
from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.serving.turns import Turns
from sdpoint_jax.serving.uploads import Uploads

PAGE = pathlib.Path(__file__).parent / "page"
_WATCH_SECONDS = 0.01
# Seconds that the answer to a bad body waits for each recent one of its host after the first, and at most. Otherwise
# a client that sends what is refused at once would take more of the event loop than those who wait for the net.
_FAULT_SECONDS, _MOST_FAULT_SECONDS = 0.01, 1.0
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes:
        body_bytes: Most bytes of an upload.
        body_seconds: Time in which it must have come.
        pixels: Most pixels of an image, before it is resized.
    """

    body_bytes: int = 16 << 20
    body_seconds: float = 10.0
    pixels: int = 50_000_000


class Metrics:
    """What `/metrics` shows."""

    def __init__(self, engine: Engine):
        """Registers the metrics of an engine."""
        self.delay = Delay()
        self.registry = prometheus_client.CollectorRegistry()
        make: Any = {"registry": self.registry}
        self.latency = prometheus_client.Histogram(
            "sdpoint_request_seconds", "From the request to its answer.", ["instance"], buckets=_BUCKETS, **make
        )
        self.batch_seconds = prometheus_client.Histogram(
            "sdpoint_batch_seconds", "Time to compute a batch.", ["instance"], buckets=_BUCKETS, **make
        )
        self.batch_images = prometheus_client.Histogram(
            "sdpoint_batch_images", "Images of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), **make
        )
        self.outcomes = prometheus_client.Counter(
            "sdpoint_requests",
            "Requests by outcome: answered, refused, late, invalid, left (the client), failed.",
            ["outcome"],
            **make,
        )
        self.current = prometheus_client.Gauge(
            "sdpoint_current_instance", "1 for the instance that ran last.", ["instance"], **make
        )
        prometheus_client.ProcessCollector(registry=self.registry)
        delay = prometheus_client.Gauge("sdpoint_delay_seconds", "Kept free for the HTTP layer.", **make)
        delay.set_function(lambda: self.delay.seconds)
        queue = prometheus_client.Gauge("sdpoint_queue", "Accepted requests that wait.", **make)
        queue.set_function(lambda: engine.controller.waiting)

    def batch(self, batch: Any, seconds: float) -> None:
        """Counts a batch that is done."""
        self.batch_seconds.labels(batch.instance).observe(seconds)
        self.batch_images.observe(len(batch.requests))
        self.current.clear()
        self.current.labels(batch.instance).set(1)


class PredictQuery(pydantic.BaseModel):
    """The query of `POST /predict`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    max_macs: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False, description="Most MACs of the answer.")
    deadline_ms: float | None = pydantic.Field(
        None, gt=0, le=600_000, allow_inf_nan=False, description="Time for the answer; by default the objective."
    )
    instance: str | None = pydantic.Field(None, max_length=64, description="The only instance that may answer.")
    top: int = pydantic.Field(5, ge=1, le=1000, description="Number of classes in the answer.")


class BudgetChange(pydantic.BaseModel):
    """What `PUT /budget` takes; what is left out is not limited."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    max_macs: float | None = None
    max_latency_ms: float | None = None
    max_memory_mb: float | None = None
    min_top1: float | None = None
    batch_size: int = 1
    instances: list[str] | None = None


def create_app(
    predictor: Predictor,
    engine: Engine,
    *,
    prepare: Callable[[], None] = lambda: None,
    token: str | None = None,
    limits: Limits = Limits(),
    decoders: Decoders | None = None,
    stop_seconds: float = math.inf,
) -> FastAPI:
    """Create the application.

    Args:
        predictor: The one that the engine uses.
        engine: One without requests.
        prepare: Compiles what is to be served. It runs in a thread when the application starts; before its end the
            application answers that it is not ready.
        token: Allows `PUT /budget`; without one, the route does not exist.
        limits: Limits of requests.
        decoders: Processes that decode images, by default new ones. They end with the application.
        stop_seconds: Time to answer what was accepted when the application stops.
    """
    decoders = decoders or Decoders(predictor.image_shape, predictor.resize, pixels=limits.pixels)
    state = _State(predictor, engine, limits, prepare, decoders, stop_seconds)
    # FastAPI's own pages load their scripts from a public server, so `/docs` is ours.
    app = FastAPI(title="sdpoint_jax", lifespan=state.lifespan, description=__doc__, docs_url=None, redoc_url=None)
    app.state.service = state
    app.add_middleware(Turns)
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_api_route("/predict", state.predict, methods=["POST"], openapi_extra=_PREDICT_BODY)
    app.add_api_route("/instances", state.instances)
    app.add_api_route("/stats", state.stats)
    app.add_api_route("/healthz", state.healthz)
    app.add_api_route("/readyz", state.readyz)
    app.add_api_route("/metrics", state.show_metrics, response_class=Response)
    app.add_api_route("/", state.page, include_in_schema=False)

    async def docs() -> HTMLResponse:
        return HTMLResponse(reference.page(app.openapi()))

    app.add_api_route("/docs", docs, include_in_schema=False)
    if token:
        app.add_api_route("/budget", _with_token(state.set_budget, token), methods=["PUT"], openapi_extra=_BUDGET_BODY)
    return app


_PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


_BUDGET_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": BudgetChange.model_json_schema()}}}
}


class _State:
    """What the routes share."""

    def __init__(self, predictor, engine, limits, prepare, decoders, stop_seconds):
        self._predictor, self._engine, self._prepare = predictor, engine, prepare
        self._stop_seconds, self.has_stopped = stop_seconds, False
        self.metrics = Metrics(engine)
        self._delay = self.metrics.delay
        engine.on_batch = self.metrics.batch
        self.uploads, self.decoders = Uploads(limits.body_bytes, limits.body_seconds), decoders
        self._budget: dict[str, Any] = {}
        self._preparing: asyncio.Future | None = None
        self._clients, self._faults = Clients(), Usage()
        self._full_macs = predictor.full_macs

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self._preparing = _run_in_thread(self._prepare, loop)
        watching = loop.create_task(self._watch())
        yield
        drained = await self._engine.drain(self._stop_seconds)
        watching.cancel()
        self.decoders.close()
        self.has_stopped = drained and self._preparing.done()

    async def _watch(self):
        """Poll the event loop's lag forever."""
        await asyncio.wait([self._preparing])  # While programs are compiled, the loop is late.
        while True:
            start = time.monotonic()
            await asyncio.sleep(_WATCH_SECONDS)
            passed = time.monotonic() - start
            self._delay.watch(passed - _WATCH_SECONDS, passed)

    async def predict(self, request: Request, query: Annotated[PredictQuery, Query()]) -> JSONResponse:
        """Classify one image: an image file as the body or in a form, or an .npy array uint8 [H, W, C]."""
        start = request.scope["arrived"]
        try:
            self._check_ready()
            if twice := [
                name
                for name, count in collections.Counter(name for name, _ in request.query_params.multi_items()).items()
                if count > 1
            ]:
                raise ContentError(422, f"{twice[0]}: given twice")
            objective = self._engine.controller.objective
            allowed = objective if query.deadline_ms is None else query.deadline_ms / 1e3
            if self._delay.before > objective:
                raise Refusal("requests come faster than they can be read", 1.0)
            async with self.uploads.read(request) as body, _until_it_leaves(request):
                image = await self._decode(request, body, start + allowed)
                accepted = time.monotonic()
                seconds = allowed - (accepted - start) - self._delay.seconds
                answer = await self._engine.classify(
                    image, deadline_seconds=seconds, instance=query.instance, max_macs=query.max_macs
                )
        except Refusal as refusal:
            self.metrics.outcomes.labels("refused").inc()
            raise _unavailable(refusal.reason, refusal.retry_after) from None
        except Late as late:
            self.metrics.outcomes.labels("late").inc()
            raise HTTPException(504, str(late)) from None
        except ContentError as error:
            self.metrics.outcomes.labels("refused" if error.status == 503 else "invalid").inc()
            faults = self._faults.add(host_of(request), 1.0)
            await asyncio.sleep(min(_FAULT_SECONDS * (faults - 1), _MOST_FAULT_SECONDS))
            raise _http_error(error) from None
        except ValueError as error:
            self.metrics.outcomes.labels("invalid").inc()
            raise HTTPException(422, str(error)) from None
        except HTTPException:
            self.metrics.outcomes.labels("refused").inc()
            raise
        except ClientDisconnect:
            self.metrics.outcomes.labels("left").inc()
            return JSONResponse({}, 499)  # Nobody reads it; nginx's code for a client that has closed its connection.
        except Exception:
            self.metrics.outcomes.labels("failed").inc()
            raise
        self.metrics.outcomes.labels("answered").inc()
        response = JSONResponse(self._describe(answer, min(query.top, len(self._predictor.class_names)), start))
        now = time.monotonic()
        self._delay.count(now - accepted - answer.queue_seconds - answer.compute_seconds)
        self.metrics.latency.labels(answer.instance).observe(now - start)
        return response

    def _describe(self, answer, top, start):
        (classes,) = self._predictor.rank_classes(answer.logits[None], top)
        return {
            "instance": answer.instance,
            "classes": [dataclasses.asdict(found) for found in classes],
            "logits": answer.logits.tolist(),
            "batch_size": answer.batch_size,
            "queue_ms": 1e3 * answer.queue_seconds,
            "compute_ms": 1e3 * answer.compute_seconds,
            "total_ms": 1e3 * (time.monotonic() - start),
        }

    async def instances(self) -> dict[str, Any]:
        """Lists the instances that are served, their costs and accuracies, and the limits in force."""
        table = self._engine.controller.table
        front = {row.name for row in pareto_front(table.rows)}
        return {
            "objective_ms": 1e3 * self._engine.controller.objective,
            "budget": self._budget,
            "current": self._engine.current_instance,
            "class_names": self._predictor.class_names,
            "image_shape": self._predictor.image_shape,
            "full_macs": self._full_macs,
            "instances": [
                row.to_record()
                | {"relative_macs": row.macs / self._full_macs}
                | {"pareto": row.name in front, "ms": [1e3 * s for s in seconds]}
                for row, seconds in zip(table.rows, table.seconds.tolist())
            ],
            "batch_sizes": table.batch_sizes,
        }

    async def stats(self) -> dict[str, Any]:
        """Shows the last minute, second by second."""
        controller = self._engine.controller
        return {
            "waiting": controller.waiting,
            "slowness": controller.slowness,
            "current": self._engine.current_instance,
            "seconds": [dataclasses.asdict(sample) for sample in self._engine.history()],
        }

    async def healthz(self) -> dict[str, str]:
        """Tells that the process answers."""
        return {"status": "alive"}

    async def readyz(self) -> dict[str, str]:
        """Tells that all programs are compiled; 503 before that."""
        self._check_ready()
        return {"status": "ready"}

    async def show_metrics(self) -> Response:
        """Shows the metrics in Prometheus's text format."""
        text = prometheus_client.generate_latest(self.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def page(self) -> FileResponse:
        """Shows the page."""
        return FileResponse(PAGE / "index.html")

    async def set_budget(self, request: Request) -> dict[str, Any]:
        """Limits the instances that are used from now on; an empty object lifts all limits."""
        try:
            async with self.uploads.read(request) as body:
                change = BudgetChange.model_validate_json(body)
        except pydantic.ValidationError as error:
            faults = (f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in error.errors()[:3])
            raise HTTPException(422, "; ".join(faults)) from None
        except ContentError as error:
            raise _http_error(error) from None
        except ClientDisconnect:
            return {}
        try:
            self.limit(change)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        return {"budget": self._budget}

    def limit(self, change: BudgetChange) -> None:
        """Limits the instances that are used from now on; raises ValueError where none is left."""
        given = change.model_dump(exclude_none=True)
        limits = {key: value for key, value in given.items() if key != "instances"}
        self._engine.set_limits(Budget(**limits), given.get("instances"))
        self._budget = change.model_dump(exclude_unset=True, exclude_none=True)

    def _check_ready(self):
        preparing = self._preparing
        if preparing is None or not preparing.done():
            raise _unavailable("compiling; not ready yet", 1.0)
        if preparing.exception():
            raise HTTPException(500, f"could not be prepared: {preparing.exception()}")

    async def _decode(self, request, body, deadline) -> np.ndarray:
        """Return the image in a body; raise ContentError if there is none, Refusal if it cannot be decoded in time."""
        if not body:
            raise ContentError(400, f"empty body: {EXPECTED}")
        client, kind, form = self._clients.of(request), format_of(body), ""
        self.decoders.greet(client)
        if kind == NPY:
            array = read_npy(body)
            if array.shape == self._predictor.image_shape:
                return array  # As the net takes it: the header is all there is to read.
            if array.shape[-1] != self._predictor.image_shape[-1]:
                raise ContentError(
                    422, f"the .npy array {list(array.shape)}: needs {self._predictor.image_shape[-1]} channels"
                )
        elif kind is None:
            content_type = request.headers.get("content-type", "")
            declared = content_type.partition(";")[0].strip().lower()
            if declared == "multipart/form-data":
                form = content_type
            else:
                status = 415 if declared in _TEXTS or "content-encoding" in request.headers else 422
                raise ContentError(status, f"the body is no image: {EXPECTED}")
        try:
            return await self.decoders.decode(body, form, client, deadline)
        except TooLate as late:
            self._engine.count_refusal()
            if late.begun:
                raise Refusal("the image cannot be decoded fast enough for its deadline") from None
            raise Refusal("images come faster than they can be decoded", 1.0) from None


_TEXTS = ("application/json", "text/plain", "application/x-www-form-urlencoded")


@contextlib.asynccontextmanager
async def _until_it_leaves(request) -> AsyncIterator[None]:
    """Cancel the block when the client closes its connection, and raise ClientDisconnect."""
    task, left = asyncio.current_task(), False

    async def watch():
        nonlocal left
        await request.receive()  # The body was read, so what comes is `http.disconnect`.
        left = True
        assert task is not None
        task.cancel()

    watching = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and task is not None and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


def _run_in_thread(function, loop) -> asyncio.Future:
    """Run a function in a thread that does not keep the process from ending."""
    future = loop.create_future()

    def finish(error):
        if not future.done():
            future.set_exception(error) if error else future.set_result(None)

    def run():
        error = None
        try:
            function()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # The loop is closed: the service was stopped meanwhile.
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, daemon=True, name="prepare").start()
    return future


async def _explain(request: Request, error: Exception) -> JSONResponse:
    """Answer a query that is not valid, in one line."""
    assert isinstance(error, RequestValidationError)
    lines = []
    for fault in error.errors()[:3]:
        name = str(fault["loc"][-1])
        if fault["type"] == "extra_forbidden":
            names = list(PredictQuery.model_fields)
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(names)}"
            lines.append(f"{name[:64]}: unknown; {hint}")
        else:
            lines.append(f"{name[:64]} {str(fault.get('input'))[:64]!r}: {fault['msg']}")
    return JSONResponse({"detail": "; ".join(lines)}, 422)


def _http_error(error: ContentError) -> HTTPException:
    return _unavailable(error.reason, 1.0) if error.status == 503 else HTTPException(error.status, error.reason)


def _with_token(route, token):
    async def guarded(request: Request, authorization: Annotated[str, Header()] = "") -> dict[str, Any]:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise HTTPException(401, "PUT /budget needs the header Authorization: Bearer TOKEN")
        return await route(request)

    guarded.__doc__ = route.__doc__
    return guarded


def _unavailable(reason, retry_after):
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return HTTPException(503, reason, headers)
