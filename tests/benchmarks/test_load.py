"""The load client: what it sends, what it counts, and how its prediction is of the same requests."""

import load
import numpy as np
import pytest
import serving

from sdpoint_jax.serving.controller import LatencyTable


def outcome(at=0.0, done=0.01, status=200, instance="full", patience=0.1):
    answer = {"instance": instance, "logits": [0.0]} if status == 200 else None
    return load.Outcome(load.Ask(at, 0, "npy", patience), done, status, answer)


@pytest.mark.parametrize("source", ["", "file"])
def test_arrivals_have_the_number_and_the_rate_that_were_asked_for(tmp_path, source):
    path = tmp_path / "times.csv"
    path.write_text("seconds\n" + "\n".join(f"{k * k}" for k in range(500)))
    times = load.load_arrivals(str(path) if source else "", 100, rate=50.0, cv=2.0, seed=3)
    assert len(times) == 100 and times[0] == 0 and times[-1] == pytest.approx(100 / 50.0)


def test_requests_are_mixed_and_the_same_for_the_same_seed():
    asks = load.mix(np.arange(400) / 100, 8, 0.1, [10.0, 20.0], seed=0)
    assert asks == load.mix(np.arange(400) / 100, 8, 0.1, [10.0, 20.0], seed=0)
    assert {ask.kind for ask in asks} == {"npy", "png"} and {ask.patience for ask in asks} == {0.1, 0.05}
    assert 60 < sum(ask.max_macs is not None for ask in asks) < 140


def test_an_answer_after_its_deadline_is_late_and_no_answer_is_lost():
    found = load.summarize(
        [outcome(), outcome(done=0.2), outcome(status=503), outcome(status=504), outcome(status=0)], {"full": 0.9}
    )
    assert (found["in_time"], found["refused"], found["late"], found["lost"]) == (0.2, 0.2, 0.4, 1)
    assert found["top1"] == pytest.approx(0.9)


def test_the_return_is_counted_to_the_last_change():
    before = [outcome(at) for at in (0.0, 0.1)]
    after = [outcome(5.1), outcome(5.2, instance="p01_r0.50"), outcome(5.3), outcome(5.4)]
    assert load.seconds_to_return(before, after, 5.0) == pytest.approx(0.3)
    assert np.isnan(load.seconds_to_return(before, [outcome(5.1, instance="p01_r0.50")], 5.0))


def test_the_prediction_is_of_the_same_requests():
    table = LatencyTable.from_rows(serving.made_up_rows())
    asks = [load.Ask(k / 100, 0, "npy", 0.1) for k in range(50)]
    numbers = load.predict_outcome(asks, table, "headroom", 0.1)
    assert numbers["in_time"] == 1 and numbers["top1"] == pytest.approx(0.915) and numbers["requests"] == 50
    limited = [load.Ask(k / 100, 0, "npy", 0.1, max_macs=20e6) for k in range(50)]
    assert load.predict_outcome(limited, table, "headroom", 0.1)["top1"] < 0.9


def test_the_prediction_is_of_the_machine_that_was_measured():
    table = LatencyTable.from_rows(serving.made_up_rows())
    asks = [load.Ask(k / 100, 0, "npy", 0.02) for k in range(50)]
    slow = serving.Machine(bias=0.0, noise=0.0, read_seconds=0.015)
    assert load.predict_outcome(asks, table, "headroom", 0.1)["in_time"] == 1
    assert load.predict_outcome(asks, table, "headroom", 0.1, slow)["in_time"] < 0.5


def test_what_requests_cost_is_measured_under_more_than_the_service_can_answer(monkeypatch):
    table = LatencyTable.from_rows(serving.made_up_rows())
    size, name = table.batch_sizes[-2], "p01_r0.50"
    seconds = 1.1 * table.seconds[table.index_of(name), -2]
    busy = iter([5.0, 5.0 + 1200 * 0.001 + 1000 * 0.002])  # Before and after.

    def ask_closely(url, path, bodies, connections, count):
        return load.Closed({503: count}, [], [0.0] * count, 0.001 * count)

    async def send(url, asks, bodies):
        assert len(asks) / asks[-1].at > 1 / table.per_image.min() and {ask.patience for ask in asks} == {0.1}
        answer = {"instance": name, "batch_size": size, "compute_ms": 1e3 * seconds}
        ends = [(number // size + 1) * (seconds + 0.002) for number in range(1000)]
        answered = [load.Outcome(ask, end, 200, answer) for ask, end in zip(asks, ends)]
        return answered + [load.Outcome(ask, ask.at, 503, None) for ask in asks[1000:]]

    monkeypatch.setattr(load, "ask_closely", ask_closely)
    monkeypatch.setattr(load, "send", send)
    monkeypatch.setattr(load, "_busy_seconds", lambda url: next(busy))
    machine = load.measure_machine("http://127.0.0.1:1", table, 0.1, {"npy": [b"1"], "png": [b"2"]})
    assert machine.read_seconds == pytest.approx(0.001) and machine.answer_seconds == pytest.approx(0.002)
    assert machine.pace == pytest.approx(1.1)
    assert machine.handover_seconds == pytest.approx(0.002, abs=0.0005)
    assert machine.noise == pytest.approx(0)
