"""A Ray cluster on this machine that outlives the commands that use it."""

import contextlib
import os
import pathlib
import secrets
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
_CODE = """
import ray, sys
found = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@contextlib.contextmanager
def cluster():
    """Starts a cluster; gives (process, environment for commands that are to use it)."""
    ours = {"XLA_FLAGS": "", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = os.environ | ours | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", _CODE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        yield process, environment | {"RAY_ADDRESS": process.stdout.readline().strip()}
    finally:
        process.communicate()


def processes(ancestor, title):
    """Lists the ids of the processes below `ancestor` whose title begins so."""
    found, parents = [], {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            number = int(path.name)
            parents[number] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if (path / "cmdline").read_text().startswith(title):
                found.append(number)
    return sorted(number for number in found if _is_below(number, ancestor, parents))


def _is_below(number, ancestor, parents):
    while number in parents and number != ancestor:
        number = parents[number]
    return number == ancestor
