"""An open-loop client for the service: requests leave when the trace says so, whether or not answers have come.

    python -m sdpoint_jax serve runs/digits/sweep/artefact --objective-ms=100 &
    python benchmarks/load.py --artefact=runs/digits/sweep/artefact --load=3 --seconds=20 --json=load.json

`--load` is the mean rate over what full resolution sustains by the profile; `--arrivals` a CSV file of times, scaled
to that rate, or else a Gamma process of coefficient of variation `--cv`. Every answer is compared with its instance's
own logits. Prints the share answered within the objective, mean accuracy of the answers by the table, refusals, p50 and
p99, the instances over time; and, `--one-by-one`, what HTTP, queue and controller add to computing.
"""

import argparse
import asyncio
import collections
import dataclasses
import io
import json
import pathlib
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence

import numpy as np

from sdpoint_jax.serving.predictor import Predictor

_CONNECTIONS = 256  # At most; requests beyond them wait for one, and their time counts.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        sent, done: seconds since the start, as the trace asked for and as it ended.
        status: of HTTP; 0 for no answer.
        image: number of the image that was sent.
        answer: as the service gave it; None without one.
    """

    sent: float
    done: float
    status: int
    image: int
    answer: dict | None


class Client:
    """A pool of HTTP connections that are kept open."""

    def __init__(self, url: str):
        """Connects to nothing yet."""
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._free: list = []
        self._slots = asyncio.Semaphore(_CONNECTIONS)

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Sends one request; returns status and body."""
        async with self._slots:
            reader, writer = self._free.pop() if self._free else await asyncio.open_connection(self._host, self._port)
            head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status = int((await reader.readline()).split()[1])
            length, keep = 0, True
            while (line := (await reader.readline()).strip().lower()) != b"":
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
                keep = keep and line != b"connection: close"
            content = await reader.readexactly(length)
            if keep:
                self._free.append((reader, writer))
            else:
                writer.close()
            return status, content


def load_arrivals(path: str, seconds: float, rate: float, cv: float, seed: int) -> np.ndarray:
    """Returns arrival times within `seconds`, of that mean rate: a window of the file, or a Gamma process."""
    if path:
        times = np.loadtxt(path, delimiter=",", ndmin=1)
        times = times[:, 0] if times.ndim > 1 else times
        scaled = (times - times[0]) * (len(times) / (times[-1] - times[0])) / rate
        start = np.random.default_rng(seed).uniform(0, max(0.0, scaled[-1] - seconds))
        chosen = scaled[(scaled >= start) & (scaled < start + seconds)] - start
        return chosen
    gaps = np.random.default_rng(seed).gamma(1 / cv**2, cv**2 / rate, int(2 * rate * seconds + 50))
    times = np.cumsum(gaps)
    return times[times < seconds]


async def send(url: str, arrivals: Sequence[float], bodies: Sequence[bytes]) -> list[Outcome]:
    """Sends the requests at their times, and waits for what comes back."""
    client, start = Client(url), time.perf_counter()

    async def one(number, at):
        await asyncio.sleep(at - (time.perf_counter() - start))
        image = number % len(bodies)
        try:
            status, content = await client.post("/predict?top=1", bodies[image])
        except (OSError, asyncio.IncompleteReadError, IndexError):
            return Outcome(at, time.perf_counter() - start, 0, image, None)
        answer = json.loads(content) if status == 200 else None
        return Outcome(at, time.perf_counter() - start, status, image, answer)

    return await asyncio.gather(*(one(number, at) for number, at in enumerate(arrivals)))


def summarize(outcomes: Sequence[Outcome], rows: dict[str, dict], objective: float) -> dict:
    """Summarises what became of the requests."""
    answered = [outcome for outcome in outcomes if outcome.answer]
    seconds = sorted(outcome.done - outcome.sent for outcome in answered) or [float("nan")]
    in_time = sum(outcome.done - outcome.sent <= objective for outcome in answered)
    accuracies = [rows[outcome.answer["instance"]]["top1"] for outcome in answered] or [float("nan")]
    return {
        "requests": len(outcomes),
        "statuses": dict(collections.Counter(outcome.status for outcome in outcomes)),
        "attainment": in_time / max(1, len(outcomes)),
        "mean_top1": statistics.fmean(accuracies),
        "p50_ms": 1e3 * seconds[len(seconds) // 2],
        "p99_ms": 1e3 * seconds[int(0.99 * (len(seconds) - 1))],
        "instances": dict(collections.Counter(outcome.answer["instance"] for outcome in answered)),
    }


def count_wrong(outcomes: Sequence[Outcome], predictor: Predictor, images: np.ndarray) -> int:
    """Counts the answers that are not their named instance's own logits, to 1e-4 of the largest."""
    expected, wrong = {}, 0
    for outcome in outcomes:
        if not outcome.answer:
            continue
        name = outcome.answer["instance"]
        if name not in expected:
            expected[name] = predictor.predict(images, instance=name)
        logits = expected[name][outcome.image]
        wrong += bool(np.abs(logits - outcome.answer["logits"]).max() > 1e-4 * np.abs(logits).max())
    return wrong


def one_by_one(url: str, bodies: Sequence[bytes], count: int) -> dict:
    """Measures, one request after the other, what is added to computing."""

    async def run():
        client, added = Client(url), []
        for number in range(count):
            start = time.perf_counter()
            status, content = await client.post("/predict?top=1", bodies[number % len(bodies)])
            took = 1e3 * (time.perf_counter() - start)
            if status == 200:
                added.append(took - json.loads(content)["compute_ms"])
        return sorted(added)

    added = asyncio.run(run())
    return {"n": len(added), "added_p50_ms": added[len(added) // 2], "added_p95_ms": added[int(0.95 * len(added))]}


def encode(image: np.ndarray) -> bytes:
    """Returns an image as an .npy array's bytes."""
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service, on this machine")
    parser.add_argument("--artefact", required=True, help="that it serves, to compare answers with")
    parser.add_argument("--load", type=float, default=1.0, help="over what full resolution sustains")
    parser.add_argument("--seconds", type=float, default=20.0, help="of sending")
    parser.add_argument("--arrivals", default="", help="CSV file of times; a Gamma process without one")
    parser.add_argument("--cv", type=float, default=1.0, help="of the Gamma process's gaps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-by-one", type=int, default=0, help="requests that are sent one after the other instead")
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def main():
    options = parse()
    service = json.load(urllib.request.urlopen(f"{options.url}/instances"))
    rows = {row["instance"]: row for row in service["instances"]}
    objective = service["objective_ms"] / 1e3
    full = max(service["instances"], key=lambda row: row["macs"])
    sustained = max(1e3 * size / ms for size, ms in zip(service["batch_sizes"], full["ms"]))
    images = np.random.default_rng(0).integers(0, 256, (64, *service["image_shape"]), np.uint8)
    bodies = [encode(image) for image in images]
    if options.one_by_one:
        result = one_by_one(options.url, bodies, options.one_by_one)
    else:
        rate = options.load * sustained
        arrivals = load_arrivals(options.arrivals, options.seconds, rate, options.cv, options.seed)
        outcomes = asyncio.run(send(options.url, arrivals, bodies))
        result = {"full_resolution_sustains": sustained, "rate": rate} | summarize(outcomes, rows, objective)
        result["wrong"] = count_wrong(outcomes, Predictor.load(options.artefact), images)
    if options.json:
        pathlib.Path(options.json).write_text(
            json.dumps({"settings": vars(options), "result": result}, indent=1) + "\n"
        )
    for name, value in result.items():
        print(f"{name:28}{value:.4g}" if isinstance(value, float) else f"{name:28}{value}")


if __name__ == "__main__":
    main()
