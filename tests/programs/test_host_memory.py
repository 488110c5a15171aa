import os
import platform
import subprocess
import sys

import pytest

CHILD = """
import resource
from sdpoint_jax.programs.host_memory import keep_freed_memory

keep_freed_memory()

size = 100 << 20

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    len(b"1" * size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(pages(), pages())
"""
PAGES = (100 << 20) // os.sysconf("SC_PAGESIZE")


def pages_of_two_uses(**environment):
    """Pages that the kernel hands out for 100 MB, and again after it was freed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    command = [sys.executable, "-W", "error", "-c", CHILD]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told to keep memory")
def test_freed_memory_is_used_again():
    first, again = pages_of_two_uses(JAX_PLATFORMS="cpu")
    assert first > PAGES / 2 and again < PAGES / 100


@pytest.mark.parametrize("environment", [{"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "cpu", "MALLOC_TOP_PAD_": "1"}])
def test_malloc_stays_as_it_is_beside_an_accelerator_and_where_the_user_tuned_it(environment):
    first, again = pages_of_two_uses(**environment)
    assert first > PAGES / 2 and again > PAGES / 2
