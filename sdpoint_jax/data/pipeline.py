"""Batches of uint8 images.

A training batch is a pure function of (seed, step): no state is kept from batch to batch, so that a run may begin at
any step, on any number of hosts, with any number of threads and worker processes, and meets the same images in the same
order with the same crops. Grain runs that function ahead of its use, in threads or processes.

Host i of P takes rows i*B/P ... (i+1)*B/P - 1 of each global batch of B.
"""

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from absl import logging

from sdpoint_jax.data.augment import Size, augmentation_named, resize_and_center_crop
from sdpoint_jax.data.dataset import Dataset
from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.data.examples import Examples

ORDER, AUGMENTATION = 0, 1  # What a random stream of a seed is for.


class Batches:
    """Iterates over batches; must be closed, or used in a `with` statement, unless it is used up.

    Attributes:
        num_skipped: how many bad images this host's batches have skipped so far; in training, a bad image counts each
            time that it is read.
    """

    def __init__(self, iterator: Any, dataset: Dataset, title: str, num_examples: int | None = None):
        """Takes over an iterator.

        Args:
            iterator: yields (arrays of a batch by name, list of BadImageError for the images that it has skipped).
            dataset: takes down the bad images.
            title: data set and split, for messages.
            num_examples: of the whole split, where this iterator yields each example once; if all are skipped, that
                is an error.
        """
        self.num_skipped = 0
        self._iterator = iterator
        self._dataset = dataset
        self._title = title
        self._num_examples = num_examples
        self._last_error = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            arrays, skipped = next(self._iterator)
        except StopIteration:
            self.close()
            self._check_end()
            raise
        except Exception:
            self.close()
            raise
        for error in skipped:
            self._report(error)
        return {name: _own(array) for name, array in arrays.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        self._iterator.close()

    def _report(self, error):
        self.num_skipped += 1
        self._last_error = error
        bad_images = self._dataset.bad_images
        if error.place not in bad_images:
            bad_images[error.place] = error.reason
            logging.warning("skipped bad image (%d so far): %s", len(bad_images), error)

    def _check_end(self):
        if not self.num_skipped:
            return
        if self.num_skipped == self._num_examples:
            raise _none_usable(self._title, self.num_skipped, self._last_error)
        logging.warning("%s: this host skipped %d bad images, which no result counts", self._title, self.num_skipped)


def _own(array):
    """Returns a copy of a worker's array, which holds shared memory as long as it lives; else the array."""
    return array if type(array) is np.ndarray else np.array(array)


def _none_usable(title: str, num_skipped: int, last: BadImageError) -> BadImageError:
    return BadImageError(f"no image can be used, all {num_skipped} were skipped; the last one is {last}", title)


def training_batches(
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    seed: int,
    image_size: int | Size,
    augmentation: str,
    resize: int | Size | None = None,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
) -> Batches:
    """Yields training batches without end, from batch `start_step` on.

    Every epoch is another random order of the split; each example comes once in it. A batch may end an epoch and begin
    the next one.

    Args:
        dataset: where the examples come from.
        split: see `Dataset.source`.
        batch_size: of the global batch, over all hosts.
        seed: batch k is a pure function of (seed, k).
        image_size: side, or (height, width), of the images that come out.
        augmentation: see `augment.augmentation_named`; "none" is the evaluation preprocessing, with `resize`.
        resize: see `evaluation_batches`.
        start_step: number of the first batch.
        process_index: which host this is.
        process_count: how many hosts there are.
        num_threads: 0 for none; by default one, or as many as there are cores (at most 16) if images are decoded anew
            for each batch. One more batch than that waits in memory.
        num_workers: processes to share the work; 0 for none. Each has `num_threads` of its own, by default a share of
            the cores.

    Returns:
        an iterator of {"images": uint8 [B, H, W, C], "labels": int32 [B]} with B = batch_size // process_count.

    Raises:
        ValueError: an unknown split or augmentation, a size below 1, a negative count, a batch size that the hosts do
            not divide.
        BadImageError: while iterating: an example that cannot be used, unless the data set skips these; then, that
            none can be used.
    """
    size = _size("image_size", image_size)
    augment = augmentation_named(augmentation, evaluation_resize(dataset, size, resize))
    rows = _host_rows(batch_size, process_index, process_count)
    _check_counts(seed=seed, start_step=start_step)
    examples = dataset.source(split)
    read = _read_this if dataset.on_bad_image == "error" else _read_this_or_next

    def batch_at(step):
        positions = step * batch_size + np.arange(rows.start, rows.stop)
        draws = augment.draw(np.random.default_rng((seed, AUGMENTATION, step)), batch_size)[rows]
        images = np.empty((len(positions), *size, dataset.channels), np.uint8)
        labels = np.empty(len(positions), np.int32)
        skipped = []
        for row, index in enumerate(epoch_order(positions, len(examples), seed).tolist()):
            example = read(examples, index, skipped)
            images[row] = augment.apply(example["image"], draws[row], size)
            labels[row] = example["label"]
        return {"images": images, "labels": labels}, skipped

    import grain

    steps = grain.MapDataset.range(start_step, sys.maxsize)
    return Batches(_run_ahead(steps.map(batch_at), examples, num_threads, num_workers), dataset, examples.title)


def evaluation_batches(
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    image_size: int | Size,
    resize: int | Size | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
) -> Batches:
    """Yields every example of the split once, over all hosts; as many batches on every host.

    Args:
        dataset: where the examples come from.
        split: see `Dataset.source`.
        batch_size: of the global batch, over all hosts. The last batch is filled up with rows of mask 0.
        image_size: side, or (height, width), of the images that come out: the central part of the resized image.
        resize: the image is resized, its aspect kept, until it just covers this (height, width); a number is the
            length of the shorter side. By default 256/224 of `image_size` where the images vary in size, else
            `image_size`.
        process_index: which host this is.
        process_count: how many hosts there are.
        num_threads: see `training_batches`.
        num_workers: see `training_batches`.

    Returns:
        an iterator of {"images": uint8 [B, H, W, C], "labels": int32 [B], "mask": float32 [B]} with
        B = batch_size // process_count. The mask is 1 for examples, and 0 for padding and for skipped bad images, whose
        pixels and labels are 0.

    Raises:
        ValueError: an unknown split, a size below 1, a negative count, a batch size that the hosts do not divide,
            `resize` under `image_size`.
        BadImageError: while iterating: an example that cannot be used, unless the data set skips these; then, at the
            end and on a single host, that none can be used. Of several hosts, each knows its own share alone: whoever
            sums over the hosts has to check that the masks' sum is not 0.
    """
    size = _size("image_size", image_size)
    resize_to = evaluation_resize(dataset, size, resize)
    rows = _host_rows(batch_size, process_index, process_count)
    examples = dataset.source(split)
    read = _read_this if dataset.on_bad_image == "error" else _read_this_or_none

    def batch_at(step):
        start = step * batch_size + rows.start
        count = rows.stop - rows.start
        images = np.zeros((count, *size, dataset.channels), np.uint8)
        labels, mask = np.zeros(count, np.int32), np.zeros(count, np.float32)
        skipped = []
        for row, index in enumerate(range(start, min(start + count, len(examples)))):
            example = read(examples, index, skipped)
            if example is None:
                continue
            images[row] = resize_and_center_crop(example["image"], resize_to, size)
            labels[row], mask[row] = example["label"], 1
        return {"images": images, "labels": labels, "mask": mask}, skipped

    import grain

    steps = grain.MapDataset.range(-(-len(examples) // batch_size))
    iterator = _run_ahead(steps.map(batch_at), examples, num_threads, num_workers)
    return Batches(iterator, dataset, examples.title, len(examples) if process_count == 1 else None)


def epoch_order(positions: np.ndarray, num_examples: int, seed: int) -> np.ndarray:
    """Returns the examples at these positions of the endless training order: int64 [...] -> int64 [...].

    Positions e*N ... (e+1)*N - 1, with N examples, are epoch e: a permutation that depends on (seed, e) alone.
    """
    epochs, places = np.divmod(positions, num_examples)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = _permutation(num_examples, seed, epoch)[places[here]]
    return indices


@functools.lru_cache(maxsize=4)
def _permutation(num_examples, seed, epoch):
    return np.random.default_rng((seed, ORDER, epoch)).permutation(num_examples)


# What is read at a place, by `on_bad_image`. Errors that are passed over go to `skipped`.


def _read_this(examples: Examples, index: int, skipped: list[BadImageError]) -> dict[str, Any]:
    del skipped
    return examples[index]


def _read_this_or_none(examples, index, skipped):
    try:
        return examples[index]
    except BadImageError as error:
        skipped.append(error)


def _read_this_or_next(examples, index, skipped):
    for step in range(len(examples)):
        example = _read_this_or_none(examples, (index + step) % len(examples), skipped)
        if example is not None:
            return example
    raise _none_usable(examples.title, len(examples), skipped[-1])


def _size(key, size) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"{key} {size}: height and width are at least 1")
    return int(height), int(width)


def evaluation_resize(dataset: Dataset, size: Size, resize: int | Size | None = None) -> Size:
    """Returns the (height, width) that an image just covers, aspect kept, before its central `size` is cut out.

    Args, Raises: see `evaluation_batches`, whose `image_size` is `size`.
    """
    if resize is None:
        return size if dataset.image_size else (round(size[0] * 256 / 224), round(size[1] * 256 / 224))
    height, width = _size("resize", resize)
    if height < size[0] or width < size[1]:
        raise ValueError(f"resize {(height, width)} does not cover the image size {size}; valid: at least {size}")
    return height, width


def _host_rows(batch_size, process_index, process_count) -> slice:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, {process_count})")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size}: a positive multiple of the number of hosts, {process_count}")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _check_counts(**counts: int) -> None:
    for key, value in counts.items():
        if value < 0:
            raise ValueError(f"{key} {value}: at least 0")


def _run_ahead(batches, examples, num_threads, num_workers):
    """Returns an iterator of a Grain data set's batches, which threads or processes compute ahead of their use."""
    import grain

    _check_counts(num_workers=num_workers)
    if num_threads is None:
        cores = 1 if examples.cached else min(os.cpu_count() or 1, 16)
        num_threads = max(1, cores // max(1, num_workers))
    _check_counts(num_threads=num_threads)
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads + 1))
    if num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain wants this done; in a notebook it is not.
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2))
    return iter(batches)
