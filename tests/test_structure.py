"""The project's modules import each other in one direction."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "sdpoint_jax"

# A module and what it may import; data and models are packages.
IMPORTS = {
    "instance": set(),
    "data": set(),
    "files": set(),
    "checkpoint": {"files"},
    "program_cache": {"files"},
    "devices": {"program_cache"},
    "config": set(),
    "progress": {"devices"},
    "logs": {"files", "progress"},
    "interruption": set(),
    "memory": set(),
    "command": {"config", "memory"},
    "models": {"instance"},
    "cost": {"models", "instance"},
    "steps": {"instance", "devices"},
    "evaluation": {"instance", "devices", "steps"},
    "experiment": {"instance", "models", "data", "devices", "steps", "evaluation", "config"},
    "starting": {"files", "config", "checkpoint", "experiment", "steps"},
    "recipe": {"instance", "devices", "steps", "experiment"},
    "replay": {"devices", "recipe", "starting"},
    "training": {"config", "devices", "checkpoint", "interruption", "logs", "progress", "recipe", "starting", "steps"},
    "sweep": {"files", "instance", "cost", "devices", "experiment", "config", "checkpoint", "progress"},
    "predictor": {"instance", "models", "devices", "steps", "checkpoint"},
    "torch_import": {"models", "checkpoint", "config"},
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "sdpoint_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdpoint_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sdpoint_jax."))


def test_imports_go_one_way():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        seen.add(module)
        assert set(imports_of(path)) - {module} <= IMPORTS[module], path
    assert seen == set(IMPORTS)


def test_there_is_no_way_round():
    order = list(IMPORTS)
    for module, imported in IMPORTS.items():
        assert all(order.index(other) < order.index(module) for other in imported)
