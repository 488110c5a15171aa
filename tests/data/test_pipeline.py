"""Batches: pure functions of (seed, step); each example once an epoch or evaluation."""

import io
import threading
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from sdpoint_jax import data
from sdpoint_jax.data.examples import DecodedSplit

COMPOSED = "pad_crop_flip+trivial_augment+rand_augment:2,9+random_erasing:0.5,random"


class Numbered:
    """Records of n images of noise; the first two pixels and the label tell the index."""

    def __init__(self, n, size=(8, 8), bad=()):
        self.n, self.size, self.bad = n, size, bad

    def __len__(self):
        return self.n

    def read(self, index):
        if index in self.bad:
            return b"broken", 0
        image = np.random.default_rng(index).integers(0, 256, (*self.size, 1), np.uint8)
        image[0, 0], image[0, 1] = divmod(index, 256)
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "PNG", compress_level=0)
        return file.getvalue(), index % 1000

    def where(self, index):
        return f"/numbered/{index}.png"


def numbered(n=97, *, size=(8, 8), fixed=True, bad=(), on_bad_image="error"):
    split = DecodedSplit(Numbered(n, size, bad), channels=1, num_classes=1000, image_size=size if fixed else None)
    names = tuple(map(str, range(1000)))
    size = size if fixed else None
    return data.Dataset("numbered", names, 1, size, on_bad_image, {"train": split, "test": split})


def take(dataset, steps, **options):
    options = {
        "batch_size": 16, "seed": 5, "image_size": 8, "augmentation": "pad_crop_flip", **options
    }  # fmt: skip
    with data.training_batches(dataset, "train", **options) as batches:
        return [next(batches) for _ in range(steps)]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


def joined(shares):
    """Global batches of the hosts' batches."""
    return [
        {name: np.concatenate([host[name] for host in hosts]) for name in hosts[0]}
        for hosts in zip(*shares, strict=True)
    ]


@pytest.fixture(scope="module")
def expected():
    return take(numbered(), 200)


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_shares_join_to_the_same_global_batches(hosts, expected):
    shares = [take(numbered(), 200, process_index=i, process_count=hosts) for i in range(hosts)]
    assert shares[0][0]["images"].shape == (16 // hosts, 8, 8, 1)
    assert_same(joined(shares), expected)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_change_nothing(threads, expected):
    assert_same(take(numbered(), 200, num_threads=threads), expected)


@pytest.mark.parametrize("start", [1, 57])
def test_a_restart_goes_on_with_the_same_batches(start, expected):
    assert_same(take(numbered(), 200 - start, start_step=start), expected[start:])


def test_a_restart_far_into_the_run_takes_no_longer():
    started = time.perf_counter()
    take(numbered(), 1, start_step=10**12)
    assert time.perf_counter() - started < 2


def test_keeping_decoded_images_changes_nothing(expected):
    assert_same(take(numbered(fixed=False), 200), expected)


def test_another_seed_is_another_stream(expected):
    other = take(numbered(), 200, seed=6)
    assert not any((a["labels"] == b["labels"]).all() for a, b in zip(other, expected, strict=True))


@pytest.mark.parametrize("augmentation", ["none", "shift", "random_resized_crop_flip", COMPOSED])
def test_hosts_restarts_and_threads_change_nothing_for_any_augmentation(augmentation):
    options = {"augmentation": augmentation, "image_size": (12, 10)}
    whole = take(numbered(), 12, **options)
    shares = [
        take(numbered(), 7, start_step=5, process_index=i, process_count=2, num_threads=2, **options) for i in range(2)
    ]
    assert_same(joined(shares), whole[5:])


def test_every_example_comes_once_an_epoch_in_another_order():
    batches = take(numbered(97), 97 * 3, batch_size=8)  # 24 epochs; batches straddle their ends
    labels = np.concatenate([batch["labels"] for batch in batches]).reshape(24, 97)
    assert (np.sort(labels) == np.arange(97)).all()
    assert len({tuple(epoch) for epoch in labels}) == 24


def test_a_batch_may_be_larger_than_the_split():
    (batch,) = take(numbered(10), 1, batch_size=40)
    np.testing.assert_array_equal(np.bincount(batch["labels"]), 4)


def test_labels_belong_to_their_images():
    dataset = numbered(700)
    for batch in take(dataset, 50, augmentation="none"):
        index = batch["images"][:, 0, :2, 0] @ np.array([256, 1])
        np.testing.assert_array_equal(batch["labels"], index)
        assert batch["labels"].dtype == np.int32 and batch["images"].dtype == np.uint8


def test_augmentation_differs_from_image_to_image_and_from_epoch_to_epoch():
    dataset = numbered(1, size=(32, 32))
    batches = take(dataset, 2, batch_size=64, image_size=32)
    images = np.concatenate([batch["images"] for batch in batches])
    assert len({image.tobytes() for image in images}) > 40  # of 162 that are possible
    assert (batches[0]["images"] != batches[1]["images"]).any()


def test_the_last_part_of_an_augmentation_changes_just_its_own_pixels():
    """Erasing comes last: what it leaves is what the batch without it holds."""
    dataset = numbered(size=(32, 32))
    plain, erased = (
        take(dataset, 3, image_size=32, augmentation=name)
        for name in ("pad_crop_flip+trivial_augment", "pad_crop_flip+trivial_augment+random_erasing:1")
    )
    for one, other in zip(plain, erased, strict=True):
        same = one["images"] == other["images"]
        assert 0.5 < same.mean() < 1 and (other["images"][~same] == 0).all()


def test_another_seed_augments_otherwise():
    one, other = (take(numbered(1), 1, seed=seed) for seed in (1, 2))
    assert (one[0]["images"] != other[0]["images"]).any()


def evaluate(dataset, hosts=1, **options):
    options = {"batch_size": 16, "image_size": 8, **options}
    shares = []
    for host in range(hosts):
        with data.evaluation_batches(dataset, "test", process_index=host, process_count=hosts, **options) as batches:
            shares.append(list(batches))
    return joined(shares)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 97])
def test_an_evaluation_sees_each_example_once(hosts, n):
    batches = evaluate(numbered(n), hosts)
    assert len(batches) == -(-n // 16)
    labels = np.concatenate([batch["labels"] for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.dtype == np.float32 and labels.dtype == np.int32
    assert sorted(labels[mask == 1]) == list(range(n))
    assert set(mask) <= {0, 1} and mask.sum() == n
    assert all(batch["images"].shape == (16, 8, 8, 1) for batch in batches)


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 3}])
def test_an_evaluation_is_the_same_however_it_is_read(options):
    dataset = numbered(70, fixed=False)
    assert_same(evaluate(dataset, image_size=(7, 9), **options), evaluate(dataset, image_size=(7, 9)))


@pytest.mark.parametrize("batches", [data.training_batches, data.evaluation_batches])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 10, "process_count": 4}, "batch_size 10: .*hosts, 4"),
        ({"batch_size": 0}, "batch_size 0: a positive multiple"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 .*\[0, 2\)"),
        ({"image_size": (8, 0)}, r"image_size \(8, 0\): .*at least 1"),
        ({"num_threads": -2}, "num_threads -2: at least 0"),
        ({"num_workers": -1}, "num_workers -1: at least 0"),
        ({"resize": 7}, r"resize \(7, 7\) .*at least \(8, 8\)"),
    ],
)
def test_impossible_settings_name_the_value_and_the_valid_ones(batches, options, message):
    more = {"seed": 0, "augmentation": "none"} if batches is data.training_batches else {}
    options = {"batch_size": 16, "image_size": 8, **more, **options}
    with pytest.raises(ValueError, match=message):
        batches(numbered(), "train", **options)


@pytest.mark.parametrize("key", ["seed", "start_step"])
def test_a_negative_seed_or_step_is_refused(key):
    with pytest.raises(ValueError, match=f"{key} -1: at least 0"):
        take(numbered(), 1, **{key: -1})


def test_an_unknown_augmentation_is_refused_at_once():
    with pytest.raises(ValueError, match="'mixup'.*random_resized_crop_flip"):
        take(numbered(), 1, augmentation="mixup")


@pytest.mark.parametrize("options", [{}, {"num_threads": 3}])
@pytest.mark.parametrize("fixed", [True, False])
def test_a_bad_image_is_an_error_with_its_place(options, fixed):
    dataset = numbered(bad=(13,), fixed=fixed)
    with pytest.raises(data.BadImageError, match=r"^/numbered/13.png: .*not an image") as error:
        take(dataset, 7, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(data.BadImageError, match=r"^/numbered/13.png"):
        evaluate(dataset, **options)


def test_a_bad_image_met_by_a_worker_process_is_the_same_error():
    with pytest.raises(data.BadImageError, match=r"^/numbered/13.png: .*not an image"):
        take(numbered(bad=(13,)), 7, num_workers=1)


@pytest.mark.parametrize("options", [{}, {"num_threads": 3}])
def test_skipped_images_are_counted_reported_and_replaced(options, caplog):
    bad = (3, 13, 14, 96)
    dataset = numbered(bad=bad, on_bad_image="skip")
    batches = take(dataset, 97, **options)  # 16 epochs
    labels = np.concatenate([batch["labels"] for batch in batches]).reshape(16, 97)
    once = set(range(97)) - set(bad)
    assert all(set(epoch) == once for epoch in labels)
    assert dataset.bad_images.keys() == {f"/numbered/{index}.png" for index in bad}
    assert all("not an image" in reason for reason in dataset.bad_images.values())
    for place in dataset.bad_images:
        assert caplog.text.count(place) == 1
    masks = np.concatenate([batch["mask"] for batch in evaluate(dataset, **options)])
    np.testing.assert_array_equal(np.flatnonzero(masks[:97] == 0), bad)


def test_worker_processes_change_nothing_and_report_what_they_skip():
    bad = {"bad": (3, 13), "on_bad_image": "skip"}
    one, other = numbered(**bad), numbered(**bad)
    children = len(psutil.Process().children())
    assert_same(take(one, 200, num_workers=2, augmentation=COMPOSED), take(other, 200, augmentation=COMPOSED))
    assert one.bad_images == other.bad_images and len(one.bad_images) == 2
    assert len(psutil.Process().children()) <= children + 1  # Python's resource tracker stays.


def test_skipping_changes_with_neither_hosts_nor_restarts():
    bad = {"bad": (3, 13, 14, 96), "on_bad_image": "skip"}
    whole = take(numbered(**bad), 30)
    shares = [take(numbered(**bad), 20, start_step=10, process_index=i, process_count=2) for i in range(2)]
    assert_same(joined(shares), whole[10:])


ALL_SKIPPED = r"^numbered (train|test): no image can be used, all 5 were skipped; the last one is /numbered/\d.png: .*"


def test_a_training_split_of_bad_images_only_is_an_error():
    with pytest.raises(data.BadImageError, match=ALL_SKIPPED) as error:
        take(numbered(5, bad=range(5), on_bad_image="skip"), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"num_threads": 3}, {"batch_size": 2}])
def test_an_evaluation_of_bad_images_only_ends_in_an_error(options):
    with pytest.raises(data.BadImageError, match=ALL_SKIPPED) as error:
        evaluate(numbered(5, bad=range(5), on_bad_image="skip"), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n, bad", [(6, range(3, 6)), (6, range(6)), (3, range(3))])
def test_of_several_hosts_none_judges_the_split_by_its_own_share(n, bad):
    masks = [batch["mask"] for batch in evaluate(numbered(n, bad=bad, on_bad_image="skip"), 2, batch_size=6)]
    np.testing.assert_array_equal(masks, [[index < n and index not in bad for index in range(6)]])


def test_batches_say_how_many_images_they_have_skipped(caplog):
    dataset = numbered(20, bad=(3, 9, 14), on_bad_image="skip")
    with data.evaluation_batches(dataset, "test", batch_size=8, image_size=8) as batches:
        assert batches.num_skipped == 0
        skipped = [batches.num_skipped for _ in batches]
    assert skipped == [1, 3, 3]
    assert caplog.messages[-1] == "numbered test: this host skipped 3 bad images, which no result counts"
    with data.training_batches(
        dataset, "train", batch_size=20, seed=0, image_size=8, augmentation="shift"
    ) as batches:  # fmt: skip
        next(batches), next(batches)  # Two epochs.
        assert batches.num_skipped == 6


def test_an_evaluation_without_bad_images_warns_of_none(caplog):
    evaluate(numbered(20, on_bad_image="skip"))
    assert not caplog.messages


def test_a_label_beyond_the_classes_is_an_error_with_its_place():
    split = DecodedSplit(Numbered(20), channels=1, num_classes=12, image_size=(8, 8))
    dataset = data.Dataset("beyond", tuple("abcdefghijkl"), 1, (8, 8), "error", {"train": split})
    with pytest.raises(data.BadImageError, match=r"/numbered/1\d.png: label 1\d is not in \[0, 12\)"):
        take(dataset, 2)


@pytest.mark.parametrize("use", ["closed", "used up"])
def test_no_threads_stay_behind(use):
    before = set(threading.enumerate())
    batches = data.evaluation_batches(numbered(), "test", batch_size=16, image_size=8, num_threads=3)
    next(batches)
    if use == "closed":
        batches.close()
    else:
        assert len(list(batches)) == 6
    deadline = time.time() + 10
    while set(threading.enumerate()) - before and time.time() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_memory_does_not_grow_with_the_steps():
    dataset = numbered()
    options = {"batch_size": 16, "seed": 5, "image_size": 8, "augmentation": "shift"}
    with data.training_batches(dataset, "train", **options) as batches:
        for _ in range(200):
            next(batches)
        before = psutil.Process().memory_info().rss
        for _ in range(3000):
            next(batches)
    assert psutil.Process().memory_info().rss - before < 10e6
