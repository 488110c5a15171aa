"""The HTTP service: one image in, its classes out, on the SDPoint instance that the load allows.

Needs the extra `serve`.

Routes: `POST /predict`, `GET /instances`, `/stats`, `/healthz`, `/readyz`, `/metrics`, `/` (a page), `/docs`; and
`PUT /budget` where a token was given at start.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import io
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
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image
from starlette.formparsers import MultiPartException, MultiPartParser

from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.serving.engine import Engine, Late, Refusal
from sdpoint_jax.serving.images import to_batch
from sdpoint_jax.serving.observed import Delay
from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.serving.selection import Budget, pareto_front
from sdpoint_jax.serving.turns import Turns

PAGE = pathlib.Path(__file__).parent / "page"
_READING_ARRAYS = threading.Lock()  # NumPy parses headers by `ast`, which fails in threads (CPython issue 106905).
_WATCH_SECONDS = 0.01
_SMALL_BODY, _SMALL_IMAGE = 1 << 16, 1 << 14  # Bytes, pixels: quicker to read than to hand to another thread.
_BODIES = 32  # Of the largest size, held at once; smaller ones accordingly more.
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes:
        body_bytes: of an upload.
        body_seconds: in which it must have come.
        pixels: of an image, before it is resized.
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
            "sdpoint_requests", "Requests by outcome: answered, refused, late, invalid, failed.", ["outcome"], **make
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
) -> FastAPI:
    """Makes the application.

    Args:
        predictor: that the engine uses.
        engine: yet without requests.
        prepare: compiles what is to be served; runs in a thread when the application starts, which is ready after it.
        token: without one, `PUT /budget` does not exist.
        limits: of requests.
    """
    state = _State(predictor, engine, limits, prepare)
    app = FastAPI(title="sdpoint_jax", lifespan=state.lifespan, description=__doc__)
    app.state.service = state
    app.add_middleware(Turns)
    app.add_api_route("/predict", state.predict, methods=["POST"], openapi_extra=_PREDICT_BODY)
    app.add_api_route("/instances", state.instances)
    app.add_api_route("/stats", state.stats)
    app.add_api_route("/healthz", state.healthz)
    app.add_api_route("/readyz", state.readyz)
    app.add_api_route("/metrics", state.show_metrics, response_class=Response)
    app.add_api_route("/", state.page, include_in_schema=False)
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

    def __init__(self, predictor, engine, limits, prepare):
        self._predictor, self._engine, self._limits, self._prepare = predictor, engine, limits, prepare
        self.metrics = Metrics(engine)
        self._delay = self.metrics.delay
        engine.on_batch = self.metrics.batch
        self._held_bytes = 0  # Of all bodies that are read or decoded.
        self._decoders = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._budget: dict[str, Any] = {}
        self._preparing: asyncio.Future | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self._preparing = loop.run_in_executor(None, self._prepare)
        watching = loop.create_task(self._watch())
        yield
        await self._engine.drain()
        watching.cancel()
        self._decoders.shutdown()

    async def _watch(self):
        """Looks again and again how late the event loop is; does not return."""
        await asyncio.wait([self._preparing])  # While programs are compiled, the loop is late.
        while True:
            start = time.monotonic()
            await asyncio.sleep(_WATCH_SECONDS)
            passed = time.monotonic() - start
            self._delay.watch(passed - _WATCH_SECONDS, passed)

    async def predict(
        self,
        request: Request,
        max_macs: Annotated[float | None, Query(gt=0, allow_inf_nan=False, description="of the answer")] = None,
        deadline_ms: Annotated[float | None, Query(gt=0, le=600_000, allow_inf_nan=False)] = None,
        instance: Annotated[str | None, Query(max_length=64)] = None,
        top: Annotated[int, Query(ge=1, le=1000)] = 5,
    ) -> JSONResponse:
        """Classifies one image: an image file as the body or as a form's file, or an .npy array uint8 [H, W, C]."""
        start = request.scope["arrived"]
        try:
            self._check_ready()
            objective = self._engine.controller.objective
            allowed = objective if deadline_ms is None else deadline_ms / 1e3
            if self._delay.before > objective:
                raise Refusal("requests come faster than they can be read", 1.0)
            image = await self._read_image(request, start + allowed)
            accepted = time.monotonic()
            seconds = allowed - (accepted - start) - self._delay.seconds
            answer = await self._engine.classify(image, deadline_seconds=seconds, instance=instance, max_macs=max_macs)
        except Refusal as refusal:
            self.metrics.outcomes.labels("refused").inc()
            raise _unavailable(refusal.reason, refusal.retry_after) from None
        except Late as late:
            self.metrics.outcomes.labels("late").inc()
            raise HTTPException(504, str(late)) from None
        except ValueError as error:
            self.metrics.outcomes.labels("invalid").inc()
            raise HTTPException(422, str(error)) from None
        except HTTPException as error:
            self.metrics.outcomes.labels("refused" if error.status_code == 503 else "invalid").inc()
            raise
        except Exception:
            self.metrics.outcomes.labels("failed").inc()
            raise
        self.metrics.outcomes.labels("answered").inc()
        response = JSONResponse(self._describe(answer, min(top, len(self._predictor.class_names)), start))
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
            "instances": [
                row.to_record() | {"pareto": row.name in front, "ms": [1e3 * s for s in seconds]}
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
            async with self._body_of(request) as body:
                change = BudgetChange.model_validate_json(body)
        except pydantic.ValidationError as error:
            faults = (f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in error.errors()[:3])
            raise HTTPException(422, "; ".join(faults)) from None
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

    async def _read_image(self, request, deadline) -> np.ndarray:
        """Reads and decodes the image of a request; raises HTTPException for what is none, Refusal for what is late."""
        async with self._body_of(request) as body:
            return await self._decode_body(request, body, deadline)

    async def _decode_body(self, request, body, deadline):
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            body, kind = await _file_of_form(request, body)
        if not body:
            raise HTTPException(400, "empty body: send an image file, or an .npy array")
        if kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
            raise HTTPException(415, f"content type {kind}: send an image file, a form with a file, or an .npy array")
        if _is_small(body):
            return self._decode(body, kind)
        return await asyncio.get_running_loop().run_in_executor(
            self._decoders, self._decode_in_time, body, kind, deadline
        )

    @contextlib.asynccontextmanager
    async def _body_of(self, request) -> AsyncIterator[bytes]:
        """Yields the body of a request; until the end its bytes count among those of all bodies."""
        limit, chunks, size = self._limits.body_bytes, [], 0
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise HTTPException(413, f"body of {announced} bytes: at most {limit}")
        try:
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    async for chunk in request.stream():
                        size += len(chunk)
                        self._held_bytes += len(chunk)
                        if size > limit:
                            raise HTTPException(413, f"body of more than {limit} bytes")
                        if self._held_bytes > _BODIES * limit:
                            raise _unavailable("too many uploads at once", 1.0)
                        chunks.append(chunk)
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {self._limits.body_seconds:g} s") from None
            yield b"".join(chunks)
        finally:
            self._held_bytes -= size

    def _decode_in_time(self, body, kind, deadline) -> np.ndarray:
        if time.monotonic() > deadline:  # It waited for others: to decode it as well would make the next ones late.
            raise Refusal("images come faster than they can be decoded", 1.0)
        return self._decode(body, kind)

    def _decode(self, body, kind) -> np.ndarray:
        if kind == "application/x-npy" or body.startswith(b"\x93NUMPY"):
            return self._decode_array(body)
        try:
            with Image.open(io.BytesIO(body)) as image:
                width, height = image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise HTTPException(413, f"image: {error}") from None
        except Exception:  # PIL's decoders raise nearly every type there is.
            raise HTTPException(422, "not an image") from None
        if width * height > self._limits.pixels:
            raise HTTPException(413, f"image of {width} x {height} pixels: at most {self._limits.pixels}")
        try:
            return self._to_batch([body])
        except BadImageError as error:
            raise HTTPException(422, f"the image {error.reason}") from None

    def _decode_array(self, body):
        try:
            with _READING_ARRAYS:
                array = np.load(io.BytesIO(body), allow_pickle=False)
        except (ValueError, OSError, EOFError, MemoryError, SyntaxError) as error:
            raise HTTPException(422, f"not an .npy array: {' '.join(str(error).split())[:200]}") from None
        return self._to_batch([array])

    def _to_batch(self, images) -> np.ndarray:
        return to_batch(images, self._predictor.image_shape, self._predictor.resize)[0]


def _is_small(body) -> bool:
    if len(body) > _SMALL_BODY:
        return False
    if body.startswith(b"\x93NUMPY"):
        return True
    try:
        with Image.open(io.BytesIO(body)) as image:
            return image.width * image.height <= _SMALL_IMAGE
    except Exception:  # Whatever is wrong with it is found, and told, when it is decoded.
        return False


async def _file_of_form(request, body) -> tuple[bytes, str]:
    """Returns the content and type of the one file in a form that was read already."""

    async def stream():
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise HTTPException(400, f"not a form: {error}") from None
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        files = [value for value in form.values() if not isinstance(value, str)]
        if len(files) != 1:
            raise HTTPException(400, "the form holds no file: send one, as image=@photo.jpg")
        return await files[0].read(), files[0].content_type or ""


def _with_token(route, token):
    async def guarded(request: Request, authorization: Annotated[str, Header()] = "") -> dict[str, Any]:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "PUT /budget needs the header Authorization: Bearer TOKEN")
        return await route(request)

    guarded.__doc__ = route.__doc__
    return guarded


def _unavailable(reason, retry_after):
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return HTTPException(503, reason, headers)
