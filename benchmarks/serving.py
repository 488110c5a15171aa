"""What a service answers in time, and how accurately, when its load changes: policies of the controller, simulated.

    python benchmarks/serving.py --table=runs/cifar/sweep/sweep.json --arrivals=arrivals.csv --plot=serving.png

The controller plans with a table of profiled latencies; the simulated machine takes other times: each instance is off
by a factor of its own, each batch by noise, and from time to time everything may be slow. Time is scaled so that the
mean rate of arrivals is `--loads` times what full resolution sustains. Attainment is the share of all requests that are
answered within their deadline; accuracy is the mean top-1, by the table, of these answers; their product counts an
answer that misses its deadline as a wrong one. A policy followed by `/open`, as `slackfit/open`, refuses nothing and
gives nothing up. It needs no JAX, and the same seeds give the same numbers.
"""

import argparse
import collections
import dataclasses
import functools
import heapq
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from sdpoint_jax.choice.table import InstanceRow, Latency
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.serving.controller import Batch, Controller, LatencyTable, Refused, Request
from sdpoint_jax.serving.observed import Delay

PRESETS = {
    "small": dict(loads="0.5,1,2", seeds=3, policies="full,cheapest,slackfit,headroom"),
    "full": dict(loads="0.3,0.5,1,2,4", seeds=10, policies="full,cheapest,slackfit,headroom,headroom:0.5"),
}
HALVES = {"both": (0.0, 1.0), "first": (0.0, 0.5), "second": (0.5, 1.0)}
COLUMNS = {"attainment": 100, "accuracy": 100, "effective": 100, "refused": 100, "p50_ms": 1, "p99_ms": 1}

# MACs of ResNet-20 for an image of 32x32, by block and ratio.
RESNET20_FULL = 40_813_184
RESNET20 = {
    0.5: (14074496, 17613440, 21152384, 23904896, 27443840, 30982784, 33735296, 37274240, 40813184),
    0.75: (25215616, 27280000, 29344384, 30950016, 33014400, 35078784, 36684416, 38748800, 40813184),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """How the simulated machine differs from the table.

    Attributes:
        bias: standard deviation of the logarithm of each instance's own factor.
        noise: likewise of each batch.
        slow_factor: of the times of batches that start in a slow phase.
        slow_seconds: how long a slow phase lasts.
        slow_every: seconds from the start of one to that of the next; the first starts after this time.
        pace: of the times of all batches, over the profile.
        handover_seconds: that pass at each batch beside computing it.
        read_seconds: that HTTP needs for a request before the controller sees it, one request after the other.
        answer_seconds: likewise to write an answer. Answers go before requests.
    """

    bias: float = 0.03
    noise: float = 0.08
    slow_factor: float = 1.0
    slow_seconds: float = 0.0
    slow_every: float = math.inf
    pace: float = 1.0
    handover_seconds: float = 0.0
    read_seconds: float = 0.0
    answer_seconds: float = 0.0

    def is_slow(self, now: float) -> bool:
        """Whether a slow phase goes on."""
        return now >= self.slow_every and now % self.slow_every < self.slow_seconds


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of N requests.

    Attributes:
        arrivals: [N], seconds.
        deadlines: [N], seconds.
        answered: [N], seconds; NaN where there was no answer.
        top1: [N], accuracy of the instance that answered; NaN likewise.
        refused: [N], whether it was refused at once.
        batches: all that ran, in the order in which they started.
    """

    arrivals: np.ndarray
    deadlines: np.ndarray
    answered: np.ndarray
    top1: np.ndarray
    refused: np.ndarray
    batches: Sequence[Batch]

    def summary(self) -> dict[str, float]:
        """The numbers of a row: shares in 0..1, latencies in milliseconds of those that were answered."""
        in_time = self.answered <= self.deadlines
        latencies = 1e3 * (self.answered - self.arrivals)[~np.isnan(self.answered)]
        p50, p99 = np.percentile(latencies, [50, 99]) if len(latencies) else (math.nan, math.nan)
        return {
            "attainment": float(in_time.mean()),
            "accuracy": float(self.top1[in_time].mean()) if in_time.any() else math.nan,
            "effective": float(self.top1[in_time].sum() / len(in_time)),
            "refused": float(self.refused.mean()),
            "late": float((self.answered > self.deadlines).mean()),
            "given_up": float((np.isnan(self.answered) & ~self.refused).mean()),
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "mean_batch": statistics.fmean(len(batch.requests) for batch in self.batches) if self.batches else math.nan,
            "switches": sum(a.instance != b.instance for a, b in zip(self.batches, self.batches[1:])),
        }


def simulate(
    controller: Controller,
    arrivals: np.ndarray,
    patience: np.ndarray,
    machine: Machine,
    seed: int,
    max_macs: Sequence[float | None] | None = None,
) -> Outcome:
    """Lets a controller answer requests on a simulated machine.

    Args:
        controller: a new one.
        arrivals: [N], ascending, seconds.
        patience: [N], seconds from arrival to deadline.
        machine: how long batches take.
        seed: of its bias and noise.
        max_macs: of each request, where they have limits.

    Returns:
        the outcome when all has been answered or given up.
    """
    simulation = _Simulation(controller, machine, seed)
    limits = max_macs or [None] * len(arrivals)
    return simulation.run(arrivals, arrivals + patience, limits)


class _Simulation:
    """Lets two things work side by side: HTTP reads requests and writes answers, and the workers run batches."""

    def __init__(self, controller: Controller, machine: Machine, seed: int):
        self._controller, self._table, self._machine = controller, controller.table, machine
        self._rng = np.random.default_rng([seed, 1])
        self._bias = dict(zip(self._table.names, np.exp(self._rng.normal(0, machine.bias, len(self._table.names)))))
        self._running: list[tuple[float, int, Batch]] = []  # By their ends.
        self._batches: list[Batch] = []
        self._answers: collections.deque[tuple[float, Request, str]] = collections.deque()  # With the batch's end.
        self._delay, self._watched = Delay(), 0.0

    def run(self, arrivals: np.ndarray, deadlines: np.ndarray, limits: Sequence[float | None]) -> Outcome:
        total, came, now = len(arrivals), 0, 0.0
        times = arrivals.tolist()
        self._answered, self._top1 = np.full(total, np.nan), np.full(total, np.nan)
        self._refused = np.zeros(total, bool)
        http: tuple[float, Callable[[float], None]] | None = None  # When it is done, and what happens then.
        while True:
            if http is None and self._answers:
                http = now + self._machine.answer_seconds, self._answer
            elif http is None and came < total and times[came] <= now:
                request = Request(came, float(deadlines[came]), max_macs=limits[came])
                http = now + self._machine.read_seconds, functools.partial(self._submit, request)
                came += 1
            http_done = http[0] if http else times[came] if came < total else math.inf
            batch_done = self._running[0][0] if self._running else math.inf
            now = min(http_done, batch_done)
            if now == math.inf:
                return Outcome(arrivals, deadlines, self._answered, self._top1, self._refused, self._batches)
            if batch_done < http_done:
                self._finish_batch(now)
            elif http:
                _, happen = http
                http = None
                happen(now)
            self._start_batches(now)

    def _submit(self, request: Request, now: float) -> None:
        self._delay.watch(0.0, now - self._watched)
        self._watched = now
        asked = dataclasses.replace(request, deadline=request.deadline - self._delay.seconds)
        self._refused[request.id] = isinstance(self._controller.submit(asked, now), Refused)

    def _answer(self, now: float) -> None:
        computed, request, instance = self._answers.popleft()
        self._delay.count(now - computed)
        self._answered[request.id] = now
        self._top1[request.id] = self._table.top1[self._table.index_of(instance)]

    def _finish_batch(self, now: float) -> None:
        _, _, batch = heapq.heappop(self._running)
        self._controller.observe(batch, now - batch.start, now)
        self._answers += [(now, request, batch.instance) for request in batch.requests]

    def _start_batches(self, now: float) -> None:
        table, machine = self._table, self._machine
        while (batch := self._controller.next_batch(now)) is not None:
            profiled = table.seconds[table.index_of(batch.instance), table.batch_sizes.index(batch.batch_size)]
            factor = machine.pace * (machine.slow_factor if machine.is_slow(now) else 1.0)
            seconds = profiled * self._bias[batch.instance] * factor * math.exp(self._rng.normal(0, machine.noise))
            heapq.heappush(self._running, (now + seconds + machine.handover_seconds, len(self._batches), batch))
            self._batches.append(batch)


def made_up_rows(
    lowest_top1: float = 0.84, batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32), device: str = "cpu"
) -> list[InstanceRow]:
    """Makes up a table like that of a ResNet-20, to try things without one.

    Its MACs are true. Its latencies are near those of a processor with two cores (2.4 ms for one image at full
    resolution, 75 ms for 32), or of an accelerator that takes about as long for 32 images as for one; its accuracies
    run from `lowest_top1` for the cheapest instance to 0.915.

    Args:
        lowest_top1: of `p01_r0.50`.
        batch_sizes: that were "measured".
        device: `cpu` or `accelerator`.
    """
    names = [("full", RESNET20_FULL)]
    names += [(f"p{k:02d}_r{ratio:.2f}", macs[k - 1]) for k in range(1, 10) for ratio, macs in RESNET20.items()]
    cheapest = RESNET20[0.5][0] / RESNET20_FULL
    rows = []
    for name, macs in names:
        instance, share = SDPointInstance.from_name(name), macs / RESNET20_FULL
        lost = (0.913 - lowest_top1) * ((1 - share) / (1 - cheapest)) ** 1.3
        lost = 0.0 if name == "full" else 0.002 + lost * (1.0 if instance.ratio == 0.5 else 0.85)
        latencies = tuple(_made_up_latency(device, share, size) for size in batch_sizes)
        rows.append(InstanceRow(instance, macs, 272_474, 0.915 - lost, None, 0.3, 10_000, "nothing", 0, latencies))
    return rows


def _made_up_latency(device, share, size):
    if device == "cpu":
        ms = 0.25 + share * size * (2.15 + 0.19 * math.log2(size) / 5)
    else:
        ms = 0.6 + share * (1.8 + 0.06 * size)
    return Latency(f"made up {device}", "none", "float32", size, ms, 1.14 * ms, 0, None, 0.0, {})


def read_rows(path: str) -> list[InstanceRow]:
    """Reads the rows of a sweep's table.

    Args:
        path: of a JSON file: the list of rows, or an object that has it as `instances` or `table`.

    Raises:
        ValueError: it is not one; names the file.
    """
    try:
        content = json.loads(pathlib.Path(path).read_bytes())
        if isinstance(content, dict):
            content = content.get("instances", content.get("table"))
        return [InstanceRow.from_record(_without_derived(record)) for record in content]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--table={path}: {error}") from None


def _without_derived(record):
    """Returns a record of a row without what sweep.json has beside it, which follows from the rest."""
    own, timed = ({field.name for field in dataclasses.fields(kind)} for kind in (InstanceRow, Latency))
    latencies = [{key: latency[key] for key in latency.keys() & timed} for latency in record.get("latencies", ())]
    return {key: record[key] for key in record.keys() & own} | {"latencies": latencies}


def unit_arrivals(source: str, requests: int, seed: int, half: str = "both") -> np.ndarray:
    """Makes arrivals of one a second on average.

    Args:
        source: a CSV file with a line of names and then the times of arrival, in seconds, first in each line; or
            `gamma:CV`, gaps from a Gamma distribution with that coefficient of variation.
        requests: how many, of the Gamma process.
        seed: likewise; the times of a file are the same for every seed.
        half: of the file's requests: both, first or second.

    Returns:
        [N], ascending, from 0.

    Raises:
        ValueError: no such file or process.
    """
    kind, _, value = source.partition(":")
    if kind == "gamma":
        try:
            variation = float(value)
        except ValueError:
            variation = math.nan
        if not 0 < variation < math.inf:
            raise ValueError(f"--arrivals={source}: valid coefficients of variation are positive numbers")
        gaps = np.random.default_rng([seed, 2]).gamma(1 / variation**2, variation**2, requests)
        return np.cumsum(gaps) - gaps[0]
    try:
        times = np.sort(np.loadtxt(source, delimiter=",", skiprows=1, usecols=0, ndmin=1))
        if len(times) < 2 or not times[-1] > times[0]:
            raise ValueError("it needs two or more times")
    except (OSError, ValueError) as error:
        raise ValueError(f"--arrivals={source}: {error}") from None
    begin, end = (int(share * len(times)) for share in HALVES[half])
    times = times[begin:end]
    return (times - times[0]) * len(times) / (times[-1] - times[0])


def run(options: argparse.Namespace, table: LatencyTable, policy: str, load: float, seed: int) -> Outcome:
    """Simulates one policy under one load."""
    full = float(table.per_image[np.argmax(table.macs)])
    arrivals = unit_arrivals(options.arrivals, options.requests, seed, options.half) * full / (load * options.workers)
    low, high = options.deadlines_ms
    patience = np.random.default_rng([seed, 3]).uniform(low / 1e3, high / 1e3, len(arrivals))
    name, slash, _ = policy.partition("/open")
    control = Controller(
        table,
        objective=(low + high) / 2e3,
        policy=name,
        workers=options.workers,
        admission=not slash,
        gives_up=not slash,
        max_queue=len(arrivals) if slash else 1024,
    )
    return simulate(control, arrivals, patience, options.machine, seed)


def compare(options: argparse.Namespace, table: LatencyTable) -> list[dict]:
    """Runs every policy under every load with every seed, and prints a row of means and standard deviations for each.

    Returns:
        a record for each load and policy: `load`, `policy`, and for each number its `mean`, `sd` and `values`.
    """
    print("".join([f"{'load':>6} {'policy':<20}", *(f"{name:>18}" for name in COLUMNS), f"{'misses/full':>13}"]))
    records = []
    for load in options.loads:
        misses = {}
        for policy in options.policies:
            found = [run(options, table, policy, load, seed).summary() for seed in range(options.seeds)]
            record = {name: _statistics([numbers[name] for numbers in found]) for name in found[0]}
            records.append({"load": load, "policy": policy, **record})
            misses[policy] = 1 - record["attainment"]["mean"]
            cells = [f"{_show(record[name], scale):>18}" for name, scale in COLUMNS.items()]
            ratio = f"{misses[policy] / misses['full']:13.3f}" if misses.get("full") else f"{'-':>13}"
            print("".join([f"{load:>6g} {policy:<20}", *cells, ratio]), flush=True)
    return records


def _statistics(values):
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def _show(stats, scale):
    return f"{scale * stats['mean']:.2f} ±{scale * stats['sd']:.2f}"


def plot(outcomes: dict[str, Outcome], table: LatencyTable, path: str, title: str) -> None:
    """Draws load, instance and latency over time, a column for each policy.

    Args:
        outcomes: of the same arrivals, by policy.
        table: that they were planned with.
        path: of the PNG file.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(outcomes), 8.5), layout="constrained")
    grid = FigureCanvasAgg(figure).figure.subplots(3, len(outcomes), sharex=True, sharey="row", squeeze=False)
    for (policy, outcome), (load, instance, latency) in zip(outcomes.items(), grid.T, strict=True):
        numbers = outcome.summary()
        load.set_title(
            f"{policy}\n{100 * numbers['attainment']:.1f} % in time, top-1 {100 * numbers['accuracy']:.1f} %",
            fontsize=11,
        )
        _plot_load(load, outcome, table)
        _plot_instances(instance, outcome, table)
        _plot_latencies(latency, outcome)
        latency.set_xlabel("time (s)")
    for axes, label in zip(grid[:, 0], ("images per second", "top-1 of each batch's instance (%)", "latency (ms)")):
        axes.set_ylabel(label)
    for axes in grid[::2, 0]:
        axes.legend(loc="upper right", fontsize=8, markerscale=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _plot_load(axes, outcome, table):
    end = float(outcome.arrivals[-1])
    edges = np.linspace(0, end, 200)
    rates = np.histogram(outcome.arrivals, edges)[0] / np.diff(edges)
    answers = np.histogram(outcome.answered[~np.isnan(outcome.answered)], edges)[0] / np.diff(edges)
    axes.fill_between(edges[:-1], rates, step="post", color="0.8", label="requests")
    axes.step(edges[:-1], answers, where="post", color="tab:blue", linewidth=0.9, label="answers")
    full, fastest = table.per_image[np.argmax(table.macs)], table.per_image.min()
    axes.axhline(1 / full, color="black", linestyle=":", linewidth=1, label="full resolution sustains")
    axes.axhline(1 / fastest, color="tab:red", linestyle=":", linewidth=1, label="the fastest instance sustains")
    axes.set_ylim(0, 2.5 / fastest)


def _plot_instances(axes, outcome, table):
    starts = [batch.start for batch in outcome.batches]
    top1 = [100 * table.top1[table.index_of(batch.instance)] for batch in outcome.batches]
    sizes = [3 + len(batch.requests) for batch in outcome.batches]
    axes.scatter(starts, top1, s=sizes, color="tab:green", alpha=0.5, linewidths=0)
    axes.margins(y=0.15)


def _plot_latencies(axes, outcome):
    in_time = outcome.answered <= outcome.deadlines
    late = outcome.answered > outcome.deadlines
    latencies = 1e3 * (outcome.answered - outcome.arrivals)
    axes.scatter(outcome.arrivals[in_time], latencies[in_time], s=2, color="tab:blue", linewidths=0, label="in time")
    axes.scatter(outcome.arrivals[late], latencies[late], s=4, color="tab:red", linewidths=0, label="too late")
    missing = np.isnan(outcome.answered)
    allowed = 1e3 * (outcome.deadlines - outcome.arrivals)
    axes.scatter(
        outcome.arrivals[missing],
        allowed[missing],
        s=2,
        color="tab:orange",
        linewidths=0,
        label="no answer, at its deadline",
    )
    axes.set_ylim(0, 1.45 * float(allowed.max()))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--plot", help="PNG file for the last load and the first seed")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="values of loads, seeds and policies")
    parser.add_argument("--loads", type=_numbers, help="mean rates, over what full resolution sustains")
    parser.add_argument("--policies", type=_words, help="of the controller, or NAME/open; `full` first")
    parser.add_argument("--plot-policies", type=_words, default=["full", "slackfit", "headroom"], help="in the plot")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on")
    parser.add_argument("--table", help="JSON file with profiled rows; a made-up table without it")
    parser.add_argument("--device", help="of the table, if it has several; made up: cpu or accelerator")
    parser.add_argument("--runtime", help="of the table, if it has several")
    parser.add_argument("--dtype", help="of the table, if it has several")
    parser.add_argument("--lowest-top1", type=float, default=0.84, help="made up: of the cheapest instance")
    parser.add_argument("--arrivals", default="gamma:4", help="CSV file of times, or gamma:CV")
    parser.add_argument("--half", choices=HALVES, default="both", help="of the file: the first to tune on, the second")
    parser.add_argument("--requests", type=int, default=8000, help="of the Gamma process")
    parser.add_argument("--deadlines-ms", type=_span, default=(36.0, 200.0), help="after arrival, uniform, as 36:200")
    parser.add_argument("--workers", type=int, default=1, help="that run batches at the same time")
    parser.add_argument("--bias", type=float, default=Machine.bias, help="how far off each instance is (log, sd)")
    parser.add_argument("--noise", type=float, default=Machine.noise, help="how far off each batch is (log, sd)")
    parser.add_argument("--slow", type=_slow_phase, default=(), help="as 2:1:10: twice as slow for 1 s every 10 s")
    chosen, _ = parser.parse_known_args(arguments)
    preset = PRESETS[chosen.preset]
    parser.set_defaults(loads=_numbers(preset["loads"]), policies=_words(preset["policies"]), seeds=preset["seeds"])
    options = parser.parse_args(arguments)
    options.machine = Machine(options.bias, options.noise, *options.slow)
    return options


def _words(text):
    return [word for word in text.split(",") if word]


def _numbers(text):
    return [float(word) for word in _words(text)]


def _span(text):
    low, _, high = text.partition(":")
    low, high = float(low), float(high or low)
    if not 0 < low <= high < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: valid are positive milliseconds, as 100 or 36:200")
    return low, high


def _slow_phase(text):
    try:
        factor, seconds, every = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: needs FACTOR:SECONDS:EVERY, as 2:1:10") from None
    if not (factor > 0 and 0 <= seconds <= every and every > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: needs a positive factor and phases that do not overlap")
    return factor, seconds, every


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes the results where the flags say so."""
    options = parse(arguments)
    if options.table:
        rows = read_rows(options.table)
        where = dict(device=options.device, runtime=options.runtime, dtype=options.dtype)
        table = LatencyTable.from_rows(rows, **where)
    else:
        table = LatencyTable.from_rows(made_up_rows(options.lowest_top1, device=options.device or "cpu"))
    low, high = options.deadlines_ms
    what = f"arrivals of {pathlib.Path(options.arrivals).name}, deadlines {low:g} to {high:g} ms"
    sustained = options.workers / table.per_image[np.argmax(table.macs)]
    print(f"{table.setting[0]}: full resolution sustains {sustained:.0f} images/s; {what}; mean ±sd of {options.seeds}")
    records = compare(options, table)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "machine")}
        content = {"settings": settings, "machine": dataclasses.asdict(options.machine), "results": records}
        pathlib.Path(options.json).write_text(json.dumps(content, indent=2) + "\n")
    if options.plot:
        load = options.loads[-1]
        outcomes = {policy: run(options, table, policy, load, 0) for policy in options.plot_policies}
        plot(
            outcomes,
            table,
            options.plot,
            f"{table.setting[0]}, {load:g} times the load that full resolution sustains; {what}",
        )


if __name__ == "__main__":
    main()
