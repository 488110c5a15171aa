"""The controller answers in time what it accepts, in order, as accurately as the load leaves room for."""

import heapq
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from sdpoint_jax.choice.selection import Budget
from sdpoint_jax.choice.table import InstanceRow, Latency
from sdpoint_jax.instance import list_instances
from sdpoint_jax.serving.controller import Accepted, Controller, LatencyTable, Refused, Request

INSTANCES = list_instances(3, has_stem_point=False)
FULL, CHEAP, MIDDLE = "full", INSTANCES[1].name, INSTANCES[2].name


def row(number, macs, top1, milliseconds, tail=1.0):
    latencies = tuple(
        Latency("cpu", "xla", "float32", size, ms, tail * ms, 50, None, 1.0, {}) for size, ms in milliseconds.items()
    )
    return InstanceRow(INSTANCES[number], macs, 100, top1, None, 1.0, 1000, "", 64, latencies)


def small_table(tail=1.0):
    """Of three instances that take 10, 2 and 5 ms an image, at batch sizes 1 and 4."""
    return LatencyTable.from_rows(
        [
            row(0, 100, 0.9, {1: 10, 4: 36}, tail),
            row(1, 20, 0.7, {1: 2, 4: 7}, tail),
            row(2, 50, 0.85, {1: 5, 4: 18}, tail),
        ]
    )


def controller(table=None, *, objective=0.1, **options):
    return Controller(table or small_table(), objective=objective, **options)


def drive(control, requests, factor=lambda batch, now: 1.0, on_batch=lambda batch: None):
    """Submits (time, request) pairs and runs batches on a machine that takes `factor` times what the table says.

    Returns the answers to `submit` and the times of the answers, by id, and the ids that were given up.
    """
    answers, answered, given_up, running, number, started = {}, {}, [], [], 0, 0
    table = control.table
    while number < len(requests) or running:
        if number < len(requests) and (not running or requests[number][0] <= running[0][0]):
            now, request = requests[number]
            answers[request.id] = control.submit(request, now)
            number += 1
        else:
            now, _, batch = heapq.heappop(running)
            control.observe(batch, now - batch.start, now)
            for done in batch.requests:
                assert done.id not in answered
                answered[done.id] = now
        while (batch := control.next_batch(now)) is not None:
            profiled = table.seconds[table.index_of(batch.instance), table.batch_sizes.index(batch.batch_size)]
            started += 1
            heapq.heappush(running, (now + profiled * factor(batch, now), started, batch))
            on_batch(batch)
        given_up += [request.id for request in control.give_up(now)]
    return answers, answered, given_up


def every(seconds, count, start=0.0, **fields):
    return [(start + seconds * k, Request((start, k), **fields)) for k in range(count)]


# One decision at a time.


def test_a_single_request_gets_the_most_accurate_instance_that_its_deadline_allows():
    for seconds, instance in ((0.1, FULL), (0.0101, FULL), (0.0099, MIDDLE), (0.003, CHEAP)):
        control = controller()
        assert control.submit(Request("a", deadline=5 + seconds), 5.0) == Accepted(5 + seconds)
        batch = control.next_batch(5.0)
        assert (batch.instance, batch.batch_size, batch.worker, batch.start) == (instance, 1, 0, 5.0)
        assert [request.id for request in batch.requests] == ["a"]


def test_those_behind_count_as_well_as_the_most_urgent():
    control = controller(policy="headroom:0")
    for k in range(9):  # At full resolution the ninth ends after 2 * 36 + 10 = 82 ms, on the middle one after 41.
        control.submit(Request(k, deadline=0.06), 0.0)
    assert control.next_batch(0.0).instance == MIDDLE


def test_a_queue_of_several_classes_is_planned_at_one_level():
    control = controller(policy="headroom:0")
    control.submit(Request("first", deadline=0.035), 0.0)
    for k in range(6):  # On the middle instance, 28 ms: after 10 ms it would be too late, though not on the cheapest.
        control.submit(Request(k, deadline=0.036, max_macs=50), 0.0)
    assert control.next_batch(0.0).instance == MIDDLE


def test_many_at_once_are_taken_for_the_start_of_an_outburst():
    for policy, instance in (("headroom:0", MIDDLE), ("headroom", CHEAP)):
        control = controller(policy=policy)
        for k in range(9):
            control.submit(Request(k, deadline=0.06), 0.0)
        assert control.next_batch(0.0).instance == instance


def test_the_most_urgent_go_first_and_equal_deadlines_in_the_order_in_which_they_came():
    control = controller(policy="cheapest")
    for name, deadline in (("late", 0.5), ("soon", 0.1), ("soon as well", 0.1), ("next", 0.3)):
        control.submit(Request(name, deadline=deadline), 0.0)
    ids = []
    while (batch := control.next_batch(0.0)) is not None:
        ids += [request.id for request in batch.requests]
        control.observe(batch, None, 0.0)
    assert ids == ["soon", "soon as well", "next", "late"]


def test_there_is_nothing_to_do_without_requests_or_a_free_worker():
    control = controller(workers=2)
    assert control.next_batch(0.0) is None
    for name in "abc":
        control.submit(Request(name), 0.0)
    assert {control.next_batch(0.0).worker, control.next_batch(0.0).worker} == {0, 1}
    assert control.next_batch(0.0) is None and control.waiting == 1


def test_what_cannot_be_answered_in_time_is_refused_with_the_time_to_try_again():
    control = controller()
    answers = [control.submit(Request(k, deadline=0.05), 0.0) for k in range(40)]
    accepted = sum(isinstance(answer, Accepted) for answer in answers)
    assert accepted == 28  # Seven batches of 4 in 7 ms each.
    refused = answers[-1]
    assert refused.reason == "too many others are answered first" and refused.retry_after == pytest.approx(
        28 * 0.007 / 4
    )


def test_a_refused_request_is_accepted_after_the_time_it_was_told():
    rng, refusals = random.Random(0), 0
    for _ in range(50):
        requests = [(0.0, Request(k, rng.uniform(0.02, 0.08))) for k in range(rng.randint(20, 60))]
        refused = drive(controller(), requests)[0][requests[-1][1].id]
        if isinstance(refused, Refused):
            refusals += 1
            again = refused.retry_after
            retry = Request("again", deadline=again + requests[-1][1].deadline)
            answers, answered, _ = drive(controller(), [*requests, (again, retry)])
            assert isinstance(answers["again"], Accepted) and answered["again"] <= retry.deadline
    assert refusals > 20


def test_a_deadline_that_no_instance_keeps_is_refused_for_good():
    refused = controller().submit(Request("a", deadline=0.001), 0.0)
    assert refused == Refused("no instance that it allows is fast enough for its deadline", None)
    refused = controller().submit(Request("a", deadline=0.004, instance=FULL), 0.0)
    assert refused.retry_after is None
    assert isinstance(controller().submit(Request("a", deadline=-1.0), 0.0), Refused)


def test_the_queue_is_bounded():
    control = controller(max_queue=3, admission=False)
    answers = [control.submit(Request(k), 0.0) for k in range(5)]
    assert [type(answer) for answer in answers] == [Accepted] * 3 + [Refused] * 2
    assert answers[-1].reason == "3 requests wait already" and answers[-1].retry_after > 0
    assert control.waiting == 3


def test_a_request_gets_the_instance_that_it_names_and_keeps_its_own_limit():
    control = controller(policy="cheapest")
    control.submit(Request("named", deadline=1.0, instance=FULL), 0.0)
    assert control.next_batch(0.0).instance == FULL
    for limit, instance in ((100, FULL), (99, MIDDLE), (20, CHEAP)):
        control = controller()
        control.submit(Request("limited", max_macs=limit), 0.0)
        assert control.next_batch(0.0).instance == instance
    assert controller().submit(Request("a", max_macs=19), 0.0).retry_after is None


def test_a_named_instance_does_not_keep_the_others_from_the_fastest():
    control = controller()
    control.submit(Request("named", deadline=0.02, instance=FULL), 0.0)
    for k in range(12):  # After 10 ms, three batches of 4 of the cheapest: 21 ms. On the middle one: 54 ms.
        assert isinstance(control.submit(Request(k, deadline=0.04), 0.0), Accepted)
    assert control.next_batch(0.0).instance == FULL


def test_free_seats_of_a_batch_go_to_requests_of_stricter_classes():
    table = LatencyTable.from_rows([row(0, 100, 0.9, {4: 10}), row(1, 20, 0.7, {4: 2})])
    control = controller(table)
    control.submit(Request("free", deadline=0.05), 0.0)
    control.submit(Request("named", deadline=0.06, instance=FULL), 0.0)
    control.submit(Request("cheap", deadline=0.06, max_macs=30), 0.0)
    batch = control.next_batch(0.0)
    assert batch.instance == FULL and [request.id for request in batch.requests] == ["free", "named"]
    control.observe(batch, None, 0.0)
    control.submit(Request("could have a better one", deadline=0.07), 0.0)
    batch = control.next_batch(0.0)
    assert batch.instance == INSTANCES[1].name and [request.id for request in batch.requests] == ["cheap"]


def test_what_is_accepted_but_became_hopeless_is_given_up_once():
    control = controller()
    control.submit(Request("a", deadline=0.05), 0.0)
    control.submit(Request("b", deadline=0.5), 0.0)
    assert control.give_up(0.04) == ()
    assert [request.id for request in control.give_up(0.049)] == ["a"]
    assert control.give_up(0.049) == () and control.waiting == 1


def test_what_became_hopeless_is_answered_late_where_nothing_is_given_up():
    control = controller(policy="cheapest", admission=False, gives_up=False)
    control.submit(Request("late", deadline=0.05), 0.0)
    for k in range(4):
        control.submit(Request(k, deadline=0.5), 0.0)
    batch = control.next_batch(0.06)
    assert batch.requests[0].id == "late" and control.give_up(0.06) == ()


def test_where_not_all_can_be_kept_the_batch_goes_to_those_who_gain_most_by_it():
    control = controller(policy="cheapest", admission=False)
    control.submit(Request("urgent", deadline=0.003), 0.0)
    for k in range(4):  # Alone, the urgent one takes 2 ms; then the four end after 9 ms.
        control.submit(Request(k, deadline=0.0085), 0.0)
    batch = control.next_batch(0.0)
    assert [request.id for request in batch.requests] == [0, 1, 2, 3] and batch.batch_size == 4
    assert [request.id for request in control.give_up(0.0)] == ["urgent"]


def test_a_queue_that_just_fits_loses_nobody_for_the_sake_of_the_margin():
    control = controller(small_table(tail=1.5), policy="cheapest", admission=False)
    control.submit(Request("urgent", deadline=0.0025), 0.0)
    for k in range(4):
        control.submit(Request(k, deadline=0.0105), 0.0)
    assert [request.id for request in control.next_batch(0.0).requests] == ["urgent"]
    assert control.give_up(0.0) == ()


# Policies.


def test_fixed_policies_use_one_instance():
    for policy, instance in (("full", FULL), ("cheapest", CHEAP), (f"fixed:{MIDDLE}", MIDDLE)):
        used = set()
        drive(controller(policy=policy), every(0.004, 100), on_batch=lambda batch, used=used: used.add(batch.instance))
        assert used == {instance}


def test_slackfit_picks_the_largest_batch_of_the_bucket_closest_below_the_slack():
    # 16 buckets between 2 and 36 ms, 2.125 ms each: {2}, {5}, {7}, {10}, {18}, {36} each hold one pair.
    for slack, expected in ((0.04, (FULL, 4)), (0.035, (MIDDLE, 4)), (0.012, (FULL, 1)), (0.009, (CHEAP, 4))):
        control = controller(policy="slackfit", admission=False)
        for k in range(4):
            control.submit(Request(k, deadline=slack), 0.0)
        batch = control.next_batch(0.0)
        assert (batch.instance, len(batch.requests)) == expected
    # In one bucket the larger batch counts, though the other instance is more accurate.
    table = LatencyTable.from_rows([row(0, 9, 0.9, {1: 10.0, 4: 40.0}), row(1, 2, 0.7, {1: 3.0, 4: 10.1})])
    control = controller(table, policy="slackfit", admission=False)
    for k in range(4):
        control.submit(Request(k, deadline=0.02), 0.0)
    assert control.next_batch(0.0).instance == INSTANCES[1].name


def test_dominated_instances_are_used_only_by_name():
    table = LatencyTable.from_rows([row(0, 9, 0.9, {1: 5}), row(1, 2, 0.8, {1: 6})])
    control = controller(table)
    control.submit(Request("any", deadline=1.0), 0.0)
    control.submit(Request("named", deadline=2.0, instance=CHEAP), 0.0)
    first = control.next_batch(0.0)
    control.observe(first, 0.005, 0.005)
    assert (first.instance, control.next_batch(0.005).instance) == (FULL, CHEAP)


def test_a_larger_factor_answers_more_of_an_outburst_and_a_smaller_one_more_accurately():
    outburst = every(0.0025, 400, deadline=None)
    results = {}
    for policy in ("headroom:0", "headroom:2"):
        used, control = [], controller(policy=policy)
        answers, answered, _ = drive(control, outburst, on_batch=used.append)
        top1 = np.mean([control.table.top1[control.table.index_of(b.instance)] for b in used[:20]])
        results[policy] = len(answered), top1
    assert results["headroom:2"][0] >= results["headroom:0"][0]
    assert results["headroom:2"][1] < results["headroom:0"][1]


def test_an_instance_that_two_others_equal_in_turns_is_used_only_by_name():
    # Half of the images at 10 ms and half at 2 are as accurate as all at 8 ms.
    table = LatencyTable.from_rows([row(0, 9, 0.9, {1: 10}), row(1, 2, 0.7, {1: 2}), row(2, 5, 0.8, {1: 8})])
    assert [table.names[i] for i in table.hull(range(3))] == [FULL, CHEAP]
    assert [table.names[i] for i in table.front(range(3))] == [FULL, MIDDLE, CHEAP]
    used, control = [], controller(table)
    drive(control, every(0.0085, 200), on_batch=lambda batch: used.append(batch.instance))
    assert set(used) <= {FULL, CHEAP}
    control.submit(Request("named", instance=MIDDLE), 10.0)
    assert control.next_batch(10.0).instance == MIDDLE


def test_an_instance_stays_that_is_quicker_than_a_mixture_at_some_batch_size():
    table = LatencyTable.from_rows(
        [row(0, 9, 0.9, {1: 10, 4: 40}), row(1, 2, 0.7, {1: 2, 4: 8}), row(2, 5, 0.8, {1: 5, 4: 32})]
    )
    assert [table.names[i] for i in table.hull(range(3))] == [FULL, MIDDLE, CHEAP]


@pytest.mark.parametrize("admission", [True, False])
def test_caution_grows_with_a_lost_request_and_fades_while_none_is_lost(admission, monkeypatch):
    def top1_of_an_outburst(control, start):
        used = []
        drive(control, every(0.004, 12, start), on_batch=lambda batch: used.append(batch.instance))
        return np.mean([control.table.top1[control.table.index_of(name)] for name in used])

    monkeypatch.setattr("sdpoint_jax.serving.controller.FADING_REQUESTS", 1000)
    control = controller(admission=admission)
    new = top1_of_an_outburst(control, 0.0)
    drive(control, every(0.05, 4000, 50.0))
    bold = top1_of_an_outburst(control, 300.0)
    drive(control, [(400.0, Request(("many", k))) for k in range(100)])
    assert top1_of_an_outburst(control, 500.0) == new < bold


# Hysteresis: there is none, so these say what bounds the switching all the same.


def test_a_load_that_full_resolution_sustains_never_leaves_it():
    used = set()
    _, answered, _ = drive(controller(), every(0.0125, 400), on_batch=lambda batch: used.add(batch.instance))
    assert used == {FULL} and len(answered) == 400


def test_a_steady_load_above_it_keeps_to_neighbouring_instances():
    used = []
    _, answered, _ = drive(controller(), every(0.007, 1000), on_batch=lambda batch: used.append(batch.instance))
    assert set(used[100:]) <= {FULL, MIDDLE} and len(answered) == 1000


def test_the_instance_goes_down_with_an_outburst_and_back_up_within_two_objectives():
    used, control = [], controller()
    calm_again = 1.0 + 0.5 + 2 * 0.1
    outburst = sorted([*every(0.02, 200), *every(0.002, 250, 1.0)], key=lambda pair: pair[0])
    drive(control, outburst, on_batch=lambda batch: used.append((batch.start, batch.instance)))
    assert {instance for start, instance in used if start < 1.0} == {FULL}
    assert {instance for start, instance in used if 1.1 < start < 1.5} == {CHEAP}
    assert {instance for start, instance in used if start > calm_again} == {FULL}


# What is observed.


def test_a_slower_machine_is_noticed_after_three_batches():
    control = controller()
    for k in range(5):
        assert control.slowness == pytest.approx(1.0 if k < 3 else 2.0, rel=0.05)
        control.submit(Request(k, deadline=k + 0.5), float(k))
        batch = control.next_batch(float(k))
        control.observe(batch, 0.02, k + 0.02)
    control.submit(Request("now too short for full resolution", deadline=10.019), 10.0)
    assert control.next_batch(10.0).instance == MIDDLE


def test_an_outlier_changes_next_to_nothing():
    control = controller()
    for k in range(20):
        control.submit(Request(k, deadline=k + 0.5), float(k))
        batch = control.next_batch(float(k))
        control.observe(batch, 1.0 if k == 15 else 0.01, k + 0.01)
        assert control.slowness == pytest.approx(1.0, abs=0.01)


def test_an_instance_that_is_slower_than_profiled_is_corrected_for_itself():
    control = controller(policy=f"fixed:{MIDDLE}")
    requests = [(0.05 * k, Request(k, deadline=0.05 * k + 0.05, instance=(FULL, CHEAP)[k % 2])) for k in range(2000)]
    drive(control, requests, factor=lambda batch, now: 1.3 if batch.instance == FULL else 1.0)
    control.submit(Request("a", deadline=1000.5, instance=FULL), 1000.0)
    assert control.next_batch(1000.0).seconds / control.slowness == pytest.approx(0.013, rel=0.15)
    assert control.slowness < 1.3


def test_a_batch_that_failed_frees_its_worker_and_teaches_nothing():
    control = controller()
    control.submit(Request("a"), 0.0)
    batch = control.next_batch(0.0)
    control.observe(batch, None, 5.0)
    assert control.slowness == 1.0
    with pytest.raises(ValueError, match="it is not running"):
        control.observe(batch, 1.0, 5.0)


def test_the_tail_of_the_profile_is_kept_clear_of_the_deadline():
    control = controller(small_table(tail=1.5))
    control.submit(Request("a", deadline=0.014), 0.0)
    assert control.next_batch(0.0).instance == MIDDLE


# Limits that change at run time.


def test_limits_hold_from_the_next_batch_on_and_can_be_lifted():
    control = controller()
    control.submit(Request("a", deadline=1.0), 0.0)
    control.submit(Request("named", deadline=2.0, instance=FULL), 0.0)
    control.set_limits(Budget(max_macs=50))
    first = control.next_batch(0.0)
    assert first.instance == MIDDLE
    control.observe(first, None, 0.0)
    assert control.next_batch(0.0).instance == FULL  # It was accepted before.
    assert isinstance(control.submit(Request("b", instance=FULL), 0.0), Refused)
    control.set_limits(Budget(max_latency_ms=3))
    control.set_limits(instances=[CHEAP, FULL])
    assert isinstance(control.submit(Request("c", instance=FULL, deadline=9.0), 0.0), Accepted)
    control.set_limits()
    assert isinstance(control.submit(Request("d", instance=MIDDLE, deadline=9.0), 0.0), Accepted)


def test_impossible_limits_are_refused_and_leave_the_earlier_ones():
    control = controller()
    control.set_limits(Budget(max_macs=50))
    with pytest.raises(ValueError, match=f"max_macs 10: the cheapest instance, {CHEAP}, needs 20 MACs"):
        control.set_limits(Budget(max_macs=10))
    with pytest.raises(ValueError, match=f"instances .*'full'.*: within the budget are {CHEAP}, {MIDDLE}"):
        control.set_limits(Budget(max_macs=50), instances=[FULL])
    with pytest.raises(ValueError, match="instance 'p09_r0.50': profiled are full"):
        control.set_limits(instances=["p09_r0.50"])
    control.submit(Request("a"), 0.0)
    assert control.next_batch(0.0).instance == MIDDLE


# Wrong arguments.


@pytest.mark.parametrize("objective", [0, -1, math.nan, math.inf, True, "1"])
def test_the_objective_must_be_a_positive_number(objective):
    with pytest.raises(ValueError, match="^objective .*: valid are positive numbers of seconds$"):
        controller(objective=objective)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_queue=0), "max_queue 0: valid are 1, 2, 3"),
        (dict(workers=1.5), "workers 1.5: valid are 1, 2, 3"),
        (dict(policy="best"), "policy 'best': valid are full, cheapest, slackfit, headroom, fixed:NAME, headroom:FAC"),
        (dict(policy="fixed:p09_r0.50"), "instance 'p09_r0.50': profiled are full"),
        (dict(policy="headroom:-1"), "policy 'headroom:-1': valid factors"),
    ],
)
def test_unknown_options_are_named_with_the_valid_ones(options, message):
    with pytest.raises(ValueError, match=message):
        controller(**options)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(deadline=math.nan), "deadline nan: valid are numbers"),
        (dict(deadline=math.inf), "deadline inf: valid are numbers"),
        (dict(max_macs=math.nan), "max_macs nan: valid are numbers"),
        (dict(instance="best"), "instance 'best': profiled are full"),
    ],
)
def test_a_request_with_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        controller().submit(Request("a", **fields), 0.0)


def test_a_table_takes_only_what_was_profiled():
    rows = [row(0, 100, 0.9, {1: 10, 4: 36}), row(1, 20, 0.7, {1: 2})]
    assert LatencyTable.from_rows(rows).names == (FULL,)
    assert LatencyTable.from_rows(rows, batch_sizes=[1]).names == (FULL, CHEAP)
    with pytest.raises(ValueError, match=r"batch_sizes \[8\]: measured are 1, 4"):
        LatencyTable.from_rows(rows, batch_sizes=[1, 8])
    with pytest.raises(ValueError, match="device 'tpu': measured are cpu"):
        LatencyTable.from_rows(rows, device="tpu")


# Whatever comes: many random tables, loads and requests.


def random_table(rng):
    rows, sizes = [], rng.choice([(1,), (1, 4), (1, 2, 8, 16)])
    for number in range(rng.randint(1, len(INSTANCES))):
        fixed, each = rng.uniform(0.1, 3), rng.uniform(0.2, 4)
        milliseconds = {size: fixed + each * size for size in sizes}
        rows.append(row(number, round(100 * each), min(0.99, 0.6 + 0.1 * each), milliseconds, tail=rng.uniform(1, 1.3)))
    return LatencyTable.from_rows(rows)


def random_requests(rng, table, count=150, classes=True):
    now, requests, pace = 0.0, [], float(table.per_image.mean())
    for k in range(count):
        now += rng.gammavariate(0.1, 10) * pace * rng.choice([0.3, 1, 3])
        limits = {}
        if classes and rng.random() < 0.2:
            limits["instance"] = rng.choice(table.names)
        if classes and rng.random() < 0.2:
            limits["max_macs"] = rng.choice(list(table.macs.tolist()))
        requests.append((now, Request(k, now + rng.uniform(0.5, 60) * pace, **limits)))
    return requests


POLICIES = ["headroom", "headroom:1", "slackfit", "cheapest", "full"]


@pytest.mark.parametrize("seed", range(60))
def test_each_request_is_refused_answered_or_given_up_once_and_in_order(seed):
    rng = random.Random(seed)
    table = random_table(rng)
    options = dict(policy=rng.choice(POLICIES), workers=rng.choice([1, 1, 3]), admission=rng.random() < 0.7)
    control = Controller(table, objective=20 * float(table.per_image.mean()), max_queue=40, **options)
    requests, waiting = random_requests(rng, table), {}
    submit, give_up = control.submit, control.give_up

    def watched_submit(request, now):
        answer = submit(request, now)
        if isinstance(answer, Accepted):
            waiting[request.id] = request
        assert control.waiting <= 40
        return answer

    def watched_give_up(now):
        gone = give_up(now)
        for request in gone:
            del waiting[request.id]
        return gone

    def on_batch(batch):
        watched_give_up_by_batch(batch)
        for request in batch.requests:
            assert request.instance in (None, batch.instance)
            assert request.max_macs is None or table.macs[table.index_of(batch.instance)] <= request.max_macs
            del waiting[request.id]
        for request in batch.requests:  # None of the same class that is more urgent was left behind.
            same = [w for w in waiting.values() if (w.instance, w.max_macs) == (request.instance, request.max_macs)]
            assert all(w.deadline >= request.deadline for w in same)
        assert len(batch.requests) <= batch.batch_size

    lost = []

    def watched_give_up_by_batch(batch):
        lost.extend(request.id for request in watched_give_up(batch.start))

    control.submit = watched_submit
    control.give_up = watched_give_up
    answers, answered, given_up = drive(control, requests, lambda batch, now: rng.lognormvariate(0, 0.2), on_batch)
    given_up += lost
    accepted = {name for name, answer in answers.items() if isinstance(answer, Accepted)}
    assert len(given_up) == len(set(given_up)) and accepted == set(answered) | set(given_up)
    assert not set(answered) & set(given_up) and not waiting and control.waiting == 0


def share_of_accepted_that_is_not_in_time(seeds, spread):
    accepted, late = 0, 0
    for seed in seeds:
        rng = random.Random(seed)
        table = random_table(rng)
        policy, workers = rng.choice(["headroom", "headroom:0", "cheapest", "full"]), rng.choice([1, 1, 2])
        control = Controller(table, objective=20 * float(table.per_image.mean()), policy=policy, workers=workers)
        requests = random_requests(rng, table, classes=False)
        _, answered, given_up = drive(control, requests, lambda batch, now, rng=rng: rng.lognormvariate(0, spread))
        deadlines = {request.id: request.deadline for _, request in requests}
        accepted += len(answered) + len(given_up)
        late += len(given_up) + sum(end > deadlines[name] + 1e-9 for name, end in answered.items())
    return late / accepted


@pytest.mark.parametrize("spread, most", [(0.0, 0.0004), (0.05, 0.0008)])
def test_what_is_accepted_is_answered_in_time(spread, most):
    assert share_of_accepted_that_is_not_in_time(range(100), spread) < most


def drains(table, deadlines, now, margin):
    """Whether any instance, in batches of at most any size, answers all in time, one batch after the other."""
    for seconds in table.seconds:
        for limit in range(len(table.batch_sizes)):
            time, left = now, list(deadlines)
            while left:
                count = min(len(left), table.batch_sizes[limit])
                size = next(s for s, batch_size in enumerate(table.batch_sizes) if batch_size >= count)
                if time + margin * seconds[size] > left[0] + 1e-9:
                    break
                time, left = time + seconds[size], left[count:]
            if not left:
                return True
    return False


@pytest.mark.parametrize("seed", range(60))
def test_no_batch_breaks_a_deadline_that_another_choice_would_keep(seed):
    rng = random.Random(seed)
    table = random_table(rng)
    mean = float(table.per_image.mean())
    deadlines = sorted(rng.uniform(1, 50) * mean for _ in range(rng.randint(1, 40)))
    control = Controller(table, objective=20 * mean, policy=rng.choice(["headroom", "headroom:0"]), admission=False)
    for k, deadline in enumerate(deadlines):
        control.submit(Request(k, deadline), 0.0)
    now = 0.0
    while (batch := control.next_batch(now)) is not None:
        left = deadlines[len(deadlines) - control.waiting :]
        if drains(table, [*(r.deadline for r in batch.requests), *left], now, table.margin):
            assert now + table.margin * batch.seconds <= batch.requests[0].deadline + 1e-9
            assert not left or drains(table, left, now + batch.seconds, table.margin)
        elif any(now + s <= batch.requests[0].deadline for s in table.seconds.ravel()):
            assert now + batch.seconds <= batch.requests[0].deadline + 1e-9
        now += batch.seconds
        control.observe(batch, None, now)
    assert control.waiting == 0


def test_a_machine_that_was_slow_is_tried_again():
    control = controller(objective=0.1)
    for number in range(20):
        if isinstance(control.submit(Request(number), 0.0), Refused):
            break
        batch = control.next_batch(0.0)
        control.observe(batch, 1000 * batch.seconds, 0.0)
    else:
        raise AssertionError("a machine a thousand times slower refuses nothing")
    assert isinstance(control.submit(Request("soon"), 0.05), Refused)
    assert isinstance(control.submit(Request("later"), 0.2), Accepted)
    assert control.slowness == 1.0


def test_the_controller_does_not_import_jax():
    code = "import sdpoint_jax.serving.controller, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
