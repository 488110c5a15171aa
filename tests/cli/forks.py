"""Runs many commands in processes of their own, which a process forks that has imported everything already.

python tests/cli/forks.py CASES RESULTS: reads a JSON list of [command, *arguments], where a command is a script or one
of the package's, and writes a JSON list of {"code", "out", "error"}. No JAX backend starts before a fork.
"""

import json
import os
import pathlib
import runpy
import signal
import sys
import tempfile
import traceback
import warnings

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 30  # Seconds for a command.


def run(command, arguments):
    """Runs one; see above."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        child = os.fork()
        if not child:
            _become(command, arguments, out.fileno(), error.fileno())
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode())
    return {"code": os.waitstatus_to_exitcode(status), "out": texts[0], "error": texts[1]}


def _become(command, arguments, out, error):
    os.dup2(out, 1)
    os.dup2(error, 2)
    signal.alarm(TIMEOUT)
    sys.argv = ["sdpoint_jax", command, *arguments]
    code = 1
    try:
        if command.endswith(".py"):
            sys.argv = [command, *arguments]
            runpy.run_path(str(ROOT / command), run_name="__main__")
        else:
            runpy.run_module("sdpoint_jax", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(cases, results):
    import importlib

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for module in ("cli.main", "training.loop", "training.replay", "evaluation.sweep", "serving.predictor"):
        importlib.import_module(f"sdpoint_jax.{module}")
    importlib.import_module("sdpoint_jax.interop.torch_import")
    warnings.filterwarnings("ignore", message="os.fork")  # No thread of JAX runs yet.
    found = [run(command, arguments) for command, *arguments in json.loads(pathlib.Path(cases).read_text())]
    pathlib.Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
