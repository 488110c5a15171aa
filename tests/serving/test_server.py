"""The service answers with its named instance's own logits, and says why where it does not answer."""

import asyncio
import concurrent.futures
import dataclasses
import io
import struct
import threading
import time
import types
import zlib

import numpy as np
import pytest
import services
from PIL import Image

from sdpoint_jax.serving.controller import Controller, LatencyTable
from sdpoint_jax.serving.engine import Engine, Late, Refusal
from sdpoint_jax.serving.line import Batch
from sdpoint_jax.serving.predictor import Predictor

pytest.importorskip("fastapi", reason="needs the extra serve")
prometheus_client = pytest.importorskip("prometheus_client", reason="needs the extra serve")
httpx = pytest.importorskip("httpx2", reason="needs the extra dev")
from fastapi.testclient import TestClient  # noqa: E402

from sdpoint_jax.serving.observed import Delay  # noqa: E402
from sdpoint_jax.serving.server import Limits, create_app  # noqa: E402
from sdpoint_jax.serving.turns import Turns  # noqa: E402


@pytest.fixture(scope="module")
def predictor(served):
    found = Predictor.load(served)
    found.compile(found.instances, services.SIZES)
    return found


def make_engine(predictor, objective=30.0, **settings):
    table = LatencyTable.from_rows(predictor.rows)
    return Engine(predictor, Controller(table, objective=objective, **settings))


@pytest.fixture
def client(predictor):
    limits = Limits(body_bytes=1 << 20, pixels=4_000_000)
    with TestClient(create_app(predictor, make_engine(predictor), token="secret", limits=limits)) as client:
        wait_until_ready(client)
        yield client


def wait_until_ready(client):
    until = time.monotonic() + 30
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.01)


def npy(array, **kwargs):
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def test_an_answer_is_its_instances_own(client, predictor):
    content = services.encode(services.PICTURE)
    answers = [
        client.post("/predict?top=3", content=content, headers={"Content-Type": "image/png"}),
        client.post("/predict?top=3", files={"image": ("../../etc/passwd", content)}),
        client.post("/predict?top=3", content=npy(np.asarray(services.PICTURE)[..., None])),
    ]
    for response in answers:
        assert response.status_code == 200, response.text
        answer = response.json()
        logits = predictor.predict([content], instance=answer["instance"])[0]
        np.testing.assert_allclose(answer["logits"], logits, rtol=1e-4, atol=1e-5)
        assert [found["label"] for found in answer["classes"]] == np.argsort(-logits)[:3].tolist()
        assert answer["total_ms"] >= answer["compute_ms"] > 0


def test_a_request_can_name_its_instance_or_its_limit(client, predictor):
    cheapest = min(predictor.rows, key=lambda row: row.macs)
    content = services.encode(services.PICTURE)
    for query, name in (
        (f"max_macs={cheapest.macs}", cheapest.name),
        ("instance=p02_r0.75", "p02_r0.75"),
        ("", "full"),
    ):
        assert client.post(f"/predict?{query}", content=content).json()["instance"] == name
    for query, status, message in (
        ("instance=p09_r0.50", 422, "p09_r0.50"),
        ("max_macs=1", 503, "no instance"),
        ("max_macs=nan", 422, "finite"),
        ("max_macs=-1", 422, "greater"),
        ("deadline_ms=0.001", 503, "fast enough for its deadline"),
        ("top=0", 422, "greater"),
    ):
        response = client.post(f"/predict?{query}", content=content)
        assert response.status_code == status and message in response.text, response.text


def bomb():
    """A PNG that says it has 30,000 x 30,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


HOSTILE = {
    "empty": (b"", 400),
    "text": (b"no image", 422),
    "truncated JPEG": (services.encode(services.PICTURE, "JPEG")[:300], 422),
    "a decompression bomb": (bomb(), 413),
    "too many pixels": (services.encode(Image.new("L", (3000, 3000))), 413),
    "too large": (bytes(2 << 20), 413),
    "an array of objects": (npy(np.array([{}], dtype=object), allow_pickle=True), 422),
    "an array of another rank": (npy(np.zeros(3, np.uint8)), 422),
    "an array of another type": (npy(np.zeros((8, 8, 1))), 422),
    "a truncated array": (npy(np.zeros((8, 8, 1), np.uint8))[:100], 422),
    "an array that says it is huge": (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999,), }".ljust(117)
        + b"\n",
        422,
    ),
}
FINE = {
    "CMYK": services.encode(Image.new("CMYK", (9, 9)), "JPEG"),
    "16 bits": services.encode(Image.fromarray(np.arange(81, dtype=np.uint16).reshape(9, 9))),
    "an animation": services.encode(
        services.PICTURE.convert("P"), "GIF", save_all=True, append_images=[services.PICTURE.convert("P")]
    ),
    "one pixel": services.encode(Image.new("L", (1, 1))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_upload_gets_a_reason(client, kind):
    content, status = HOSTILE[kind]
    response = client.post("/predict", content=content, headers={"Content-Type": "image/png"})
    assert response.status_code == status and response.json()["detail"], response.text
    assert client.post("/predict", content=services.encode(services.PICTURE)).status_code == 200


@pytest.mark.parametrize("kind", FINE)
def test_an_unusual_image_is_answered(client, kind):
    assert client.post("/predict", content=FINE[kind], headers={"Content-Type": "text/html"}).status_code == 200


def test_other_bodies_get_a_reason(client):
    nested = b"[" * 10**6
    for response, status in (
        (client.post("/predict", content=nested, headers={"Content-Type": "application/json"}), 415),
        (client.post("/predict", content=b"--x", headers={"Content-Type": "multipart/form-data"}), 400),
        (client.post("/predict", data={"image": "text"}, files={}), 415),
        (client.post("/predict?max_mac=5", content=b"x"), 422),
        (client.post("/predict?top=1&top=2", content=b"x"), 422),
        (
            client.post(
                "/predict", files=[("a", services.encode(services.PICTURE)), ("b", services.encode(services.PICTURE))]
            ),
            400,
        ),
        (client.get("/predict"), 405),
    ):
        assert response.status_code == status and response.json()["detail"], response.text


def test_the_budget_changes_while_it_runs_with_the_token_alone(client, predictor):
    cheapest = min(predictor.rows, key=lambda row: row.macs)
    secret = {"Authorization": "Bearer secret"}
    assert client.put("/budget", json={"max_macs": cheapest.macs}).status_code == 401
    assert client.put("/budget", json={}, headers={"Authorization": "Bearer guess"}).status_code == 401
    for body, message in (
        ({"max_macs": -1}, "max_macs"),
        ({"min_top1": 2}, "min_top1"),
        ({"max_mac": 1}, "max_mac"),
        ({"instances": ["p09_r0.50"]}, "p09_r0.50"),
        ({"max_macs": 1}, "the cheapest instance"),
    ):
        response = client.put("/budget", json=body, headers=secret)
        assert response.status_code == 422 and message in response.json()["detail"], response.text
    for content in (b'{"max_macs": NaN}', b"[" * 10**6, b"", b"[]"):
        assert client.put("/budget", content=content, headers=secret).status_code == 422
    assert client.put("/budget", json={"max_macs": cheapest.macs}, headers=secret).status_code == 200
    assert client.post("/predict", content=services.encode(services.PICTURE)).json()["instance"] == cheapest.name
    assert client.get("/instances").json()["budget"] == {"max_macs": cheapest.macs}
    assert client.put("/budget", json={}, headers=secret).json() == {"budget": {}}
    assert client.post("/predict", content=services.encode(services.PICTURE)).json()["instance"] == "full"


def test_without_a_token_the_budget_cannot_be_changed(predictor):
    with TestClient(create_app(predictor, make_engine(predictor))) as client:
        assert client.put("/budget", json={}).status_code == 404


def test_it_is_ready_when_it_is_prepared(predictor):
    go = threading.Event()
    with TestClient(create_app(predictor, make_engine(predictor), prepare=go.wait)) as client:
        assert client.get("/healthz").status_code == 200
        for response in (client.get("/readyz"), client.post("/predict", content=services.encode(services.PICTURE))):
            assert response.status_code == 503 and response.headers["Retry-After"] == "1"
        go.set()
        wait_until_ready(client)


def test_arrays_from_many_threads_are_all_read(client):
    content = npy(np.asarray(services.PICTURE)[..., None])
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        statuses = [threads.submit(client.post, "/predict", content=content) for _ in range(200)]
        assert {status.result().status_code for status in statuses} == {200}


def test_what_happens_is_counted(client):
    client.post("/predict", content=services.encode(services.PICTURE))
    client.post("/predict", content=b"no image")
    client.post("/predict?deadline_ms=0.001", content=services.encode(services.PICTURE))
    text = client.get("/metrics").text
    for outcome in ("answered", "invalid", "refused"):
        assert f'sdpoint_requests_total{{outcome="{outcome}"}} 1.0' in text
    assert 'sdpoint_request_seconds_count{instance="full"} 1.0' in text and "sdpoint_queue 0.0" in text
    assert 'sdpoint_current_instance{instance="full"} 1.0' in text
    seconds = client.get("/stats").json()["seconds"]
    assert sum(second["accepted"] for second in seconds) == 1 and sum(second["refused"] for second in seconds) == 1
    assert "/predict" in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_the_pages_need_no_network(client, page):
    text = client.get(page).text
    assert "<title>sdpoint_jax" in text
    assert text.replace("http://www.w3.org/2000/svg", "").count("://") == 0


def test_the_page_of_routes_has_them_with_their_parameters(client):
    text = client.get("/docs").text
    for part in ("POST /predict", "PUT /budget", "deadline_ms", "max_macs", "min_top1", "> 0", "Default: 5."):
        assert part.replace(">", "&gt;") in text, part


@pytest.mark.parametrize(
    "kind",
    ["application/x-www-form-urlencoded", "application/json", "text/plain; charset=x", "multipart/form-data", ""],
)
def test_a_body_counts_by_its_content(client, kind):
    for body in (services.encode(services.PICTURE), npy(np.asarray(services.PICTURE)[..., None])):
        assert client.post("/predict", content=body, headers={"Content-Type": kind}).status_code == 200


def test_a_wrong_parameter_gets_the_nearest(client):
    answer = client.post("/predict?dedline_ms=5", content=b"x").json()
    assert answer == {"detail": "dedline_ms: unknown; did you mean deadline_ms?"}


def test_costs_are_those_of_full_resolution_even_where_it_is_not_served(predictor):
    cheap = [row for row in predictor.rows if row.name != "full"]
    full = next(row.macs for row in predictor.rows if row.name == "full")
    controller = Controller(LatencyTable.from_rows(cheap), objective=1.0)
    with TestClient(create_app(predictor, Engine(predictor, controller))) as client:
        wait_until_ready(client)
        answer = client.get("/instances").json()
    assert answer["full_macs"] == full
    assert {row["instance"]: row["relative_macs"] for row in answer["instances"]} == {
        row.name: row.macs / full for row in cheap
    }


def test_a_client_that_leaves_is_counted_and_its_request_withdrawn(predictor):
    app = create_app(predictor, make_engine(predictor))
    body = npy(np.zeros((8, 8, 1), np.uint8))
    head = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}

    async def ask(messages, seconds=30.0):
        """The outcome of a request whose client sends these messages and then closes the connection."""
        left, sent = iter(messages), []

        async def receive():
            return next(left, {"type": "http.disconnect"})

        async def send(message):
            sent.append(message)

        await asyncio.wait_for(app(head | {"client": ("127.0.0.1", 1)}, receive, send), seconds)

    async def leave():
        async with app.state.service.lifespan(app):
            while not app.state.service._preparing.done():
                await asyncio.sleep(0.01)
            engine = app.state.service._engine
            engine.controller._running = [Batch((), "full", 1, 0, time.monotonic(), 0.01)]  # So that requests wait.
            await ask([{"type": "http.request", "body": body[:50], "more_body": True}])
            await ask([{"type": "http.request", "body": body}])
            assert engine.controller.waiting == 0 and not engine._waiting
            engine.controller._running = [None]

    asyncio.run(leave())
    text = prometheus_client.generate_latest(app.state.service.metrics.registry).decode()
    assert 'sdpoint_requests_total{outcome="left"} 2.0' in text and 'outcome="failed"' not in text


def test_many_at_once_each_get_their_own_answer(predictor):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 8, 8, 1), np.uint8)

    async def ask():
        engine = make_engine(predictor)
        answers = await asyncio.gather(*(engine.classify(image) for image in images))
        await engine.drain()
        with pytest.raises(Refusal, match="stopping"):
            await engine.classify(images[0])
        return answers

    answers = asyncio.run(ask())
    assert max(answer.batch_size for answer in answers) > 1
    for name in {answer.instance for answer in answers}:
        chosen = [index for index, answer in enumerate(answers) if answer.instance == name]
        expected = predictor.predict(images[chosen], instance=name)
        np.testing.assert_allclose([answers[index].logits for index in chosen], expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_in_time_is_refused_or_said_to_be_late(predictor):
    async def ask():
        engine = make_engine(predictor, objective=0.02, max_queue=50)
        outcomes = await asyncio.gather(
            *(engine.classify(np.zeros((8, 8, 1), np.uint8)) for _ in range(200)), return_exceptions=True
        )
        await engine.drain()
        return outcomes

    outcomes = asyncio.run(ask())
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
    assert refused and all(outcome.retry_after > 0 for outcome in refused)
    assert all(isinstance(outcome, Refusal | Late) or outcome.logits.shape == (10,) for outcome in outcomes)
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) > 0


def test_a_failing_program_fails_its_own_requests_alone(predictor, monkeypatch):
    async def ask():
        engine = make_engine(predictor)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_run", lambda batch, images: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await engine.classify(np.zeros((8, 8, 1), np.uint8))
        return await engine.classify(np.zeros((8, 8, 1), np.uint8))

    assert asyncio.run(ask()).logits.shape == (10,)


def test_deadlines_leave_time_for_the_layers_around_the_queue_and_it_is_forgotten():
    delay = Delay()
    for _ in range(100):
        delay.count(0.02)
    assert delay.seconds == pytest.approx(0.02, rel=0.01)
    delay.count(0.18)  # A single slow answer changes little.
    assert delay.seconds == pytest.approx(0.04, rel=0.01)
    delay.watch(0.1, 0.01)
    assert delay.before == 0.1 and delay.seconds == pytest.approx(0.14, rel=0.01)
    for _ in range(1000):
        delay.watch(0.0, 0.01)
    assert delay.seconds < 0.001


def test_a_loop_that_is_held_up_is_noticed(predictor):
    app = create_app(predictor, make_engine(predictor))
    delay, late = app.state.service.metrics.delay, []

    async def block():
        async with app.state.service.lifespan(app):
            await asyncio.sleep(0.05)
            time.sleep(0.2)
            while not late:
                await asyncio.sleep(0.001)
                late.extend([delay.before] if delay.before > 0.1 else [])

    asyncio.run(asyncio.wait_for(block(), 20))


def test_requests_begin_a_few_in_each_turn_in_the_order_in_which_they_came():
    begun, turns = [], []

    async def application(scope, receive, send):
        begun.append((scope["number"], scope["arrived"]))

    async def watch():
        while len(begun) < 30:
            turns.append(len(begun))
            await asyncio.sleep(0)
        turns.append(len(begun))

    async def burst():
        wrapped = Turns(application)
        asks = [wrapped({"type": "http", "number": number}, None, None) for number in range(30)]
        await asyncio.gather(watch(), *asks)
        await wrapped({"type": "http", "number": 30}, None, None)

    asyncio.run(asyncio.wait_for(burst(), 20))
    assert [number for number, _ in begun] == list(range(31))
    assert all(b - a <= 4 for a, b in zip(turns, turns[1:])) and begun[0][1] <= begun[29][1] <= begun[30][1]


def test_an_image_that_waits_too_long_to_be_decoded_is_refused(client, monkeypatch):
    client.post("/predict", content=services.encode(services.PICTURE))  # Its decoder has started.
    quick, _ = client.app.state.service.decoders._lanes
    monkeypatch.setattr(quick, "lane", dataclasses.replace(quick.lane, processes=len(quick.processes)))
    monkeypatch.setattr(quick, "_free", [])  # As if all were busy.
    refused = client.post("/predict?deadline_ms=50", content=services.encode(services.PICTURE))
    assert refused.status_code == 503 and "faster than they can be decoded" in refused.text
    assert refused.headers["Retry-After"] == "1" and not client.app.state.service.decoders.waiting


def test_uploads_that_are_too_many_together_are_refused_and_forgotten(client, monkeypatch):
    uploads, body = client.app.state.service.uploads, npy(np.zeros((8, 8, 1), np.uint8))
    monkeypatch.setattr(uploads, "held_bytes", 32 * (1 << 20) - len(body) + 1)  # As if others were being decoded.
    refused = client.post("/predict", content=body)
    assert refused.status_code == 503 and "too many uploads at once" in refused.text
    monkeypatch.setattr(uploads, "held_bytes", uploads.held_bytes - 1)
    for _ in range(2):  # Its bytes are given back.
        assert client.post("/predict", content=body).status_code == 200


def test_what_could_not_even_be_read_in_time_is_refused(predictor, monkeypatch):
    app = create_app(predictor, make_engine(predictor, objective=30.0))
    with TestClient(app) as client:
        wait_until_ready(client)
        with monkeypatch.context() as patched:
            patched.setattr(Delay, "before", property(lambda self: 40.0, lambda self, value: None), raising=False)
            refused = client.post("/predict?deadline_ms=50000", content=npy(np.zeros((8, 8, 1), np.uint8)))
        assert refused.status_code == 503 and "faster than they can be read" in refused.text
        assert refused.headers["Retry-After"] == "1"
        assert client.post("/predict", content=npy(np.zeros((8, 8, 1), np.uint8))).status_code == 200


def test_who_sends_many_bad_bodies_waits_for_the_answers(client, monkeypatch):
    waited, sleep = [], asyncio.sleep

    async def watched(seconds):
        waited.append(seconds)
        await sleep(0)

    # Of the application alone: other clients' answers do not wait.
    monkeypatch.setattr(
        "sdpoint_jax.serving.server.asyncio", types.SimpleNamespace(**vars(asyncio) | {"sleep": watched})
    )
    waited.clear()
    for _ in range(20):
        assert client.post("/predict", content=b"x").status_code == 422
    of_faults = [seconds for seconds in waited if seconds != 0.01]
    assert of_faults[0] == pytest.approx(0.0, abs=1e-9) and 0.1 < max(of_faults) < 1.0
    waited.clear()
    assert client.post("/predict", content=npy(np.zeros((8, 8, 1), np.uint8))).status_code == 200
    assert not [seconds for seconds in waited if seconds != 0.01]  # Besides those that watch the event loop.
