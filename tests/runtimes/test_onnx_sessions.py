"""Sessions of onnxruntime give the net's logits, each opened once; where they would not, an error says why."""

import importlib.util
import threading
from types import SimpleNamespace

import pytest
from interop import nets

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.runtimes.onnx_sessions import OnnxSessions, check_onnxruntime

CPU = SimpleNamespace(platform="cpu")
CHEAP = SDPointInstance(2, 0.75)


@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_preresnet", "tiny_resnext"])
def test_sessions_give_the_nets_logits_for_batches_of_any_size(monkeypatch, name):
    pytest.importorskip("onnxruntime")
    nets.register(monkeypatch)
    swept = nets.artefact_of(name)
    sessions = OnnxSessions(swept)
    for count, instance in enumerate((FULL_RESOLUTION, CHEAP, SDPointInstance(3, 0.5), FULL_RESOLUTION), 1):
        images = nets.images_of(swept, count)
        assert nets.deviation(sessions[instance](images), nets.logits_of(swept, images, instance)) <= 1e-5
    assert len(sessions) == 3 and set(sessions) == {FULL_RESOLUTION, CHEAP, SDPointInstance(3, 0.5)}


def test_a_session_is_opened_once_by_any_number_of_threads(monkeypatch):
    pytest.importorskip("onnxruntime")
    nets.register(monkeypatch)
    sessions = OnnxSessions(nets.artefact_of("tiny_wrn"))
    opened, found, open_one = [], [], sessions._open
    monkeypatch.setattr(sessions, "_open", lambda instance: opened.append(instance) or open_one(instance))
    threads = [threading.Thread(target=lambda: found.append(sessions[CHEAP])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [CHEAP] and CHEAP in sessions and len(set(map(id, found))) == 1


@pytest.fixture
def installed(monkeypatch):
    """The libraries that seem to be installed; a test may take some away."""
    names = {"onnx", "onnxruntime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
    return names


@pytest.mark.parametrize(
    "dtype, devices, message",
    [
        ("bfloat16", [CPU], "runtime onnxruntime: computes in float32, but the net in bfloat16; valid is xla"),
        ("float32", [SimpleNamespace(platform="gpu")], "runtime onnxruntime: runs on one CPU, not on .*gpu.*valid is"),
        ("float32", [CPU, CPU], "runtime onnxruntime: runs on one CPU, not on "),
    ],
)
def test_where_it_would_compute_something_else_or_elsewhere_it_is_refused(installed, dtype, devices, message):
    with pytest.raises(ValueError, match=message):
        check_onnxruntime(dtype, devices)
    check_onnxruntime("float32", [CPU])


def test_a_missing_library_names_the_extra(installed):
    installed.remove("onnxruntime")
    with pytest.raises(ImportError, match=r"runtime onnxruntime: needs onnxruntime, pip install 'sdpoint_jax\[onnx\]'"):
        check_onnxruntime("float32", [CPU])
