"""How fast images reach the accelerator: decoding, augmenting, batching, per CPU core.

    python benchmarks/input_pipeline.py --images=FOLDER --rate=2500 --json=input_pipeline.json

Measures, on the JPEG files below FOLDER (without it, on photographs' synthetic stand-ins):
training images (decode, random-resized crop to 224, flip), evaluation images (decode, resize to
256, centre crop to 224), each against PIL doing the same work in the same run, and the whole
pipeline against its bare decoder; and images of CIFAR's size (pad, crop, flip), kept decoded. The
measurements take turns, so that another program on the machine slows all alike.

Per core means per second of CPU time, summed over threads. `--rate` is an accelerator's demand in
images per second: the table says how many cores meet it.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import platform
import random
import statistics
import sys
import tempfile
import time
from concurrent import futures

import numpy as np
from common import report
from PIL import Image

from sdpoint_jax import data
from sdpoint_jax.data import augment, decode, examples

LIBRARIES = ("numpy", "pillow", "opencv-python-headless", "grain", "tensorflow-datasets")
SIZE, RESIZE, BATCH = (224, 224), (256, 256), 32
SMALL_BATCH, SMALL_IMAGES = 128, 2048


def synthetic_photographs(count=48):
    """Makes JPEG files of photographs' sizes and, about, of their number of bytes."""
    rng = np.random.default_rng(0)
    for index in range(count):
        height, width = [(375, 500), (500, 375), (333, 500), (500, 334)][index % 4]
        image = np.zeros((height, width, 3))
        for scale in (2, 8, 32, 128):
            noise = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8)
            size = noise.shape[1] * scale, noise.shape[0] * scale
            smooth = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
            image += smooth[:height, :width] * scale**0.5
        file = io.BytesIO()
        Image.fromarray((image * (255 / image.max())).astype(np.uint8)).save(file, "JPEG", quality=90)
        yield file.getvalue()


def training_image_pil(content, rng):
    """Applies torchvision's RandomResizedCrop and RandomHorizontalFlip on PIL, to an array."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    row = np.array([rng.random() for _ in range(4 * augment.CROP_TRIES)])
    top, left, height, width = augment.random_crop_box((image.height, image.width), row)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize(SIZE[::-1], Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def training_image(content, rng):
    """Makes the project's training image of a JPEG file, from decoding to the array."""
    augmentation = augment.AUGMENTATIONS["random_resized_crop_flip"]
    row = np.array([rng.random() for _ in range(augmentation.numbers)])
    return np.array(augmentation.apply(decode.decode(content, 3), row, SIZE))


def evaluation_image_pil(content, rng):
    """Applies torchvision's Resize and CenterCrop on PIL, to an array."""
    del rng
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = RESIZE[0] / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (image.width - SIZE[1]) // 2, (image.height - SIZE[0]) // 2
    return np.array(image.crop((left, top, left + SIZE[1], top + SIZE[0])))


def evaluation_image(content, rng):
    """Makes the project's evaluation image of a JPEG file, likewise."""
    del rng
    return np.array(augment.resize_and_center_crop(decode.decode(content, 3), RESIZE, SIZE))


def small_image_pil(image, rng):
    """Applies torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip on PIL, to an array."""
    padded = Image.new("RGB", (40, 40))
    padded.paste(Image.fromarray(image), (4, 4))
    left, top = rng.randrange(9), rng.randrange(9)
    image = padded.crop((left, top, left + 32, top + 32))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


class Rate:
    """Images per second of CPU time and of wall time, over a `with` block that sets `images`."""

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.per_second = self.images / (time.perf_counter() - self.wall)
        self.per_core = self.images / (time.process_time() - self.cpu)


def one_by_one(function, inputs, seconds, threads=1):
    """Measures the rate of function(input, rng) over the inputs, again and again."""

    def work(seed):
        rng = random.Random(seed)
        count, deadline = 0, time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            function(inputs[(seed * 7 + count) % len(inputs)], rng)
            count += 1
        return count

    with futures.ThreadPoolExecutor(threads) as pool, Rate() as rate:
        rate.images = sum(pool.map(work, range(threads)))
    return rate


def by_batches(batches, seconds, ready):
    """Measures the rate of the batches, not counting the first few, which may have been `ready` before."""
    for _ in range(ready):
        next(batches)
    with Rate() as rate:
        rate.images, deadline = 0, time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            rate.images += len(next(batches)["images"])
    wait_until_idle()
    return rate


def wait_until_idle():
    """Lets threads that still work ahead finish, which would slow the next measurement."""
    busy = 1.0
    while busy > 0.01:
        cpu = time.process_time()
        time.sleep(0.1)
        busy = time.process_time() - cpu


class Arrays:
    """The records of a data set of CIFAR's form."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def read(self, index):
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, "PNG", compress_level=1)
        return file.getvalue(), index % 10

    def where(self, index):
        return f"image {index}"


def small_dataset(images):
    """Makes a data set of images of CIFAR's size, in memory."""
    split = examples.DecodedSplit(Arrays(images), channels=3, num_classes=10, image_size=(32, 32))
    names = tuple("0123456789")
    return data.Dataset("small", names, 3, (32, 32), "error", {"train": split})


def photograph_dataset(folder, photographs):
    """Makes a data set of JPEG files, which are written below `folder`."""
    for index, content in enumerate(photographs):
        path = pathlib.Path(folder, "train", str(index % 2), f"{index}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return data.load_dataset(f"folder:{folder}")


def measurements(photographs, folder, threads, stack):
    """Returns name -> function(seconds) -> Rate; None where a library is missing."""
    small = np.random.default_rng(0).integers(0, 256, (SMALL_IMAGES, 32, 32, 3), np.uint8)
    photographs = list(photographs)
    runs = {
        "train 224, PIL": lambda s: one_by_one(training_image_pil, photographs, s),
        "train 224": lambda s: one_by_one(training_image, photographs, s),
        "eval 224, PIL": lambda s: one_by_one(evaluation_image_pil, photographs, s),
        "eval 224": lambda s: one_by_one(evaluation_image, photographs, s),
        "train 32, PIL": lambda s: one_by_one(small_image_pil, small, s),
        "train 32, pipeline": None,
        f"train 224, {threads} threads": lambda s: one_by_one(training_image, photographs, s, threads),
        f"train 224, {threads} threads, pipeline": None,
    }
    try:
        large_batches = stack.enter_context(
            data.training_batches(
                photograph_dataset(folder, photographs), "train", batch_size=BATCH, seed=0,
                image_size=SIZE, augmentation="random_resized_crop_flip", num_threads=threads,
            )
        )  # fmt: skip
        small_batches = stack.enter_context(
            data.training_batches(
                small_dataset(small), "train", batch_size=SMALL_BATCH, seed=0, image_size=32,
                augmentation="pad_crop_flip", num_threads=0,
            )
        )  # fmt: skip
    except ImportError as error:
        print(f"the pipeline is not measured: {error}", file=sys.stderr)
        return runs
    for _ in range(SMALL_IMAGES // SMALL_BATCH):  # One epoch decodes.
        next(small_batches)
    runs["train 32, pipeline"] = lambda s: by_batches(small_batches, s, 0)
    runs[f"train 224, {threads} threads, pipeline"] = lambda s: by_batches(large_batches, s, 2 * threads + 2)
    return runs


def measure(runs, rounds, seconds):
    """Measures name -> {"per_core": [...], "per_second": [...]}, a rate for each round."""
    rows = {name: {"per_core": [], "per_second": []} for name, run in runs.items() if run}
    for number in range(rounds + 1):
        for name, row in rows.items():
            rate = runs[name](seconds)
            if number:  # The first round warms up.
                row["per_core"].append(rate.per_core)
                row["per_second"].append(rate.per_second)
    return rows


def ratio(rows, name, other, column):
    """Returns the median, over the rounds, of one rate over another of the same round."""
    if name not in rows or other not in rows:
        return None
    return report.ratio(rows[name][column], rows[other][column])["median"]


def show(rows, ratios, rate, rounds):
    """Prints the table; `rate` is the demand, in images/s."""
    print(f"\n{'':38}{'images/s per core (low-high)':>32}{'images/s':>10}{'cores for':>11}")
    print(f"{'':38}{f'median of {rounds}':>32}{'':10}{f'{rate:,.0f}/s':>11}")
    for name, row in rows.items():
        core = report.summary(row["per_core"])
        spread = f"{core['median']:,.0f} ({core['low']:,.0f}-{core['high']:,.0f})"
        wall = statistics.median(row["per_second"])
        print(f"{name:38}{spread:>32}{wall:>10,.0f}{rate / core['median']:>11.1f}")
    for name, value in ratios.items():
        print(f"{name:70}{'not measured' if value is None else f'{value:.2f}':>21}")


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of JPEG files (default: synthetic photographs)")
    parser.add_argument("--rate", type=float, default=2500, help="images/s that are asked for")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()

    if options.images:
        paths = sorted(pathlib.Path(options.images).rglob("*.[jJ][pP]*[gG]"))
        photographs = [path.read_bytes() for path in paths]
    else:
        photographs = list(synthetic_photographs())
    if not photographs:
        parser.error(f"--images={options.images}: no JPEG files below it")

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        runs = measurements(photographs, folder, options.threads, stack)
        rows = measure(runs, options.rounds, options.seconds)

    threaded = f"train 224, {options.threads} threads"
    ratios = {
        "train 224: this over PIL": ratio(rows, "train 224", "train 224, PIL", "per_core"),
        "eval 224: this over PIL": ratio(rows, "eval 224", "eval 224, PIL", "per_core"),
        "train 32: pipeline over PIL": ratio(rows, "train 32, pipeline", "train 32, PIL", "per_core"),
        f"{threaded}: pipeline over bare, wall time": ratio(rows, f"{threaded}, pipeline", threaded, "per_second"),
    }
    result = {
        "machine": {
            "processor": report.processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": report.versions(LIBRARIES),
        "images": options.images or "synthetic",
        "num_images": len(photographs),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "rates": {
            name: {column: report.summary(values) for column, values in row.items()} for name, row in rows.items()
        },
        "ratios": ratios,
    }
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {options.json}")
    print(f"{result['machine']['processor']}, {os.cpu_count()} cores; {len(photographs)} images")
    print(", ".join(f"{name} {value}" for name, value in result["versions"].items()))
    show(rows, ratios, options.rate, options.rounds)


if __name__ == "__main__":
    main()
