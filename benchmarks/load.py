"""An open-loop client for the service: requests leave when the trace says so, whether or not answers have come.

    python -m sdpoint_jax serve runs/cifar/sweep/artefact --objective-ms=100 &
    python benchmarks/load.py --artefact=runs/cifar/sweep/artefact --load=3 --requests=2000 --arrivals=arrivals.csv
    python benchmarks/load.py --artefact=runs/cifar/sweep/artefact --one-by-one=1000     # What HTTP adds.
    python benchmarks/load.py --artefact=runs/cifar/sweep/artefact --connections=32      # Throughput, and memory.

`--load` is the mean rate over what full resolution sustains by the profile; `--arrivals` a CSV file of times, scaled
to that rate, or else a Gamma process of coefficient of variation `--cv`. Requests are mixed: arrays and PNG files, half
of them with half of the objective as their deadline, a quarter with a limit of MACs. A few requests a second go before
and after, to see the instance come back. Every answer is compared with its instance's own logits. Prints the share
answered in time and the rest beside what the simulator (serving.py) predicts for the same requests.
"""

import argparse
import asyncio
import collections
import dataclasses
import gc
import io
import json
import pathlib
import re
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence

import numpy as np
import serving
from PIL import Image

from sdpoint_jax.choice.selection import check_device
from sdpoint_jax.serving.controller import Controller, LatencyTable
from sdpoint_jax.serving.predictor import Predictor

# Connections: open before the first request, as those of a proxy are; and at most, later ones wait, and that counts.
_OPEN_CONNECTIONS, _CONNECTIONS = 512, 2048
DEFAULT_MACHINE = serving.Machine()
_MEASURED_REQUESTS = 1200
_OVERLOAD = 1.5  # Of the measurement before the load, over what the quickest instance sustains.
_CALM_GAP = 0.1  # Seconds between the requests before and after the load.
_HEADERS = ("requests", "lost", "wrong", "in_time", "top1", "refused", "late", "p50_ms", "p99_ms")


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request to send.

    Attributes:
        at: seconds since the start.
        image: its number.
        kind: of its file: `npy` or `png`.
        patience: seconds until its deadline.
        max_macs: its limit, if it has one.
    """

    at: float
    image: int
    kind: str
    patience: float
    max_macs: float | None = None

    @property
    def path(self) -> str:
        """Returns the path and query of its address."""
        limit = f"&max_macs={self.max_macs:.0f}" if self.max_macs else ""
        return f"/predict?top=1&deadline_ms={1e3 * self.patience:.3f}{limit}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        ask: the request.
        done: seconds since the start when it ended.
        status: of HTTP; 0 for no answer.
        answer: as the service gave it; None without one.
    """

    ask: Ask
    done: float
    status: int
    answer: dict | None

    @property
    def seconds(self) -> float:
        """Returns the time from when it should have been sent to its end."""
        return self.done - self.ask.at


class Client:
    """A pool of HTTP connections that are kept open."""

    def __init__(self, url: str):
        """Connects to nothing yet."""
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._free: list = []
        self._slots = asyncio.Semaphore(_CONNECTIONS)

    async def connect(self, count: int) -> None:
        """Opens connections for later."""
        for _ in range(count):
            self._free.append(await asyncio.open_connection(self._host, self._port))

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Sends one request; returns status and body."""
        async with self._slots:
            while self._free and self._free[-1][0].at_eof():  # The service has closed it: it was idle for too long.
                self._free.pop()[1].close()
            reader, writer = self._free.pop() if self._free else await asyncio.open_connection(self._host, self._port)
            head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            content = await reader.readexactly(int(re.search(rb"\r\ncontent-length: *(\d+)", answer)[1]))
            if b"\r\nconnection: close" not in answer:
                self._free.append((reader, writer))
            else:
                writer.close()
            return int(answer.split(None, 2)[1]), content


def load_arrivals(source: str, requests: int, rate: float, cv: float, seed: int) -> np.ndarray:
    """Returns that many times, of that mean rate: a window of the file, or a Gamma process."""
    times = serving.unit_arrivals(source or f"gamma:{cv:g}", requests, seed)
    start = np.random.default_rng(seed).integers(0, max(1, len(times) - requests + 1))
    window = times[start : start + requests] - times[start]
    return window * len(window) / window[-1] / rate


def mix(times: Sequence[float], images: int, objective: float, macs: Sequence[float], seed: int) -> list[Ask]:
    """Makes mixed requests of the arrival times; see the module."""
    rng = np.random.default_rng([seed, 4])
    return [
        Ask(
            at,
            number % images,
            ("npy", "png")[rng.integers(2)],
            objective / (1, 2)[rng.integers(2)],
            float(rng.choice(macs)) if rng.integers(4) == 0 else None,
        )
        for number, at in enumerate(times)
    ]


async def send(url: str, asks: Sequence[Ask], bodies: dict[str, Sequence[bytes]]) -> list[Outcome]:
    """Sends the requests at their times, and waits for what comes back."""
    client = Client(url)
    await client.connect(min(len(asks), _OPEN_CONNECTIONS))
    start = time.perf_counter()

    async def one(ask):
        await asyncio.sleep(ask.at - (time.perf_counter() - start))
        try:
            status, content = await client.post(ask.path, bodies[ask.kind][ask.image])
        except (OSError, asyncio.IncompleteReadError):
            return Outcome(ask, time.perf_counter() - start, 0, None)
        return Outcome(ask, time.perf_counter() - start, status, json.loads(content) if status == 200 else None)

    return await asyncio.gather(*map(one, asks))


def summarize(outcomes: Sequence[Outcome], top1: dict[str, float]) -> dict:
    """Summarises what became of the requests: shares in 0..1."""
    answered = [outcome for outcome in outcomes if outcome.answer]
    in_time = [outcome for outcome in answered if outcome.seconds <= outcome.ask.patience]
    p50, p99 = np.percentile([1e3 * outcome.seconds for outcome in answered] or [np.nan], [50, 99])
    statuses = collections.Counter(outcome.status for outcome in outcomes)
    return {
        "requests": len(outcomes),
        "lost": statuses[0],
        "in_time": len(in_time) / len(outcomes),
        "top1": statistics.fmean(top1[outcome.answer["instance"]] for outcome in in_time) if in_time else np.nan,
        "refused": statuses[503] / len(outcomes),
        "late": (len(answered) - len(in_time) + statuses[504]) / len(outcomes),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "statuses": dict(statuses),
        "instances": dict(collections.Counter(outcome.answer["instance"] for outcome in answered).most_common()),
    }


def measure_machine(
    url: str, table: LatencyTable, objective: float, bodies: dict[str, Sequence[bytes]]
) -> serving.Machine:
    """Measures what the simulator has to know of service and client: what requests cost beside their batches.

    Sends requests that are refused, and then more than the quickest instance answers, so that there is no pause.

    Args:
        url: of the service, idle, on this machine.
        table: that it plans with.
        objective: of the service, seconds.
        bodies: of requests like those to come, by kind.
    """
    both = [body for pair in zip(*bodies.values()) for body in pair]
    refused = ask_closely(url, "/predict?top=1&deadline_ms=0.001", both, 16, _MEASURED_REQUESTS)
    read = refused.cpu_seconds / _MEASURED_REQUESTS
    gap = float(table.per_image.min()) / _OVERLOAD
    kinds, images = list(bodies), len(both) // len(bodies)
    asks = [Ask(n * gap, n % images, kinds[n % len(kinds)], objective) for n in range(_MEASURED_REQUESTS)]
    before = _busy_seconds(url)
    outcomes = [outcome for outcome in asyncio.run(send(url, asks, bodies)) if outcome.answer]
    answer = (_busy_seconds(url) - before - read * len(asks)) / len(outcomes)
    outcomes = sorted(outcomes, key=lambda outcome: outcome.done)[len(outcomes) // 4 :]
    sizes = np.array([outcome.answer["batch_size"] for outcome in outcomes])
    took = np.array([outcome.answer["compute_ms"] / 1e3 for outcome in outcomes])
    rows = [table.index_of(outcome.answer["instance"]) for outcome in outcomes]
    paces = np.log(took / table.seconds[rows, np.searchsorted(table.batch_sizes, sizes)])
    passed, batches = outcomes[-1].done - outcomes[0].done, float((1 / sizes).sum())
    return serving.Machine(
        bias=0.0,
        noise=float(paces.std()),
        pace=float(np.exp(paces.mean())),
        handover_seconds=max(0.0, (passed - float((took / sizes).sum())) / batches),
        read_seconds=read,
        answer_seconds=max(0.0, answer),
    )


def predict_outcome(
    asks: Sequence[Ask],
    table: LatencyTable,
    policy: str,
    objective: float,
    machine: serving.Machine = DEFAULT_MACHINE,
    seeds: int = 5,
) -> dict:
    """Simulates the same requests on a machine; returns numbers of the same names, means over the seeds."""
    times, patience = np.array([ask.at for ask in asks]), np.array([ask.patience for ask in asks])
    limits, found = [ask.max_macs for ask in asks], []
    for seed in range(seeds):
        control = Controller(table, policy=policy, objective=objective)
        found.append(serving.simulate(control, times, patience, machine, seed, limits).summary())
    numbers = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
    late = numbers["late"] + numbers["given_up"]
    names = {"in_time": "attainment", "top1": "accuracy", "refused": "refused", "p50_ms": "p50_ms", "p99_ms": "p99_ms"}
    return {"requests": len(asks), "late": late} | {ours: numbers[theirs] for ours, theirs in names.items()}


def seconds_to_return(before: Sequence[Outcome], after: Sequence[Outcome], end: float) -> float:
    """Returns the seconds after the load until each answer is by the instance that answered before it; or NaN."""
    usual = collections.Counter(outcome.answer["instance"] for outcome in before if outcome.answer).most_common(1)[0][0]
    back = np.nan
    for outcome in reversed(after):
        if not outcome.answer or outcome.answer["instance"] != usual:
            break
        back = outcome.ask.at - end
    return back


def count_wrong(outcomes: Sequence[Outcome], predictor: Predictor, images: np.ndarray, loosest: float = 1e-4) -> int:
    """Counts the answers that are not their named instance's own logits, to `loosest` of the largest."""
    expected, wrong = {}, 0
    for outcome in outcomes:
        if not outcome.answer:
            continue
        name = outcome.answer["instance"]
        if name not in expected:
            expected[name] = predictor.predict(list(images), instance=name)
        logits = expected[name][outcome.ask.image]
        wrong += bool(np.abs(logits - outcome.answer["logits"]).max() > loosest * np.abs(logits).max())
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
        return added

    added = asyncio.run(run())
    p50, p95, p99 = np.percentile(added, [50, 95, 99])
    return {"requests": count, "answered": len(added), "added_p50_ms": p50, "added_p95_ms": p95, "added_p99_ms": p99}


@dataclasses.dataclass(frozen=True)
class Closed:
    """What became of requests that connections sent one after the other.

    Attributes:
        statuses: of HTTP, and how many had each.
        answers: as the service gave them.
        ends: seconds since the start when each request ended, ascending.
        cpu_seconds: of service and client, without computing the batches.
    """

    statuses: dict[int, int]
    answers: Sequence[dict]
    ends: Sequence[float]
    cpu_seconds: float


def ask_closely(url: str, path: str, bodies: Sequence[bytes], connections: int, count: int) -> Closed:
    """Sends requests over several connections, each of which sends the next one when it has its answer."""
    statuses, contents, ends, numbers = collections.Counter(), [], [], iter(range(count))

    async def ask(client):
        for number in numbers:
            status, content = await client.post(path, bodies[number % len(bodies)])
            ends.append(time.perf_counter() - start)
            statuses[status] += 1
            if status == 200:
                contents.append(content)

    async def run():
        client = Client(url)
        await asyncio.gather(*(ask(client) for _ in range(connections)))

    before, start = _busy_seconds(url), time.perf_counter()
    asyncio.run(run())
    return Closed(dict(statuses), [json.loads(content) for content in contents], ends, _busy_seconds(url) - before)


def _busy_seconds(url: str) -> float:
    """Returns the CPU time of service and client so far, without that of batches (of a net with one thread)."""
    metrics = read_metrics(url)
    batches = sum(value for name, value in metrics.items() if name.startswith("sdpoint_batch_seconds_sum"))
    return metrics["process_cpu_seconds_total"] - batches + time.process_time()


def throughput(url: str, bodies: Sequence[bytes], connections: int, count: int) -> dict:
    """Measures how many requests a second are answered if each connection sends one after the other."""
    before = resident_mib(url)
    found = ask_closely(url, "/predict?top=1&deadline_ms=600000", bodies, connections, count)
    return {
        "requests": count,
        "statuses": found.statuses,
        "images_per_second": count / found.ends[-1],
        "mean_batch": statistics.fmean(answer["batch_size"] for answer in found.answers),
        "resident_mib_before": before,
        "resident_mib_after": resident_mib(url),
    }


def read_metrics(url: str) -> dict[str, float]:
    """Returns the service's metrics by their names and labels."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def resident_mib(url: str) -> float:
    """Returns the service's resident memory, by its metrics."""
    return read_metrics(url)["process_resident_memory_bytes"] / (1 << 20)


def bare_rate(predictor: Predictor, batch_size: int, seconds: float = 5.0) -> float:
    """Returns the images a second of `predict` at full resolution, without the service."""
    batch, done = np.zeros((batch_size, *predictor.image_shape), np.uint8), 0
    predictor.predict(batch, instance="full")
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        predictor.predict(batch, instance="full")
        done += batch_size
    return done / (time.perf_counter() - start)


def run_load(options: argparse.Namespace, service: dict, predictor: Predictor, images: np.ndarray) -> dict:
    """Sends the load, and few requests before and after it; prints and returns the outcome and the prediction."""
    rows = [row for row in predictor.rows if row.name in {known["instance"] for known in service["instances"]}]
    device = check_device(rows, predictor.device)  # The service's, if both have the same environment.
    table = LatencyTable.from_rows(rows, device=device, batch_sizes=service["batch_sizes"])
    objective, top1 = service["objective_ms"] / 1e3, dict(zip(table.names, table.top1))
    rate = options.load / float(table.per_image[np.argmax(table.macs)])
    begin = options.calm_seconds
    times = begin + load_arrivals(options.arrivals, options.requests, rate, options.cv, options.seed)
    asks = mix(times, len(images), objective, sorted(table.macs)[len(table.macs) // 2 :], options.seed)
    calm = np.arange(0, begin, _CALM_GAP)
    end = float(times[-1])
    around = [Ask(at, 0, "npy", objective) for at in [*calm, *(end + _CALM_GAP + calm)]]
    bodies = {"npy": [encode(image) for image in images], "png": [encode_png(image) for image in images]}
    machine = measure_machine(options.url, table, objective, bodies)
    gc.collect()
    gc.freeze()  # JAX is a million objects: to look through them in the middle would hold requests back.
    outcomes = asyncio.run(send(options.url, asks + around, bodies))
    during, before, after = outcomes[: len(asks)], outcomes[len(asks) :][: len(calm)], outcomes[-len(calm) :]
    measured = summarize(during, top1) | {"wrong": count_wrong(outcomes, predictor, images)}
    predicted = predict_outcome(asks, table, options.policy, objective, machine)
    print(
        f"{rate:.0f} requests/s, {options.load:g} times what full resolution sustains; objective {1e3 * objective:g} ms"
    )
    costs = {name: 1e3 * getattr(machine, f"{name}_seconds") for name in ("read", "answer", "handover")}
    print(f"measured for the simulator: {', '.join(f'{name} {ms:.2f} ms' for name, ms in costs.items())}", end=", ")
    print(f"batches take {machine.pace:.2f} of the profile and vary by {100 * machine.noise:.1f} %")
    print("".join([f"{'':12}", *(f"{name:>10}" for name in _HEADERS)]))
    for label, numbers in (("service", measured), ("simulator", predicted)):
        print(
            "".join(
                [f"{label:12}", *(f"{numbers[name]:>10.4g}" if name in numbers else f"{'':>10}" for name in _HEADERS)]
            )
        )
    back = seconds_to_return(before, after, end)
    print(
        f"before: {summarize(before, top1)['instances']}\nunder load: {measured['instances']}; {measured['statuses']}"
    )
    print(f"after: {summarize(after, top1)['instances']}; back {back:.2f} s after the last of the load")
    return {
        "rate": rate,
        "service": measured,
        "machine": dataclasses.asdict(machine),
        "simulator": predicted,
        "back_seconds": back,
    }


def encode(image: np.ndarray) -> bytes:
    """Returns an image as an .npy array's bytes."""
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """Returns an image as a PNG file's bytes."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service, on this machine")
    parser.add_argument("--artefact", required=True, help="that it serves, to compare answers with")
    parser.add_argument("--load", type=float, default=1.0, help="over what full resolution sustains")
    parser.add_argument("--requests", type=int, default=2000, help="how many")
    parser.add_argument("--arrivals", default="", help="CSV file of times; a Gamma process without one")
    parser.add_argument("--cv", type=float, default=1.0, help="of the Gamma process's gaps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", default="headroom", help="of the service, for the simulator")
    parser.add_argument("--calm-seconds", type=float, default=3.0, help="before and after the load")
    parser.add_argument("--image-size", type=int, default=0, help="of what is sent; the net's own by default")
    parser.add_argument("--one-by-one", type=int, default=0, help="requests that are sent one after the other instead")
    parser.add_argument("--connections", type=int, default=0, help="that each send one after the other instead")
    parser.add_argument(
        "--bare-batch", type=int, default=0, help="time `predict` alone, in batches of that size, instead"
    )
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def main() -> None:
    """Runs what the command line asks for."""
    options = parse()
    predictor = Predictor.load(options.artefact)
    height, width, channels = predictor.image_shape
    shape = (options.image_size or height, options.image_size or width, channels)
    images = np.random.default_rng(0).integers(0, 256, (64, *shape), np.uint8)
    if options.bare_batch:
        result = {"images_per_second": bare_rate(predictor, options.bare_batch)}
    elif options.one_by_one:
        result = one_by_one(options.url, [encode(image) for image in images], options.one_by_one)
    elif options.connections:
        result = throughput(options.url, [encode(image) for image in images], options.connections, options.requests)
    else:
        service = json.load(urllib.request.urlopen(f"{options.url}/instances"))
        result = run_load(options, service, predictor, images)
    if options.json:
        content = {"settings": vars(options), "result": result}
        pathlib.Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    if "service" not in result:
        print(
            "\n".join(
                f"{name:24}{value:.4g}" if isinstance(value, float) else f"{name:24}{value}"
                for name, value in result.items()
            )
        )


if __name__ == "__main__":
    main()
