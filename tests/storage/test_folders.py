"""Of folders, only files that this package wrote are removed or replaced."""

import fcntl
import json
import os

import pytest

from sdpoint_jax.storage import folders
from sdpoint_jax.storage.lock import FolderLock

LIST = "list.json"


def own_files(folder):
    try:
        listed = json.loads((folder / LIST).read_text())
    except (OSError, ValueError):
        return None
    return [*(name for name in folders.list_files(folder) if name in listed), LIST]


def write(path, **contents):
    with folders.replacing(path, own_files, "a box") as new:
        for name, content in contents.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(content)
        (new / LIST).write_text(json.dumps(list(contents)))


def contents_of(folder):
    return {name: (folder / name).read_text() for name in folders.list_files(folder) if name != LIST}


def test_files_of_others_stay_in_a_folder_that_is_replaced(tmp_path):
    box, theirs = tmp_path / "box", {"note": "dear", "sub/note": "dear", "own/deep/note": "dear"}
    write(box, **{"a": "1", "sub/b": "1", "gone/c": "1"})
    for name, content in theirs.items():
        (box / name).parent.mkdir(parents=True, exist_ok=True)
        (box / name).write_text(content)
    (box / "empty").mkdir()
    (box / "link").symlink_to(tmp_path)
    write(box, **{"a": "2", "own/d": "2"})
    assert (box / "empty").is_dir() and (box / "link").is_symlink()
    (box / "link").unlink()
    assert contents_of(box) == {"a": "2", "own/d": "2", **theirs} and os.listdir(tmp_path) == ["box"]


@pytest.mark.parametrize("name", ["d", "sub", "d/e/f"])
def test_a_file_of_others_in_the_way_is_named_and_nothing_changes(tmp_path, name):
    box = tmp_path / "box"
    write(box, a="1")
    (box / name).parent.mkdir(parents=True, exist_ok=True)
    (box / name).write_text("dear")
    with pytest.raises(ValueError, match=f"^{box / name}: was not written by this package"):
        write(box, **{"a": "2", "d" if name != "d/e/f" else "d/e": "2", "sub/b": "2"})
    assert contents_of(box) == {"a": "1", name: "dear"} and os.listdir(tmp_path) == ["box"]


@pytest.mark.parametrize("make", [lambda p: p.write_text("dear"), lambda p: (p.mkdir(), (p / "1.jpg").touch())])
def test_what_is_not_ours_is_refused(tmp_path, make):
    make(tmp_path / "photos")
    before = list(folders.list_files(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path}/photos: exists and is not a box, so it is left as it is"):
        write(tmp_path / "photos", a="1")
    assert list(folders.list_files(tmp_path)) == before


def test_neighbours_with_similar_names_are_left_alone(tmp_path):
    names = ("box.replaced", "box.writing", "box.writing-notes", ".box.tmp", ".box.0123456789abcdef.sdpoint_jax")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "note").write_text("dear")
    write(tmp_path / "box", a="1")
    write(tmp_path / "box", a="2")
    assert [contents_of(tmp_path / name) for name in names] == [{"note": "dear"}] * len(names)
    assert len(os.listdir(tmp_path)) == len(names) + 1


def test_a_folder_keeps_its_permissions(tmp_path):
    (tmp_path / "box").mkdir(mode=0o700)
    for _ in range(2):
        write(tmp_path / "box", a="1")
        assert (tmp_path / "box").stat().st_mode & 0o777 == 0o700


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "box")
    write(tmp_path / "link", a="1")
    write(tmp_path / "link", a="2")
    assert (tmp_path / "link").is_symlink() and contents_of(tmp_path / "disk" / "box") == {"a": "2"}


def test_the_temporary_folder_of_a_live_process_is_left_alone(tmp_path):
    alive, dead = (tmp_path / f".box.{digit * 16}.sdpoint_jax" for digit in "ab")
    for folder in (alive, dead):
        (folder / "new").mkdir(parents=True)
        (folder / "sdpoint_jax.lock").touch()
    with (alive / "sdpoint_jax.lock").open() as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        write(tmp_path / "box", a="1")
        assert (alive / "new").exists() and not dead.exists()


def test_a_temporary_folder_that_came_back_after_its_end_is_removed(tmp_path):
    (tmp_path / ".box.0123456789abcdef.sdpoint_jax" / "new.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    write(tmp_path / "box", a="1")
    assert os.listdir(tmp_path) == ["box"]


def test_a_kill_before_others_files_were_carried_over_loses_none(tmp_path):
    leftover = tmp_path / ".box.0123456789abcdef.sdpoint_jax"
    write(leftover / "old", a="1")
    (leftover / "old" / "note").write_text("dear")
    (leftover / "sdpoint_jax.lock").touch()
    write(tmp_path / "new box", a="2")
    (tmp_path / "new box").rename(tmp_path / "box")  # Both renames are done.
    folders.settle(tmp_path, own_files)
    assert contents_of(tmp_path / "box") == {"a": "2", "note": "dear"} and os.listdir(tmp_path) == ["box"]


def test_a_folder_is_removed_but_for_files_of_others(tmp_path):
    for name in ("mine", "shared"):
        write(tmp_path / name, **{"sub/a": "1"})
    (tmp_path / "shared" / "sub" / "note").write_text("dear")
    (tmp_path / "theirs").mkdir()
    for name in ("mine", "shared", "theirs", "missing"):
        folders.remove(tmp_path / name, own_files)
    assert sorted(os.listdir(tmp_path)) == ["shared", "theirs"]
    assert contents_of(tmp_path / "shared") == {"sub/note": "dear"}


def test_a_file_called_lock_that_is_not_ours_stays(tmp_path):
    for content in ("dear", "12 eggs", ""):
        (tmp_path / "lock").write_text(content)
        if content:
            with pytest.raises(ValueError, match=f"^{tmp_path}/lock: was not written by this package"):
                FolderLock(tmp_path, "workdir").__enter__()
            assert (tmp_path / "lock").read_text() == content
    for _ in range(2):
        with FolderLock(tmp_path, "workdir"):
            assert (tmp_path / "lock").read_text() == str(os.getpid())
