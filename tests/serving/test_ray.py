"""On Ray, images and requests get the answers that one process gives, whoever is killed."""

import collections
import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import clusters
import numpy as np
import pytest
import services
from PIL import Image

from sdpoint_jax.serving.predictor import Predictor

pytest.importorskip("ray", reason="needs the extra ray")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra predict")
httpx = pytest.importorskip("httpx2", reason="needs the extra dev")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]

IMAGES, PART_SIZE = 300, 5


@pytest.fixture(scope="module")
def cluster():
    """A cluster: its process, and the environment of what uses it."""
    with clusters.cluster() as started:
        yield started


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images of several sizes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for index in range(IMAGES):
        Image.fromarray(rng.randint(0, 256, (8 + index % 9, 12), np.uint8)).save(folder / f"{index:03d}.png")
    return folder


def predict(served, images, output):
    flags = [f"--input={images}", f"--output={output}", f"--part-size={PART_SIZE}", "--batch-size=4"]
    return ["predict", served, *flags, "--instance=p01_r0.50"]


@pytest.fixture(scope="module")
def expected(cluster, served, images, tmp_path_factory):
    """The files that one process writes without Ray, by name."""
    output = tmp_path_factory.mktemp("expected")
    finish(start(cluster[1], *predict(served, images, output)))
    return contents(output)


def contents(output):
    return {path.name: path.read_bytes() for path in output.glob("part-*.parquet")}


def start(environment, *arguments):
    """Starts `python -m sdpoint_jax ARGUMENTS`."""
    command = [sys.executable, "-m", "sdpoint_jax", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=clusters.ROOT, env=environment, **pipes)


def finish(process):
    """Waits until a command has ended well; returns what it printed."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def test_a_command_that_was_killed_goes_on_and_each_image_is_there_once(cluster, served, images, expected, tmp_path):
    _, environment = cluster
    killed = start(environment, *predict(served, images, tmp_path), "--ray", "--workers=2")
    while len(contents(tmp_path)) < 3:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    before = contents(tmp_path)
    assert len(before) < len(expected)
    output = finish(start(environment, *predict(served, images, tmp_path), "--ray", "--workers=2"))
    assert f"classified {IMAGES} images on p01_r0.50 (" in output
    assert contents(tmp_path) == expected
    rows = [row for path in tmp_path.glob("part-*.parquet") for row in parquet.read_table(path).to_pylist()]
    assert sorted(row["path"] for row in rows) == sorted(map(str, images.iterdir()))


def test_a_bad_image_is_named(cluster, served, tmp_path):
    _, environment = cluster
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no image")
    process = start(environment, *predict(served, tmp_path / "in", tmp_path / "out"), "--ray")
    _, errors = process.communicate()
    assert process.returncode == 2 and f"error: {tmp_path}/in/a.png: " in errors.splitlines()[-1], errors


@pytest.fixture(scope="module")
def running(cluster, served):
    """A service of two replicas: (cluster's process, the command's process, address)."""
    process, environment = cluster
    flags = ["--ray", "--replicas=2", "--objective-ms=2000"]
    with services.running(served, *flags, environment=environment) as (command, address):
        yield process.pid, command, address


def replicas(cluster):
    return clusters.processes(cluster, "ray::ServeReplica:sdpoint")


def test_an_answer_is_its_instances_own(running, served):
    cluster, _, address = running
    predictor, content = Predictor.load(served), services.encode(services.PICTURE)
    for name in ("full", "p01_r0.50"):
        answer = httpx.post(f"{address}/predict?instance={name}", content=content).json()
        np.testing.assert_allclose(answer["logits"], predictor.predict([content], instance=name)[0], rtol=1e-4)
        assert answer["instance"] == name
    assert httpx.post(f"{address}/predict", content=b"no image").status_code == 422
    assert httpx.put(f"{address}/budget", json={}).status_code == 404
    assert len(replicas(cluster)) == 2


def test_a_killed_replica_leaves_no_request_without_an_outcome(running):
    cluster, _, address = running
    killed, content = threading.Event(), services.encode(services.PICTURE)
    (first, second), outcomes = replicas(cluster), []

    def ask():
        with httpx.Client(timeout=30) as client:
            for _ in range(100):
                outcomes.append((killed.is_set(), client.post(f"{address}/predict", content=content).status_code))

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask) for _ in range(8)]
        while len(outcomes) < 200:
            time.sleep(0.005)
        os.kill(first, signal.SIGKILL)
        killed.set()
        assert [asked.result() for asked in asking] == [None] * 8
    counts = collections.Counter(outcomes)
    print(counts)
    assert sum(counts.values()) == 800
    assert {code for _, code in counts} <= {200, 500, 503}, counts
    assert counts[True, 200] > 400, counts
    until = time.monotonic() + 60
    while len(replicas(cluster)) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert second in replicas(cluster)


def test_a_stop_answers_what_was_accepted_and_ends_cleanly(running):
    cluster, command, address = running
    content, codes = services.encode(services.PICTURE), []

    def ask():
        with httpx.Client(timeout=30) as client:
            while not codes or codes[-1] == 200:
                codes.append(client.post(f"{address}/predict", content=content).status_code)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask) for _ in range(4)]
        while len(codes) < 50:
            time.sleep(0.005)
        command.send_signal(signal.SIGTERM)
        assert command.wait(timeout=60) == 0
        for asked in asking:
            asked.result()
    print(collections.Counter(codes))
    assert set(codes) <= {200, 404, 503}
    assert not replicas(cluster)


def test_a_serve_config_starts_it_and_sets_the_budget_of_replicas(cluster, served, tmp_path):
    _, environment = cluster
    port, command = services.free_port(), [pathlib.Path(sys.executable).parent / "serve", "run", tmp_path / "app.yaml"]
    application = {
        "name": "sdpoint",
        "route_prefix": "/",
        "import_path": "sdpoint_jax.serving.ray_serve:build_app",
        "args": {"artefact": str(served), "objective_ms": 2000, "batch_sizes": "1,4"},
        "deployments": [{"name": "Service", "user_config": {"instances": ["p01_r0.50"]}}],
    }
    command[-1].write_text(json.dumps({"http_options": {"port": port}, "applications": [application]}))
    with services.started(command, port, environment) as (_, address):
        assert httpx.get(f"{address}/instances").json()["batch_sizes"] == [1, 4]
        answer = httpx.post(f"{address}/predict", content=services.encode(services.PICTURE)).json()
        assert answer["instance"] == "p01_r0.50"
