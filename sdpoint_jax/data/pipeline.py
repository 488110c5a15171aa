"""Batches of uint8 images.

A training batch is a pure function of (seed, step): no state is kept from batch to batch, so that a
run may begin at any step, on any number of hosts, with any number of threads and worker processes,
and meets the same images in the same order with the same crops. Grain runs that function ahead of
its use, in threads or processes.

Host i of P takes rows i*B/P ... (i+1)*B/P - 1 of each global batch of B.
"""

import functools
import os
import sys

import numpy as np
from absl import logging

from sdpoint_jax.data.augment import Size, augmentation_named, resize_and_center_crop
from sdpoint_jax.data.dataset import Dataset
from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.data.examples import Examples

ORDER, AUGMENTATION = 0, 1  # What a random stream of a seed is for.


class Batches:
    """An iterator of batches; to be closed, or used in a `with` statement, unless used up."""

    def __init__(self, iterator, dataset: Dataset):
        self._iterator = iterator
        self._dataset = dataset

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            arrays, skipped = next(self._iterator)
        except Exception:  # StopIteration among them
            self.close()
            raise
        for error in skipped:
            self._report(error)
        return {name: _own(array) for name, array in arrays.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Stops the threads and processes behind it."""
        self._iterator.close()

    def _report(self, error):
        bad_images = self._dataset.bad_images
        if error.place not in bad_images:
            bad_images[error.place] = error.reason
            logging.warning("skipped bad image (%d so far): %s", len(bad_images), error)


def _own(array):
    """A copy of a worker's array, which holds shared memory as long as it lives; else the array."""
    return array if type(array) is np.ndarray else np.array(array)


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
    """Endless training batches, from batch `start_step` on.

    Every epoch is another random order of the split; each example comes once in it. A batch may end
    an epoch and begin the next one.

    Args:
      batch_size: of the global batch, over all hosts.
      seed: batch k is a pure function of (seed, k).
      image_size: side, or (height, width), of the images that come out.
      augmentation: a name in AUGMENTATIONS; "none" is the evaluation preprocessing, with `resize`.
      resize: see `evaluation_batches`.
      num_threads: 0 for none; by default one, or as many as there are cores (at most 16) if images
        are decoded anew for each batch. One more batch than that waits in memory.
      num_workers: processes to share the work; 0 for none. Each has `num_threads` of its own, by
        default a share of the cores.

    Yields:
      {"images": uint8 [B, H, W, C], "labels": int32 [B]} with B = batch_size // process_count.

    Raises:
      ValueError: an unknown split or augmentation, a batch size that the hosts do not divide.
      BadImageError: an example that cannot be used, unless the data set skips these.
    """
    size = _size(image_size)
    augment = augmentation_named(augmentation, _resize_to(dataset, size, resize))
    rows = _host_rows(batch_size, process_index, process_count)
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
    return _batches(steps, batch_at, dataset, examples, num_threads, num_workers)


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
    """Every example of the split once, over all hosts; as many batches on every host.

    Args:
      batch_size: of the global batch, over all hosts. The last batch is filled up with rows of mask
        0.
      image_size: side, or (height, width), of the images that come out: the central part of the
        resized image.
      resize: the image is resized, its aspect kept, until it just covers this (height, width); a
        number is the length of the shorter side. By default 256/224 of `image_size` where the
        images vary in size, else `image_size`.
      num_threads, num_workers: as in `training_batches`.

    Yields:
      {"images": uint8 [B, H, W, C], "labels": int32 [B], "mask": float32 [B]} with
      B = batch_size // process_count. The mask is 1 for examples, and 0 for padding and for skipped
      bad images, whose pixels and labels are 0.

    Raises:
      ValueError: an unknown split, a batch size that the hosts do not divide, `resize` under
        `image_size`.
      BadImageError: an example that cannot be used, unless the data set skips these.
    """
    size = _size(image_size)
    resize_to = _resize_to(dataset, size, resize)
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
    return _batches(steps, batch_at, dataset, examples, num_threads, num_workers)


def epoch_order(positions: np.ndarray, num_examples: int, seed: int) -> np.ndarray:
    """The examples at these positions of the endless training order: int64 [...] -> int64 [...].

    Positions e*N ... (e+1)*N - 1, with N examples, are epoch e: a permutation that depends on
    (seed, e) alone.
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


def _read_this(examples: Examples, index: int, skipped: list[BadImageError]) -> dict:
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
    raise BadImageError(f"none of the {len(examples)} images can be used", skipped[-1].place)


def _size(size) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _resize_to(dataset, size, resize) -> Size:
    if resize is None:
        return size if dataset.image_size else tuple(round(side * 256 / 224) for side in size)
    resize = _size(resize)
    if resize[0] < size[0] or resize[1] < size[1]:
        raise ValueError(f"resize {resize} does not cover the image size {size}; valid: at least {size}")
    return resize


def _host_rows(batch_size, process_index, process_count) -> slice:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, {process_count})")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch size {batch_size} is not divisible by the number of hosts, {process_count}")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _batches(steps, batch_at, dataset, examples, num_threads, num_workers) -> Batches:
    """Runs `batch_at` ahead for the steps, in threads or worker processes."""
    import grain

    if num_threads is None:
        cores = 1 if examples.cached else min(os.cpu_count() or 1, 16)
        num_threads = max(1, cores // max(1, num_workers))
    batches = steps.map(batch_at).to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads + 1))
    if num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain wants this done; in a notebook it is not.
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2))
    return Batches(iter(batches), dataset)
