"""The simulated service: what it counts, what it reads, and that its policies keep their promise on bursty arrivals."""

import json
import subprocess
import sys

import numpy as np
import pytest
import serving

from sdpoint_jax.serving.controller import Controller, LatencyTable

EXACT = serving.Machine(bias=0.0, noise=0.0)


def made_up_table(**options):
    return LatencyTable.from_rows(serving.made_up_rows(**options))


def simulate(policy, arrivals, patience, machine=EXACT, seed=0, **options):
    arrivals, table = np.asarray(arrivals, float), made_up_table()
    control = Controller(table, objective=0.1, policy=policy, **options)
    return serving.simulate(control, arrivals, np.full(len(arrivals), patience), machine, seed)


def test_a_calm_service_answers_all_at_full_resolution_in_the_time_of_the_table():
    outcome = simulate("headroom", np.arange(50) * 0.1, 0.1)
    numbers = outcome.summary()
    assert numbers["attainment"] == 1.0 and numbers["accuracy"] == pytest.approx(0.915)
    assert numbers["p50_ms"] == pytest.approx(2.4) and numbers["p99_ms"] == pytest.approx(2.4)
    assert numbers["refused"] == numbers["late"] == numbers["given_up"] == numbers["switches"] == 0


def test_every_request_is_answered_refused_or_given_up_and_counted_among_all():
    numbers = simulate("slackfit", np.arange(300) * 0.0005, 0.05, serving.Machine(), admission=False).summary()
    assert 0 < numbers["attainment"] < 1 and numbers["given_up"] > 0
    total = numbers["attainment"] + numbers["late"] + numbers["refused"] + numbers["given_up"]
    assert total == pytest.approx(1)
    assert numbers["effective"] == pytest.approx(numbers["attainment"] * numbers["accuracy"])


def test_the_machine_is_slow_in_its_phases_alone():
    machine = serving.Machine(bias=0.0, noise=0.0, slow_factor=3.0, slow_seconds=1.0, slow_every=4.0)
    outcome = simulate("full", np.arange(100) * 0.1, 0.1, machine)
    slow = (outcome.answered - outcome.arrivals) > 0.005
    assert set(outcome.arrivals[slow].round(3)) == {4 + k / 10 for k in range(10)} | {8 + k / 10 for k in range(10)}


def test_the_same_seed_gives_the_same_outcome_and_another_seed_another():
    first, again, other = (
        simulate("headroom", np.arange(200) * 0.002, 0.1, serving.Machine(), seed).answered for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_arrivals_have_the_mean_and_the_variation_that_were_asked_for(tmp_path):
    gaps = np.diff(serving.unit_arrivals("gamma:3", 40_000, 0))
    assert gaps.mean() == pytest.approx(1, rel=0.1) and gaps.std() / gaps.mean() == pytest.approx(3, rel=0.1)
    path = tmp_path / "times.csv"
    path.write_text("seconds\n5\n7\n11\n15\n")
    np.testing.assert_allclose(serving.unit_arrivals(str(path), 0, 0), [0, 0.8, 2.4, 4.0])


def test_http_reads_one_after_the_other_and_writes_answers_first():
    machine = serving.Machine(bias=0.0, noise=0.0, read_seconds=0.01, answer_seconds=0.004, handover_seconds=0.001)
    outcome = simulate("full", [0.0, 0.0, 0.0, 0.0], 0.5, machine)
    # Read at 10, 20, 38 and 48 ms, computed in 3.4: the first answer waits for the second reading, to 24, the second
    # goes before the third reading, to 28, and the third waits for the fourth.
    assert outcome.answered == pytest.approx([0.024, 0.028, 0.052, 0.056])


def test_a_slow_http_layer_is_counted_within_the_deadline():
    arrivals = np.arange(400) * 0.01
    numbers = simulate("full", arrivals, 0.012, serving.Machine(bias=0.0, noise=0.0, answer_seconds=0.005)).summary()
    assert numbers["attainment"] == 1
    none = simulate("full", arrivals, 0.004, serving.Machine(bias=0.0, noise=0.0, answer_seconds=0.005)).summary()
    assert none["attainment"] == 0 and none["refused"] > 0.9  # Known from the first answers on.


@pytest.mark.parametrize("source", ["gamma:0", "gamma:x", "nowhere.csv"])
def test_unknown_arrivals_are_named(source):
    with pytest.raises(ValueError, match=f"--arrivals={source}: "):
        serving.unit_arrivals(source, 10, 0)


@pytest.mark.parametrize("key", ["instances", "table", None])
def test_a_table_is_read_from_a_sweep_or_from_rows(tmp_path, key):
    rows = serving.made_up_rows()
    records = [row.to_record() for row in rows]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({key: records} if key else records))
    assert serving.read_rows(str(path)) == rows
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"--table={path}: "):
        serving.read_rows(str(path))


def test_the_command_prints_writes_and_draws_without_jax(tmp_path):
    code = "import serving, sys; serving.main(sys.argv[1:]); assert 'jax' not in sys.modules"
    flags = ["--requests=300", "--seeds=2", "--loads=1", f"--json={tmp_path}/r.json", f"--plot={tmp_path}/r.png"]
    folder = str(serving.pathlib.Path(serving.__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()[2:]] == ["full", "cheapest", "slackfit", "headroom"]
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [len(record["attainment"]["values"]) for record in results] == [2] * 4
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_an_open_policy_answers_all_and_most_of_them_late_where_more_comes_than_it_can_do():
    options = serving.parse(["--arrivals=gamma:1", "--requests=1500"])
    table = made_up_table()
    lost = serving.run(options, table, "full/open", 2.0, seed=0).summary()
    assert lost["refused"] == lost["given_up"] == 0 and lost["late"] > 0.5
    assert serving.run(options, table, "full", 2.0, seed=0).summary()["attainment"] > lost["attainment"]


@pytest.mark.parametrize("load", [0.5, 1, 2])
def test_headroom_answers_as_many_as_the_cheapest_more_accurately_and_can_beat_slackfit(load):
    options = serving.parse(["--arrivals=gamma:6", "--requests=2500", "--loads=1", "--seeds=1"])
    found = {
        policy: serving.run(options, made_up_table(), policy, load, seed=0).summary()
        for policy in ("full", "cheapest", "slackfit", "headroom", "headroom:0.5")
    }
    ours, bold = found["headroom"], found["headroom:0.5"]
    assert ours["attainment"] >= found["slackfit"]["attainment"]
    assert ours["effective"] > found["cheapest"]["effective"]
    assert bold["effective"] > max(found[policy]["effective"] for policy in ("cheapest", "slackfit"))
    assert (1 - ours["attainment"]) * 2.5 < 1 - found["full"]["attainment"]
    assert ours["attainment"] > found["cheapest"]["attainment"] - 0.005
    assert ours["accuracy"] > found["cheapest"]["accuracy"]
