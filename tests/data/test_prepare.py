"""Preparing data sets: from archives of the official form, whole or not at all."""

import argparse
import contextlib
import functools
import http.server
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdpoint_jax import data
from sdpoint_jax.cli import prepare as command
from sdpoint_jax.data import download, prepare
from sdpoint_jax.data.sources import cifar, imagenet

COUNTS = {"train": 25, "test": 5}
RNG = np.random.default_rng(0)
PIXELS = {split: RNG.integers(0, 256, (n, 3072), np.uint8) for split, n in COUNTS.items()}
FINE = {split: np.arange(n) % 10 for split, n in COUNTS.items()}
COARSE = {split: FINE[split] // 2 for split in COUNTS}
NAMES, COARSE_NAMES = [f"class_{i}" for i in range(10)], [f"kind_{i}" for i in range(5)]


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def batches_of(split, count):
    return np.split(np.arange(COUNTS[split]), count)


def binary(split, rows, *labels):
    columns = [label[split][rows][:, None].astype(np.uint8) for label in labels]
    return np.concatenate([*columns, PIXELS[split][rows]], 1).tobytes()


def python(split, rows, **labels):
    values = {key: label[split][rows].tolist() for key, label in labels.items()}
    return pickle.dumps({"data": PIXELS[split][rows], **values}, protocol=2)


def lines(names):
    return "\n".join([*names, ""]).encode()


def archive_files(version):
    """The files of an official archive, with COUNTS images."""
    train, test = batches_of("train", 5), np.arange(5)
    everything = np.arange(25)
    if version == "cifar-10-binary.tar.gz":
        return {
            **{f"c/data_batch_{i + 1}.bin": binary("train", train[i], FINE) for i in range(5)},
            "c/test_batch.bin": binary("test", test, FINE),
            "c/batches.meta.txt": lines(NAMES),
        }
    if version == "cifar-10-python.tar.gz":
        return {
            **{f"c/data_batch_{i + 1}": python("train", train[i], labels=FINE) for i in range(5)},
            "c/test_batch": python("test", test, labels=FINE),
            "c/batches.meta": pickle.dumps({"label_names": NAMES}),
        }
    if version == "cifar-100-binary.tar.gz":
        return {
            "c/train.bin": binary("train", everything, COARSE, FINE),
            "c/test.bin": binary("test", test, COARSE, FINE),
            "c/fine_label_names.txt": lines(NAMES),
            "c/coarse_label_names.txt": lines(COARSE_NAMES),
        }
    names = {"fine_label_names": NAMES, "coarse_label_names": COARSE_NAMES}
    return {
        "c/train": python("train", everything, fine_labels=FINE, coarse_labels=COARSE),
        "c/test": python("test", test, fine_labels=FINE, coarse_labels=COARSE),
        "c/meta": pickle.dumps(names),
    }


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setattr(cifar, "NUM_EXAMPLES", COUNTS)

    def make(path, version):
        archive = write_tar(path / version, archive_files(version))
        monkeypatch.setitem(cifar.MD5, version, download.md5(archive))
        return archive

    return make


def contents(dataset, split):
    return sorted((e["label"], e["image"].tobytes()) for e in dataset.source(split))


@pytest.mark.parametrize("version", cifar.MD5)
def test_cifar_is_what_its_archive_holds(version, small_cifar, tmp_path):
    name = "cifar100" if "100" in version else "cifar10"
    archive = small_cifar(tmp_path, version)
    prepare.prepare(name, str(tmp_path / "sets"), source=archive)
    dataset = data.load_dataset(name, str(tmp_path / "sets"))
    assert dataset.splits == COUNTS and dataset.class_names == tuple(NAMES)
    assert dataset.image_size == (32, 32) and dataset.channels == 3
    for split in COUNTS:
        images = PIXELS[split].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        expected = [(int(k), image.tobytes()) for k, image in zip(FINE[split], images, strict=True)]
        assert contents(dataset, split) == sorted(expected)


def test_an_archive_in_a_directory_is_found(small_cifar, tmp_path):
    small_cifar(tmp_path, "cifar-10-python.tar.gz")
    prepare.prepare("cifar10", str(tmp_path / "sets"), source=str(tmp_path))
    assert data.load_dataset("cifar10", str(tmp_path / "sets")).splits == COUNTS


def test_a_wrong_archive_is_refused_by_its_checksum(tmp_path):
    version = "cifar-10-binary.tar.gz"
    archive = write_tar(tmp_path / version, archive_files(version))
    with pytest.raises(ValueError, match=f"{archive}.*expected {cifar.MD5[version]}") as error:
        prepare.prepare("cifar10", str(tmp_path / "sets"), source=archive)
    assert download.md5(archive) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "sets").exists()


def test_an_archive_without_all_its_images_is_refused(small_cifar, monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "NUM_EXAMPLES", {"train": 26, "test": 5})
    archive = small_cifar(tmp_path, "cifar-10-binary.tar.gz")
    with pytest.raises(ValueError, match="cifar10 train: 25 examples found, 26 expected"):
        prepare.prepare("cifar10", str(tmp_path / "sets"), source=archive)
    with pytest.raises(ValueError, match="not prepared"):
        data.load_dataset("cifar10", str(tmp_path / "sets"))


def test_a_set_that_is_there_is_left_alone(small_cifar, tmp_path):
    archive = small_cifar(tmp_path, "cifar-10-binary.tar.gz")
    directory = prepare.prepare("cifar10", str(tmp_path), source=archive)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    os.remove(archive)
    assert prepare.prepare("cifar10", str(tmp_path), source=archive) == directory
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_the_catalogue_reads_a_prepared_cifar(small_cifar, tmp_path):
    import tensorflow_datasets as tfds

    archive = small_cifar(tmp_path, "cifar-100-python.tar.gz")
    prepare.prepare("cifar100", str(tmp_path), source=archive)
    source = tfds.data_source("cifar100", split="test", data_dir=str(tmp_path))
    assert len(source) == 5
    assert sorted(example["coarse_label"] for example in source) == sorted(COARSE["test"])


def jpeg(seed, mode="RGB", format="JPEG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


@pytest.fixture
def small_imagenet(monkeypatch, tmp_path):
    """Tar files of ImageNet's form: two classes, one PNG and one CMYK image under JPEG names."""
    monkeypatch.setattr(imagenet, "NUM_EXAMPLES", {"train": 6, "validation": 3})
    labels = imagenet._lines("labels.txt")
    wanted = labels[3], labels[500]
    train = {f"{name}_{i}.JPEG": jpeg(i) for name in wanted for i in range(3)}
    train[f"{wanted[0]}_1.JPEG"] = jpeg(1, format="PNG")
    train[f"{wanted[1]}_2.JPEG"] = jpeg(2, mode="CMYK")
    classes = {}
    for name in wanted:
        inside = {file: content for file, content in train.items() if file.startswith(name)}
        inner = write_tar(tmp_path / "inner.tar", inside, "w")
        classes[f"{name}.tar"] = Path(inner).read_bytes()
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in (2, 3, 1)}  # not sorted
    of_validation = {1: labels[7], 2: labels[9], 3: labels[7]}
    lines = {"labels.txt": labels, "validation_labels.txt": [of_validation[i] for i in (1, 2, 3)]}
    monkeypatch.setattr(imagenet, "_lines", lines.get)
    source = tmp_path / "tars"
    source.mkdir()
    write_tar(source / "ILSVRC2012_img_train.tar", classes, "w")
    write_tar(source / "ILSVRC2012_img_val.tar", validation, "w")
    expected = {
        "train": {file: (labels.index(file[:9]), content) for file, content in train.items()},
        "validation": {
            file: (labels.index(of_validation[int(file[-6])]), content) for file, content in validation.items()
        },
    }
    return source, expected


def test_imagenet_is_what_its_tar_files_hold(small_imagenet, tmp_path):
    source, expected = small_imagenet
    prepare.prepare("imagenet2012", str(tmp_path / "sets"), source=str(source))
    dataset = data.load_dataset("imagenet2012", str(tmp_path / "sets"))
    assert dataset.num_classes == 1000 and dataset.image_size is None
    assert dataset.splits == {"train": 6, "validation": 3}
    for split in expected:
        examples = dataset.source(split)
        for index in range(len(examples)):
            label, content = expected[split].pop(examples.where(index).split()[-1])
            assert examples[index]["label"] == label
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(examples[index]["image"], pixels)
        assert not expected[split]


def test_a_truncated_imagenet_leaves_no_set(small_imagenet, tmp_path):
    source, _ = small_imagenet
    train = source / "ILSVRC2012_img_train.tar"
    train.write_bytes(train.read_bytes()[: train.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"^{train}: damaged") as error:
        prepare.prepare("imagenet2012", str(tmp_path / "sets"), source=str(source))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not prepared"):
        data.load_dataset("imagenet2012", str(tmp_path / "sets"))


def test_a_validation_archive_that_lacks_images_is_refused(small_imagenet, tmp_path):
    source, _ = small_imagenet
    archive = write_tar(source / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": jpeg(101)}, "w")
    with pytest.raises(ValueError, match=f"{archive}: 1 images in it, 3 expected"):
        prepare.prepare("imagenet2012", str(tmp_path / "sets"), source=str(source))


def test_imagenet_says_which_files_it_needs(tmp_path):
    with pytest.raises(ValueError, match="--source=.*ILSVRC2012_img_train.tar and ILSVRC2012"):
        prepare.prepare("imagenet2012", str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}: no ILSVRC2012_img_train.tar there"):
        prepare.prepare("imagenet2012", str(tmp_path), source=str(tmp_path))


@pytest.fixture
def image_folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            place = tmp_path / "My Images" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                (place / f"{index}.jpg").write_bytes(jpeg(index + 10 * count))
    return tmp_path / "My Images"


def run_command(*arguments):
    """Runs the command as a parser of its own would."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_a_prepared_folder_is_the_folder(image_folder, tmp_path, capsys):
    assert not run_command(f"folder:{image_folder}", f"--data-dir={tmp_path}")
    assert capsys.readouterr().out == f"folder:{image_folder} is prepared: {tmp_path}/my_images/1.0.0\n"
    one = data.load_dataset(f"folder:{image_folder}")
    other = data.load_dataset("my_images", str(tmp_path))
    assert other.class_names == one.class_names and other.splits == one.splits
    assert other.image_size == one.image_size == (12, 16)
    for split in one.splits:
        assert contents(one, split) == contents(other, split)


def test_a_bad_image_stops_the_preparation_of_a_folder_or_is_left_out(image_folder, tmp_path, caplog):
    bad = image_folder / "train" / "bee" / "3.jpg"
    bad.write_bytes(b"broken")
    with pytest.raises(data.BadImageError, match=f"{bad}: .*not an image"):
        prepare.prepare(f"folder:{image_folder}", str(tmp_path), set_name="mine")
    prepare.prepare(f"folder:{image_folder}", str(tmp_path), set_name="mine", on_bad_image="skip")
    assert data.load_dataset("mine", str(tmp_path)).splits == {"train": 7, "validation": 4}
    assert f"left out: {bad}" in caplog.text


def change(folder):
    (folder / "train" / "bee" / "3.jpg").write_bytes(jpeg(7))


def add(folder):
    (folder / "train" / "bee" / "4.jpg").write_bytes(jpeg(7))


def take(folder):
    (folder / "train" / "bee" / "3.jpg").unlink()


def rename(folder):
    for split in ("train", "val"):
        (folder / split / "bee").rename(folder / split / "wasp")


def take_a_split(folder):
    shutil.rmtree(folder / "val")


@pytest.mark.parametrize(
    "alter, found",
    [
        (change, "train/bee/3.jpg has changed"),
        (add, "train/bee/4.jpg is not in it"),
        (take, "train/bee/3.jpg is in it, but no longer in the folder"),
        (rename, "it has the classes ant, bee, the folder ant, wasp"),
        (take_a_split, "it has the splits train, validation, the folder train"),
    ],
)
@pytest.mark.parametrize("place", ["other", "same"])
def test_a_set_of_this_name_that_was_prepared_from_other_images_is_refused(image_folder, tmp_path, alter, found, place):
    directory = prepare.prepare(f"folder:{image_folder}", str(tmp_path))
    if place == "other":
        (tmp_path / "other").mkdir()
        image_folder = Path(shutil.copytree(image_folder, tmp_path / "other" / image_folder.name))
    alter(image_folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in directory.iterdir())
    with pytest.raises(ValueError, match=f"^{directory} was prepared from other images.*{found}; give another --name"):
        prepare.prepare(f"folder:{image_folder}", str(tmp_path))
    assert sorted((path, path.stat().st_mtime_ns) for path in directory.iterdir()) == before
    prepare.prepare(f"folder:{image_folder}", str(tmp_path), set_name="mine")


def test_the_same_images_are_prepared_once_wherever_they_lie(image_folder, tmp_path):
    (image_folder / "train" / "bee" / "bad.jpg").write_bytes(b"broken")
    directory = prepare.prepare(f"folder:{image_folder}", str(tmp_path), on_bad_image="skip")
    shutil.copytree(image_folder, tmp_path / "other" / image_folder.name)
    for folder in (image_folder, tmp_path / "other" / image_folder.name):
        assert prepare.prepare(f"folder:{folder}", str(tmp_path), on_bad_image="skip") == directory


def test_what_is_no_prepared_set_is_left_alone(image_folder, tmp_path):
    note = tmp_path / "mine" / "1.0.0" / "note"
    note.parent.mkdir(parents=True)
    for path in (note, tmp_path / "mine" / ".lock"):
        path.write_text("dear")
    with pytest.raises(ValueError, match="mine/1.0.0: exists and is not a prepared data set; move it"):
        prepare.prepare(f"folder:{image_folder}", str(tmp_path), set_name="mine")
    assert note.read_text() == (tmp_path / "mine" / ".lock").read_text() == "dear"


def test_the_command_of_earlier_versions_names_the_present_one():
    ended = subprocess.run([sys.executable, "-m", "sdpoint_jax.data.prepare", "digits"], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr == "error: the command is python -m sdpoint_jax prepare\n"


def test_an_impossible_name_for_a_folder_is_refused(image_folder, tmp_path):
    with pytest.raises(ValueError, match="'7 seas'"):
        prepare.prepare(f"folder:{image_folder}", str(tmp_path), set_name="7 seas")


def test_the_commands_flags_reach_the_preparation(image_folder, tmp_path):
    (image_folder / "train" / "bee" / "3.jpg").write_bytes(b"broken")
    flags = [f"--data-dir={tmp_path}", "--name=mine"]
    with pytest.raises(data.BadImageError, match="not an image"):
        run_command(f"folder:{image_folder}", *flags)
    run_command(f"folder:{image_folder}", *flags, "--on-bad-image=skip")
    assert data.load_dataset("mine", str(tmp_path)).splits == {"train": 7, "validation": 4}
    with pytest.raises(ValueError, match=f"{tmp_path}: no cifar-10-binary.tar.gz or cifar-10-python.tar.gz there"):
        run_command("cifar10", f"--data-dir={tmp_path}", f"--source={tmp_path}")


def test_an_unknown_name_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="^unknown data set 'no_such_set'; valid: digits") as error:
        run_command("no_such_set", f"--data-dir={tmp_path}")
    assert "\n" not in str(error.value)


def test_an_unknown_treatment_of_bad_images_names_the_known_ones(image_folder, tmp_path):
    with pytest.raises(argparse.ArgumentError, match="--on-bad-image.*'stop'.*error.*skip"):
        run_command("digits", "--on-bad-image=stop")
    with pytest.raises(ValueError, match="on_bad_image 'stop'; valid: error, skip"):
        prepare.prepare(f"folder:{image_folder}", str(tmp_path), on_bad_image="stop")


def test_parsing_the_commands_flags_imports_no_heavy_library():
    code = (
        "import argparse, sys; from sdpoint_jax.cli import prepare; "
        "prepare.add_arguments(argparse.ArgumentParser()); "
        "print({'jax', 'numpy', 'absl', 'tensorflow_datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_killed_preparation_is_done_anew(image_folder, tmp_path):
    code = """
import sys, time
from sdpoint_jax.data import prepare
from sdpoint_jax.data.sources import folder
examples = folder._checked_examples
def slow(*arguments):
    for example in examples(*arguments):
        print("one", flush=True)
        yield example
        time.sleep(60)
folder._checked_examples = slow
prepare.prepare("folder:" + sys.argv[1], sys.argv[2], set_name="mine")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image_folder), str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.time() + 30
        while not list(tmp_path.glob("mine/.1.0.0.*/mine/*incomplete*")) and time.time() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("mine/.1.0.0.*"))
    (tmp_path / "mine" / "incomplete.X_1.0.0").mkdir()  # Of another program that uses TFDS.
    with pytest.raises(ValueError, match="unknown data set 'mine'"):
        data.load_dataset("mine", str(tmp_path))
    prepare.prepare(f"folder:{image_folder}", str(tmp_path), set_name="mine")
    assert data.load_dataset("mine", str(tmp_path)).splits == {"train": 8, "validation": 4}
    assert sorted(os.listdir(tmp_path / "mine")) == [".lock", "1.0.0", "incomplete.X_1.0.0"]


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files, with byte ranges."""

    def do_GET(self):
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(content) - start)
        self.end_headers()
        self.wfile.write(content[start:][: self.server.limit])

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(directory):
    handler = functools.partial(Server, directory=str(directory))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        server.starts, server.limit = [], None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server, f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def test_cifar_is_downloaded_and_a_broken_download_goes_on(small_cifar, monkeypatch, tmp_path):
    archive = small_cifar(tmp_path, "cifar-10-binary.tar.gz")
    with serving(tmp_path) as (server, url):
        monkeypatch.setattr(cifar, "URL", url)
        server.limit = 1000
        with pytest.raises(ValueError, match=f"cannot fetch {url}cifar-10-binary.tar.gz.*--source"):
            prepare.prepare("cifar10", str(tmp_path / "sets"))
        server.limit = None
        prepare.prepare("cifar10", str(tmp_path / "sets"))
    assert server.starts == [0, 1000]
    downloaded = tmp_path / "sets" / "downloads" / "cifar-10-binary.tar.gz"
    assert download.md5(downloaded) == download.md5(archive)
    assert data.load_dataset("cifar10", str(tmp_path / "sets")).splits == COUNTS


def test_without_a_network_a_set_of_the_catalogue_fails_at_once(monkeypatch, tmp_path):
    def unreachable(*_):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(download.socket, "create_connection", unreachable)
    with pytest.raises(ValueError, match="cannot reach .*unreachable.*mnist"):
        prepare.prepare("mnist", str(tmp_path))


def test_without_a_network_the_download_fails_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "URL", "http://127.0.0.1:9/")  # Nobody listens there.
    started = time.perf_counter()
    with pytest.raises(ValueError, match="cannot fetch http.*refused.*--source"):
        prepare.prepare("cifar10", str(tmp_path))
    assert time.perf_counter() - started < 5
