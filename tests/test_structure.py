"""The rooms of the package import each other in one direction, and each keeps to what it is for."""

import ast
import configparser
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "sdpoint_jax"

# A room, a module or a folder of the package, and exactly the rooms that it imports; the lowest first.
IMPORTS = {
    "instance": set(),
    "config": set(),
    "progress": set(),
    "paths": set(),
    "data": {"paths"},
    "choice": {"instance"},
    "storage": {"choice", "config", "instance", "paths"},
    "models": {"instance"},
    "programs": {"instance", "models", "storage"},
    "profiling": {"choice", "instance", "models", "progress", "storage"},
    "experiment": {"config", "data", "instance", "models"},
    "evaluation": {
        "choice",
        "config",
        "experiment",
        "instance",
        "models",
        "profiling",
        "programs",
        "progress",
        "storage",
    },
    "training": {"config", "data", "experiment", "instance", "models", "profiling", "programs", "progress", "storage"},
    "interop": {"instance", "models", "programs", "storage"},
    "runtimes": {"instance", "interop", "storage"},
    "serving": {"choice", "data", "instance", "models", "paths", "profiling", "programs", "runtimes", "storage"},
    "cli": {
        "choice",
        "config",
        "data",
        "evaluation",
        "experiment",
        "instance",
        "interop",
        "models",
        "paths",
        "profiling",
        "programs",
        "progress",
        "serving",
        "storage",
        "training",
    },
}
FLOORS = 8  # train.py and evaluate.py stand on top of them.


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


def test_setup_installs_every_room():
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    folders = {path.parent.relative_to(PACKAGE.parent).as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert set(setup["options"]["packages"].split()) == folders | {"sdpoint_jax.configs"}


def test_there_is_one_version(capsys):
    import importlib.metadata

    import sdpoint_jax
    from sdpoint_jax.cli import main

    assert importlib.metadata.version("sdpoint_jax") == sdpoint_jax.__version__
    assert f"\nversion: {sdpoint_jax.__version__}\n" in (PACKAGE.parent / "CITATION.cff").read_text()
    for arguments, command in ((["--version"], None), (["--version"], "train")):
        with pytest.raises(SystemExit, match="^0$|^None$"):
            main.main(arguments, command=command)
        shown = capsys.readouterr().out
        assert shown.startswith(f"sdpoint_jax {sdpoint_jax.__version__} (jax {importlib.metadata.version('jax')}, ")


def test_no_room_imports_one_above_it():
    floors = {}
    for room, imported in IMPORTS.items():
        floors[room] = 1 + max((floors[other] for other in imported), default=0)  # KeyError: it stands further down.
    assert max(floors.values()) == FLOORS


def test_pmap_is_in_one_file():
    users = [path for path in PACKAGE.rglob("*.py") if "pmap" in path.read_text()]
    assert [path.relative_to(PACKAGE).as_posix() for path in users] == ["programs/devices.py"]


@pytest.mark.parametrize("room", ["serving", "interop", "runtimes", "profiling"])
def test_what_serves_needs_no_optimizer(room):
    assert not any(name.startswith("optax") for path in files_of(room) for name in imports_of(path))


def test_what_decides_needs_no_jax():
    names = [f"sdpoint_jax.choice.{path.stem}" for path in files_of("choice")]
    modules = ", ".join(["sdpoint_jax.serving.controller", *names])
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_commands_have_a_main():
    mains = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "def main(" in path.read_text()}
    assert mains == {"cli/main.py"}


def test_the_front_door_is_light():
    code = "import sys, sdpoint_jax; sys.exit(any(name.split('.')[0] in ('jax', 'numpy') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_front_door_has_what_it_lists():
    import sdpoint_jax

    assert {"Predictor", "SDPointInstance", "create_model", "count_cost", "load_checkpoint"} < set(sdpoint_jax.__all__)
    assert all(getattr(sdpoint_jax, name) is not None and name in dir(sdpoint_jax) for name in sdpoint_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Predicter'; it has .*Predictor"):
        sdpoint_jax.Predicter  # noqa: B018


def public_functions(path):
    """The public functions and methods of a file, those inside functions left out."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*tree.body, *(inner for found in classes for inner in found.body)]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_functions_are_typed_and_have_a_docstring(path):
    for function in public_functions(path):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        untyped = [arg.arg for arg in every if arg and arg.annotation is None and arg.arg not in ("self", "cls")]
        assert not untyped and function.returns is not None, f"{function.name} {untyped}"
        assert ast.get_docstring(function), function.name
