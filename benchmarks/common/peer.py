"""Workloads of PyTorch, each in a process of its own, as its users run it: with its own threads and its own memory."""

import contextlib
import importlib.util
import multiprocessing
from collections.abc import Iterator, Sequence

from common.workload import Setting

from sdpoint_jax.instance import SDPointInstance


@contextlib.contextmanager
def start_peers(names: str, kind: str, setting: Setting) -> Iterator[dict[str, "Peer"]]:
    """Peers by name, of `eager,tuned`; none where PyTorch is missing or not asked for. They end with the context.

    Args:
        names: separated by commas; see `torch_reference`.
        kind: `Training` or `Inference`.
        setting: the net, the size of its images and the batch.
    """
    if not names or not importlib.util.find_spec("torch"):
        yield {}
        return
    peers = {name: Peer(kind, setting, name == "tuned") for name in names.split(",")}
    try:
        yield peers
    finally:
        for peer in peers.values():
            peer.close()


class Peer:
    """Stands for a workload of `torch_reference` in another process."""

    def __init__(self, kind: str, setting: Setting, tuned: bool):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, setting, tuned), daemon=True)
        self._process.start()
        theirs.close()

    def seconds_per_step(self, instances: Sequence[SDPointInstance], clock: str = "wall") -> float:
        """Measures as `workload.Workload.seconds_per_step`; EOFError if the process has died."""
        self._connection.send((instances, clock))
        return self._connection.recv()

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection, kind, setting, tuned):
    from common import torch_reference

    torch_reference.prepare(tuned)
    workload = getattr(torch_reference, kind)(setting, tuned)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(workload.seconds_per_step(*connection.recv()))
