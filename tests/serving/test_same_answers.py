"""The sweep, the command predict and the service give the same answers for the same photographs."""

import time

import commands
import numpy as np
import pytest
import services
import tiny
from PIL import Image

from sdpoint_jax.evaluation import sweep
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.serving.service import ServiceSettings, make_app
from sdpoint_jax.storage import artefact
from sdpoint_jax.storage.device import describe_device

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="needs the extra dev")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra predict")
from fastapi.testclient import TestClient  # noqa: E402

INSTANCES = (SDPointInstance(1, 0.5), FULL_RESOLUTION)


def save_photos(folder):
    """JPEGs of all kinds that cameras and web pages give, of two classes."""
    rng = np.random.RandomState(0)

    def photo(height, width, mode="RGB"):
        coarse = Image.fromarray(rng.randint(0, 256, (5, 7, 3), np.uint8))
        return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)

    rotated = Image.Exif()
    rotated[0x0112] = 6
    for split, kinds in (
        ("train", {f"{index}.jpg": (photo(9, 12), {}) for index in range(8)}),
        (
            "test",
            {
                "ordinary.jpg": (photo(61, 90), {"quality": 75}),
                "exact.jpg": (photo(8, 8), {"subsampling": 0}),
                "grey.jpg": (photo(33, 20, "L"), {}),
                "ink.jpg": (photo(40, 30, "CMYK"), {}),
                "progressive.jpeg": (photo(50, 77), {"progressive": True, "quality": 30}),
                "rotated.JPG": (photo(64, 48), {"exif": rotated}),
            },
        ),
    ):
        for index, (name, (image, settings)) in enumerate(kinds.items()):
            path = folder / split / "ab"[index % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, "JPEG", **settings)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def swept_photos(photos, tmp_path_factory):
    """The artefact of a sweep of the photographs, and its rows; resized to 10, the centre of 8 cut out."""
    config = tiny.config(batch_size=4, evaluation_batch_size=8, reestimate_batches=1, instances="full,p01_r0.50")
    config.dataset.update(
        name=f"folder:{photos}", resize=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), augmentation="none"
    )
    experiment, output = Experiment(config), tmp_path_factory.mktemp("swept_photos")
    drawn = tiny.variables(experiment.model, (8, 8, 3))["params"]
    rows = sweep.sweep(experiment, drawn, INSTANCES, output, split="test")
    artefact.save(services.with_latencies(artefact.load(output / "artefact"), describe_device()), output / "artefact")
    return output / "artefact", {row.name: row for row in rows}


@pytest.mark.parametrize("name", [instance.name for instance in INSTANCES])
def test_a_photograph_gets_the_same_answer_in_a_sweep_in_predict_and_in_the_service(
    photos, swept_photos, tmp_path, name
):
    path, rows = swept_photos
    output = tmp_path / "results.parquet"
    commands.run("predict", path, photos / "test", f"--output={output}", "--top=2", f"--instance={name}")
    found = parquet.read_table(output).to_pylist()
    predicted = {(row["path"], row["label"]): row["probability"] for row in found}
    files = sorted(photos.glob("test/*/*"))
    assert len(predicted) == 2 * len(files) == 12
    losses = [-np.log(predicted[str(file), "ab".index(file.parent.name)]) for file in files]
    assert np.mean(losses) == pytest.approx(rows[name].loss, rel=1e-5)
    predictor = Predictor.load(path)
    with TestClient(make_app(ServiceSettings(artefact=str(path), objective_ms=60_000, instances="all"))) as client:
        until = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.01)
        for file in files:
            answer = client.post(f"/predict?instance={name}&top=2", content=file.read_bytes()).json()
            for one in answer["classes"]:
                assert one["probability"] == pytest.approx(predicted[str(file), one["label"]], rel=1e-5)
            np.testing.assert_array_equal(np.float32(answer["logits"]), predictor.predict(file, instance=name)[0])
