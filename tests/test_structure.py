"""The rooms of the package import each other in one direction, and each keeps to what it is for."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "sdpoint_jax"

# A room, a module or a folder of the package, and exactly the rooms that it imports; the lowest first.
IMPORTS = {
    "instance": set(),
    "config": set(),
    "progress": set(),
    "data": set(),
    "storage": {"instance"},
    "models": {"instance", "storage"},
    "programs": {"instance", "storage", "training"},
    "profiling": {"instance", "models"},
    "experiment": {"config", "data", "instance", "models", "programs", "training"},
    "evaluation": {"config", "experiment", "instance", "profiling", "programs", "progress", "storage"},
    "training": {"config", "experiment", "instance", "programs", "progress", "storage"},
    "serving": {"instance", "models", "programs", "storage", "training"},
    "cli": {"config", "programs"},
}


def files_of(room):
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def imports_of(path):
    """The modules that a file imports, at its top or inside its functions, with their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rooms_imported_by(room):
    parts = (name.split(".") for path in files_of(room) for name in imports_of(path))
    return {names[1] for names in parts if names[0] == "sdpoint_jax" and len(names) > 1} - {room}


@pytest.mark.parametrize("room", IMPORTS)
def test_a_room_imports_just_these(room):
    assert rooms_imported_by(room) == IMPORTS[room]


def test_every_room_is_in_the_table():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__", "__main__"} == set(IMPORTS)
