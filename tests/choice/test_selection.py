"""Selection picks what a search over the whole table would, offers nothing dominated, and says what is possible."""

import dataclasses
import itertools
import math
import random
import re
import subprocess
import sys

import pytest

from sdpoint_jax.choice.selection import PREFERENCES, Budget, check_device, choose_runtime, pareto_front, select
from sdpoint_jax.choice.table import InstanceRow, Latency
from sdpoint_jax.instance import list_instances

INSTANCES = list_instances(9, has_stem_point=False)
DEVICE = "cpu, 2 threads"


def latency(ms, *, batch_size=1, memory=None, device=DEVICE, runtime="xla", dtype="float32"):
    return Latency(device, runtime, dtype, batch_size, ms, 1.2 * ms, 50, memory, 1.0, {})


def row(number, macs, top1, *latencies, n=1000):
    return InstanceRow(INSTANCES[number], macs, 100, top1, None, 1.0, n, "64 training images", 64, latencies)


def small_table():
    return [
        row(0, 100, 0.9, latency(2.0, memory=30_000_000), latency(40.0, batch_size=8, memory=90_000_000)),
        row(1, 40, 0.8, latency(1.5, memory=10_000_000), latency(20.0, batch_size=8, memory=50_000_000)),
        row(2, 70, 0.85, latency(1.0, memory=20_000_000), latency(31.23456, batch_size=8, memory=70_000_000)),
    ]


def name_of(number):
    return INSTANCES[number].name


# What it picks.


def test_the_most_accurate_instance_within_each_limit():
    rows = small_table()
    assert select(rows, Budget()) == rows[0]
    assert select(rows, Budget(max_macs=99)) == rows[2]
    assert select(rows, Budget(max_macs=99, max_memory_mb=15)) == rows[1]
    assert select(rows, Budget(max_latency_ms=31, batch_size=8)) == rows[1]
    assert select(rows, Budget(max_memory_mb=70, batch_size=8)) == rows[2]


def test_a_wanted_accuracy_alone_asks_for_the_cheapest_that_has_it():
    rows = small_table()
    assert select(rows, Budget(min_top1=0.8)) == rows[1]
    assert select(rows, Budget(min_top1=0.81)) == rows[2]
    assert select(rows, Budget(min_top1=0.8, max_macs=80)) == rows[2]


def test_the_cheapest_goes_by_latency_only_where_latency_is_limited():
    rows = small_table()
    assert select(rows, Budget(max_macs=100), prefer="cheapest") == rows[1]
    assert select(rows, Budget(max_macs=100, max_latency_ms=3), prefer="cheapest") == rows[2]


def test_ties_go_to_the_lower_latency_then_the_fewer_macs_then_the_first():
    slow, fast = row(1, 40, 0.8, latency(2.0)), row(2, 50, 0.8, latency(1.0))
    assert select([slow, fast], Budget(max_macs=60)) == slow
    assert select([slow, fast], Budget(max_latency_ms=3)) == fast
    twins = [row(3, 50, 0.8, latency(1.0)), row(4, 40, 0.8, latency(1.0)), row(5, 40, 0.8, latency(1.0))]
    assert select(twins, Budget(max_latency_ms=3)) == twins[1]


def test_differences_below_their_standard_error_are_ties_on_request():
    # Of 0.84 and 0.85 on n = 400 the difference has a standard error of sqrt(0.84*0.16/400 + 0.85*0.15/400) = 0.0256.
    rows = [row(0, 100, 0.85, n=400), row(1, 60, 0.84, n=400), row(2, 40, 0.82, n=400)]
    assert select(rows, Budget(max_macs=100)) == rows[0]
    assert select(rows, Budget(max_macs=100), prefer="cheapest within one standard error") == rows[1]
    measured_better = [dataclasses.replace(found, n=400_000) for found in rows]
    assert select(measured_better, Budget(), prefer="cheapest within one standard error").top1 == 0.85


def test_the_front_holds_no_dominated_row_and_each_duplicate_once():
    rows = [row(0, 100, 0.9), row(1, 100, 0.8), row(2, 50, 0.8), row(3, 50, 0.8), row(4, 60, 0.7)]
    assert pareto_front(rows) == [rows[2], rows[0]]


def test_what_dominates_depends_on_the_dimensions():
    rows = small_table()
    assert pareto_front(rows) == [rows[1], rows[2], rows[0]]
    assert pareto_front(rows, ["latency"]) == [rows[2], rows[0]]
    assert pareto_front(rows, ["latency", "macs"]) == [rows[2], rows[1], rows[0]]
    assert pareto_front(rows, ["latency"], batch_size=8) == [rows[1], rows[2], rows[0]]


# What it says.


@pytest.mark.parametrize("field", ["max_macs", "max_latency_ms", "max_memory_mb"])
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, True, "1e6\n", [1], 10**400])
def test_a_limit_must_be_a_positive_number(field, value):
    with pytest.raises(ValueError, match=rf"^{field} .*valid are positive, finite numbers$") as error:
        Budget(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "0.9", 101])
def test_a_wanted_accuracy_must_be_a_share(value):
    with pytest.raises(ValueError, match=r"^min_top1 .*valid are shares in 0\.\.1$"):
        Budget(min_top1=value)


def test_a_percentage_is_told_apart_from_a_share():
    with pytest.raises(ValueError, match=r"^min_top1 75: it is a share in 0\.\.1; for 75 % give 0\.75$"):
        Budget(min_top1=75)
    assert Budget(min_top1=1).min_top1 == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, 8.0, True, None, "8"])
def test_a_batch_size_must_be_a_positive_whole_number(value):
    with pytest.raises(ValueError, match="^batch_size .*valid are 1, 2, 3"):
        Budget(batch_size=value)


@pytest.mark.parametrize(
    "limits, message",
    [
        (dict(max_macs=39), f"max_macs 39: the cheapest instance, {name_of(1)}, needs 40 MACs"),
        (
            dict(max_latency_ms=0.5),
            f"max_latency_ms 0.5: the fastest instance, {name_of(2)}, takes 1.0 ms at batch size 1 on {DEVICE} "
            "(xla, float32)",
        ),
        (
            dict(max_memory_mb=1.5, batch_size=8),
            f"max_memory_mb 1.5: the smallest instance, {name_of(1)}, needs 50.0 MB at batch size 8 on {DEVICE} "
            "(xla, float32)",
        ),
        (dict(min_top1=0.95), "min_top1 0.95: the most accurate instance, full, has a top-1 of 0.9"),
        (
            dict(max_macs=10, min_top1=0.95),
            f"max_macs 10: the cheapest instance, {name_of(1)}, needs 40 MACs; min_top1 0.95: the most accurate "
            "instance, full, has a top-1 of 0.9",
        ),
        (
            dict(max_macs=60, min_top1=0.85),
            "max_macs 60 and min_top1 0.85: each can be kept, but not together; the closest instance, "
            f"{name_of(1)}, needs 40 MACs, has a top-1 of 0.8",
        ),
    ],
)
def test_an_impossible_budget_names_what_is_possible(limits, message):
    with pytest.raises(ValueError) as error:
        select(small_table(), Budget(**limits))
    assert str(error.value) == message


def test_the_nearest_possible_value_is_possible_as_it_is_shown():
    rows = small_table()[2:]
    with pytest.raises(ValueError) as error:
        select(rows, Budget(max_latency_ms=3, batch_size=8))
    shown = float(re.search(r"takes (.*) ms", str(error.value))[1])
    assert shown == 31.24
    assert select(rows, Budget(max_latency_ms=shown, batch_size=8)) == rows[0]


def test_nothing_is_extrapolated_to_a_batch_size_that_was_not_measured():
    with pytest.raises(ValueError, match="^batch_size 4: measured are 1, 8 on cpu, 2 threads"):
        select(small_table(), Budget(max_latency_ms=10, batch_size=4))
    assert select(small_table(), Budget(max_macs=100, batch_size=4)).macs == 100  # MACs do not depend on it.


def test_a_row_without_the_measurement_is_not_offered_within_a_latency():
    rows = [*small_table()[1:], row(0, 100, 0.9)]
    assert select(rows, Budget(max_latency_ms=100)) == rows[1]
    assert select(rows, Budget()) == rows[2]


def test_several_devices_and_dtypes_must_be_told_apart():
    rows = [row(0, 100, 0.9, latency(2.0), latency(1.0, device="tpu v5e"), latency(0.5, runtime="onnxruntime"))]
    budget = Budget(max_latency_ms=1.5)
    with pytest.raises(ValueError, match="^device: measured are cpu, 2 threads, tpu v5e; name one of them$"):
        select(rows, budget)
    with pytest.raises(ValueError, match="^device 'gpu': measured are cpu, 2 threads, tpu v5e$"):
        select(rows, budget, device="gpu")
    with pytest.raises(ValueError, match="^runtime 'tvm': measured are onnxruntime, xla$"):
        select(rows, budget, device=DEVICE, runtime="tvm")
    with pytest.raises(ValueError, match="takes 2.0 ms at batch size 1 on cpu, 2 threads"):
        select(rows, budget, device=DEVICE, runtime="xla")
    assert select(rows, budget, device="tpu v5e") == rows[0]
    assert select(rows, budget, device=DEVICE, runtime="onnxruntime") == rows[0]
    with pytest.raises(ValueError, match="^dtype 'bfloat16': measured are float32$"):
        select(rows, budget, device="tpu v5e", dtype="bfloat16")


def two_runtimes():
    """Onnxruntime is the faster for the first instance at batch size 1 and 8, for the second at 1 alone."""
    fast = [latency(1.0, runtime="onnxruntime"), latency(9.0, batch_size=8, runtime="onnxruntime")]
    slow = [latency(1.5, runtime="onnxruntime"), latency(30.0, batch_size=8, runtime="onnxruntime")]
    return [
        row(0, 100, 0.9, latency(2.0, memory=20_000_000), latency(12.0, batch_size=8, memory=90_000_000), *fast),
        row(1, 40, 0.8, latency(1.8, memory=10_000_000), latency(8.0, batch_size=8, memory=50_000_000), *slow),
    ]


def test_of_two_runtimes_the_faster_one_counts_for_each_instance_and_batch_size():
    rows = two_runtimes()
    assert select(rows, Budget(max_latency_ms=1.2)) == rows[0]
    assert select(rows, Budget(max_latency_ms=8.5, batch_size=8)) == rows[1]
    assert pareto_front(rows, ["latency"], batch_size=8) == [rows[1], rows[0]]
    assert select(rows, Budget(max_latency_ms=1.9), runtime="xla") == rows[1]
    with pytest.raises(ValueError, match="fastest instance, .*, takes 1.0 ms .* on cpu, 2 threads .the faster runtime"):
        select(rows, Budget(max_latency_ms=0.5))


def test_memory_is_that_of_the_runtime_where_it_is_known():
    rows = two_runtimes()
    assert select(rows, Budget(max_memory_mb=15)) == rows[1]
    with pytest.raises(ValueError, match="memory of no instance is known"):
        select(rows, Budget(max_memory_mb=15), runtime="onnxruntime")


def test_a_batch_size_that_was_not_measured_goes_as_the_next_larger_one():
    first, second = two_runtimes()
    where = dict(device=DEVICE, dtype="float32")
    assert [choose_runtime(first, size, **where) for size in (1, 2, 8, 9)] == ["onnxruntime"] * 4
    assert [choose_runtime(second, size, **where) for size in (1, 2, 8, 9)] == ["onnxruntime", "xla", "xla", "xla"]
    assert choose_runtime(first, 1, device="gpu: a", dtype="float32") is None
    assert choose_runtime(first, 1, device=DEVICE, dtype="bfloat16") is None


def test_latency_of_another_device_is_a_warning_that_names_both():
    rows = [row(0, 100, 0.9, latency(1.0, device="gpu: a"), latency(1.0, device="gpu: b"))]
    assert check_device(rows, "gpu: a") == "gpu: a"
    for wanted in (None, "gpu: b"):
        with pytest.warns(UserWarning, match="measured on 'gpu: b' is used on 'cpu: c', .*; run: .* profile"):
            assert check_device(rows, "cpu: c", wanted) == "gpu: b"
    assert check_device(rows, "cpu: c", "gpu: unknown") == "gpu: unknown"  # Selecting then says what was measured.
    with pytest.raises(ValueError, match="not measured on any device; run: .* profile"):
        check_device([row(0, 100, 0.9)], "cpu: c")


def test_a_table_without_measurements_says_so():
    with pytest.raises(ValueError, match="not measured for any instance"):
        select([row(0, 100, 0.9)], Budget(max_latency_ms=1))
    with pytest.raises(ValueError, match="memory of no instance is known at batch size 1 on cpu"):
        select([row(0, 100, 0.9, latency(1.0))], Budget(max_memory_mb=1))
    with pytest.raises(ValueError, match="the table is empty"):
        select([], Budget())


def test_unknown_words_are_named_with_the_valid_ones():
    with pytest.raises(ValueError, match="^prefer 'best': valid are most accurate, cheapest, cheapest within"):
        select(small_table(), Budget(), prefer="best")
    with pytest.raises(ValueError, match=r"^by \['joules'\]: name one or more of latency, macs, memory$"):
        pareto_front(small_table(), ["joules"])


# Against a search over all rows.


def random_table(rng):
    """One to ten rows of few distinct values, so that there are ties and duplicates; some without measurements."""
    rows = []
    for instance in rng.sample(INSTANCES, rng.randint(1, 10)):
        latencies = tuple(
            latency(rng.choice([1.0, 2.0, 2.5, 4.0]), batch_size=size, memory=rng.choice([None, *[10**6, 10**7] * 3]))
            for size in (1, 8)
            if rng.random() < 0.9
        )
        top1, macs = rng.choice([0.5, 0.7, 0.75, 0.76, 0.9, 1.0]), rng.choice([10, 20, 30, 40])
        n = rng.choice([1, 40, 400, 10_000])
        rows.append(InstanceRow(instance, macs, 100, top1, None, 1.0, n, "", 64, latencies))
    return rows


def random_budget(rng):
    values = dict(
        max_macs=rng.choice([5, 10, 25, 30, 100]),
        max_latency_ms=rng.choice([0.5, 1.0, 2.2, 2.5, 10]),
        max_memory_mb=rng.choice([0.1, 1, 5, 10]),
        min_top1=rng.choice([0, 0.6, 0.75, 0.9, 1]),
    )
    return Budget(**{key: value for key, value in values.items() if rng.random() < 0.4}, batch_size=rng.choice([1, 8]))


def search(rows, budget, prefer):
    """The row that the rules of `select` name, found by comparing every row with every other; None if there is none."""
    timed = budget.max_latency_ms is not None or budget.max_memory_mb is not None

    def numbers(r):
        m = {found.batch_size: found for found in r.latencies}.get(budget.batch_size)
        ms = m.p50_ms if m and budget.max_latency_ms is not None else None
        mb = m.peak_memory_bytes / 1e6 if m and budget.max_memory_mb is not None and m.peak_memory_bytes else None
        return ms, r.macs if budget.max_macs is not None or not timed else None, mb

    def usable(r):
        ms, macs, mb = numbers(r)
        limits = (ms, budget.max_latency_ms), (r.macs, budget.max_macs), (mb, budget.max_memory_mb)
        within = all(limit is None or (value is not None and value <= limit) for value, limit in limits)
        return within and (budget.min_top1 is None or r.top1 >= budget.min_top1)

    def cheaper(a, b):
        for x, y in zip((*numbers(a), a.macs, rows.index(a)), (*numbers(b), b.macs, rows.index(b))):
            if x != y:
                return x < y

    def dominates(a, b):
        costs = [(x, y) for x, y in zip(numbers(a), numbers(b)) if y is not None]
        as_good = a.top1 >= b.top1 and all(x <= y for x, y in costs)
        better = a.top1 > b.top1 or any(x < y for x, y in costs)
        return as_good and (better or cheaper(a, b))  # Of equal ones, the cheaper by what is not limited, or the first.

    found = [r for r in rows if usable(r)]
    found = [r for r in found if not any(dominates(other, r) for other in found)]
    if not found:
        return None
    top = max(r.top1 for r in found)
    if prefer == "most accurate" and (timed or budget.max_macs is not None or budget.min_top1 is None):
        found = [r for r in found if r.top1 == top]
    if prefer == "cheapest within one standard error":

        def error(r):
            return r.top1 * (1 - r.top1) / r.n

        # Of equally accurate rows the cheapest stands for the highest accuracy, with its number of images.
        best = [r for r in found if r.top1 == top and not any(cheaper(o, r) for o in found if o.top1 == top)][0]
        found = [r for r in found if top == r.top1 or top - r.top1 < math.sqrt(error(best) + error(r))]
    return [r for r in found if not any(cheaper(o, r) for o in found if o is not r)][0]


def test_ten_thousand_random_budgets_agree_with_a_search_over_all_rows():
    rng = random.Random(0)
    outcomes = {"selected": 0, "impossible": 0, "not measured": 0}
    for _ in range(10_000):
        rows, budget, prefer = random_table(rng), random_budget(rng), rng.choice(PREFERENCES)
        expected = search(rows, budget, prefer)
        try:
            assert select(rows, budget, prefer=prefer) is expected
            outcomes["selected"] += 1
        except ValueError as error:
            assert expected is None, error
            assert "\n" not in str(error)
            outcomes["impossible" if "instance, " in str(error) else "not measured"] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_the_front_of_random_tables_is_what_no_other_row_dominates():
    rng = random.Random(1)
    for _ in range(1000):
        rows = random_table(rng)
        points = {(r.macs, -r.top1) for r in rows}
        beaten = {p for p, q in itertools.product(points, points) if q != p and q[0] <= p[0] and q[1] <= p[1]}
        front = pareto_front(rows)
        assert [(r.macs, -r.top1) for r in front] == sorted(points - beaten)


def test_selection_does_not_import_jax():
    code = "import sdpoint_jax.choice.selection, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
