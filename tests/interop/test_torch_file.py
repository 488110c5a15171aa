"""PyTorch's files are read as plain data, and claim no more memory than the tensors that are used."""

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from sdpoint_jax.interop import torch_file

torch = pytest.importorskip("torch")


def saved(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_are_read_as_pytorch_reads_them(tmp_path, zipped):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    content = {
        **{str(dtype): base.mul(9).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64)},
        **{str(dtype): base.mul(9).to(dtype) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)},
        "bool": base > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "a view": base[1:5:2, 3:],
        "the same storage": base,
        "parameter": torch.nn.Parameter(base),
        "text": "x",
        "nested": [1, {"a": (2.5, None)}],
    }
    found = torch_file.load(saved(content, tmp_path / "x.pt", zipped))
    for name, expected in content.items():
        if isinstance(expected, torch.Tensor):
            assert found[name].shape == tuple(expected.shape)
            expected = expected.detach()
            if expected.dtype == torch.bfloat16:
                assert found[name].dtype.name == "bfloat16"
                np.testing.assert_array_equal(np.asarray(found[name], np.float32), expected.float().numpy())
            else:
                np.testing.assert_array_equal(np.asarray(found[name]), expected.numpy(), strict=True)
    assert found["text"] == "x" and found["nested"] == [1, {"a": (2.5, None)}]


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
def test_what_else_a_checkpoint_holds_is_in_nobodys_way(tmp_path):
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "a.b": torch.ones(2),
        "a.q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        "a.s": torch.eye(2).to_sparse(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5).state_dict(),
        "random": (np.random.default_rng(0), np.random.get_state(), torch.get_rng_state()),
        "kinds": (torch.float32, torch.device("cpu"), torch.Size([2]), {1, 2}, 1j, b"x", np.float32(2), np.ones(2)),
        "times": (datetime.timedelta(1), collections.deque([1]), collections.Counter("ab"), pathlib.Path("x")),
        "factory": collections.defaultdict(list, {"a": [1]}),
        "options": argparse.Namespace(inner=argparse.Namespace(x=1)),
    }
    found = torch_file.load(saved(content, tmp_path / "x.pt"))
    assert found.keys() == content.keys() and np.asarray(found["a.b"]).tolist() == [1, 1]
    assert isinstance(found["a.q"], torch_file.Unknown) and isinstance(found["a.s"], torch_file.Unknown)
    assert found["options"].origin == "argparse.Namespace" and found["factory"] == {"a": [1]}


def test_a_whole_module_gives_its_state_dict(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(torch.nn.BatchNorm2d(4)))
    found = torch_file.state_dict_of(torch_file.load(saved(net, tmp_path / "x.pt")))
    assert found.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(np.asarray(found[name]), tensor.numpy())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_is_cut_or_altered_is_damaged(tmp_path, zipped):
    content = saved({"a.b": torch.arange(1000.0)}, tmp_path / "x.pt", zipped).read_bytes()
    for end in (len(content) - 1, len(content) - 3000, len(content) // 3, 60, 1):
        (tmp_path / "cut.pt").write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"^{tmp_path}/cut.pt: damaged"):
            torch_file.load(tmp_path / "cut.pt")
    if zipped:  # Which has checksums.
        place = content.index(np.float32(500).tobytes())
        (tmp_path / "altered.pt").write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with pytest.raises(ValueError, match=f"^{tmp_path}/altered.pt: damaged: Bad CRC-32"):
            np.asarray(torch_file.load(tmp_path / "altered.pt")["a.b"])


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def test_no_function_of_the_file_is_called(tmp_path):
    content = {"a.b": torch.ones(3), "evil": Call(exec, f"open({str(tmp_path / 'ran')!r}, 'w')"), "print": print}
    found = torch_file.load(saved(content, tmp_path / "x.pt"))
    assert not (tmp_path / "ran").exists()
    assert (found["evil"].origin, found["evil"]) == ("__builtin__.exec", {}) and np.asarray(found["a.b"]).sum() == 3


def archive(path, pickled, compress=zipfile.ZIP_STORED, storage=b"\0" * 64, **more):
    with zipfile.ZipFile(path, "w", compress) as file:
        for name, content in {"data.pkl": pickled, "data/0": storage, "byteorder": b"little", **more}.items():
            file.writestr(f"x/{name}", content)
    return path


class Storage:
    """Pickled as a reference to the storage 0."""

    def __init__(self, size):
        self.size = size


def tensor_pickle(size, offset, shape, strides):
    """A pickle of {"a.b": a tensor} that any numbers may be in."""
    text = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", value.size) if isinstance(value, Storage) else None

    tensor = Call(torch._utils._rebuild_tensor_v2, Storage(size), offset, shape, strides, False, {})
    Pickler(text, 2).dump({"a.b": tensor})
    return text.getvalue()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "size, offset, shape, strides",
    [
        (16, 0, (1 << 30,), (0,)),
        (16, 0, (4, 5), (4, 1)),
        (16, 13, (4,), (1,)),
        (16, 0, (4,), (6,)),
        (16, -4, (4,), (1,)),
        (16, 0, (4,), (-1,)),
        (16, 0, (2.0,), (1,)),
        (16, 0, (2, 2), (1,)),
        (16, 0, (1,) * 70, (1,) * 70),
        (17, 0, (4,), (1,)),
        (1 << 40, 0, (1 << 40,), (1,)),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, size, offset, shape, strides):
    path = archive(tmp_path / "x.pt", tensor_pickle(size, offset, shape, strides))
    with pytest.raises(ValueError, match=f"^{path}: damaged"):
        torch_file.load(path)
    whole = archive(
        tmp_path / "y.pt", tensor_pickle(16, 3, (2, 3), (6, 1)), storage=np.arange(16.0, dtype="f4").tobytes()
    )
    assert np.asarray(torch_file.load(whole)["a.b"]).tolist() == [[3, 4, 5], [9, 10, 11]]


BOMBS = {
    "memo": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 34) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 34) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 34) + b".",
    "depth": b"\x80\x02" + b"(" * 100_000 + b"N" + b"t" * 100_000 + b".",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_pickle_cannot_claim_memory(tmp_path, bomb, kind):
    if kind == "zip":
        archive(tmp_path / "x.pt", BOMBS[bomb])
    else:
        (tmp_path / "x.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + BOMBS[bomb])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        torch_file.load(tmp_path / "x.pt")
    except ValueError as error:
        assert "damaged" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB.


def test_a_compressed_archive_and_a_program_are_refused(tmp_path):
    pickled = tensor_pickle(16, 0, (4,), (1,))
    with pytest.raises(ValueError, match="compressed"):
        torch_file.load(archive(tmp_path / "x.pt", pickled, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="a TorchScript program; save its state_dict"):
        torch_file.load(archive(tmp_path / "x.pt", pickled, **{"constants.pkl": b""}))


def test_pytorch_is_not_needed(tmp_path):
    saved({"a.b": torch.arange(3.0)}, tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['torch'] = None; import numpy as np; from sdpoint_jax.interop import torch_file; "
        f"print(np.asarray(torch_file.load({str(tmp_path / 'x.pt')!r})['a.b']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[0. 1. 2.]"
