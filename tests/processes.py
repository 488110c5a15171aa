"""Starts a command in several processes, as on the hosts of a pod."""

import os
import pathlib
import socket
import subprocess

ROOT = pathlib.Path(__file__).parents[1]


def xla_flags(devices):
    """The flags of the tests' own process, but for so many devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def start(command, processes, devices):
    """Starts `command(index)` in so many processes of so many devices each, which find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices)}
    started = []
    for index in range(processes):
        flags = [f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={index}"]
        arguments = [*command(index), *(flags if processes > 1 else ())]
        started.append(
            subprocess.Popen(
                arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    return started


def finish(started, code=0):
    """Waits for all processes, which must exit with `code`; returns what they printed."""
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [code] * len(started), "\n".join(outputs)
    return outputs
