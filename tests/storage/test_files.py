"""Files are whole, however many write them, and however that ends."""

import concurrent.futures
import os
import threading

import pytest

from sdpoint_jax.storage import files


def test_two_that_write_one_file_at_once_do_not_meet(tmp_path, monkeypatch):
    both_have_written, contents = threading.Barrier(2, timeout=10), [b"a" * 1000, b"b" * 2000]
    monkeypatch.setattr(os, "fsync", lambda _: both_have_written.wait())
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        writing = [threads.submit(files.write_atomically, tmp_path / "program", content) for content in contents]
        for written in writing:
            written.result()
    assert (tmp_path / "program").read_bytes() in contents
    assert list(tmp_path.iterdir()) == [tmp_path / "program"]


def test_a_file_that_cannot_be_written_is_named_and_unchanged(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    files.write_atomically(tmp_path / "table", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"^{tmp_path}/table: could not be written: No space left on device"):
        files.write_atomically(tmp_path / "table", "new")
    assert (tmp_path / "table").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "table"]
