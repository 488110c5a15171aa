"""What the hosts of a run tell each other before they compute: that they are about to do the same."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")

_SHOWN = 3  # Keys of an error, and
_WIDTH = 120  # characters of a value.


class HostError(ValueError):
    """An error that every host raises at the same moment: none has to wait for a host that has ended."""

    on_all_hosts = True


def together(function: Callable[[], Result]) -> Result:
    """Call `function` on every host and return its result.

    Without it, a host that fails would end alone, and the others would wait for it until the heartbeat times out.

    Raises:
        HostError: on every host, if it raises ValueError or OSError on one.
    """
    if jax.process_count() == 1:
        return function()
    result, failure = None, ""
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = str(error)
    hosts: dict[str, list[int]] = {}
    for host, text in enumerate(_gather(failure)):
        hosts.setdefault(text, []).append(host)
    if set(hosts) != {""}:
        raise HostError(
            "; ".join(text if len(hosts) == 1 else f"{_name(hosts[text])}: {text}" for text in hosts if text)
        )
    return result  # type: ignore[return-value]


def check_same(describe: Callable[[], Mapping[str, Any]]) -> None:
    """Compare what decides the result on every host, if there are several.

    Args:
        describe: returns values that JSON can hold, by what they are called in an error.

    Raises:
        HostError: on every host, if any two of them have different facts; names these, and who has which.
    """
    if jax.process_count() == 1:
        return
    found = _gather(describe())
    if wrong := list_differences(found):
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise HostError(f"the hosts must be given the same, and differ in {'; '.join(wrong[:_SHOWN])}{more}")


def list_differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """List where hosts differ, given the facts of each: `learning_rate: 0.1 (hosts 0, 1), 0.2 (host 2)`."""
    wrong = []
    for key in dict.fromkeys(key for of_host in facts for key in of_host):
        hosts: dict[str, list[int]] = {}
        for host, of_host in enumerate(facts):
            text = json.dumps(of_host[key]).strip('"') if key in of_host else "none"
            hosts.setdefault(text, []).append(host)
        if len(hosts) > 1:
            values = ", ".join(f"{_shorten(text)} ({_name(some)})" for text, some in hosts.items())
            wrong.append(f"{key}: {values}")
    return wrong


def _gather(value):
    """Return the value of every host, in their order; each must be what JSON can hold."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # Arrays that are gathered must have the same shape everywhere.
    sizes = multihost_utils.process_allgather(np.int32(len(data))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _name(hosts):
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(map(str, hosts))}"


def _shorten(text):
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."
