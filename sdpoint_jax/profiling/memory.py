"""How much memory a compiled program needs, as its compiler planned it."""

from typing import Any


def planned_memory(program: Any) -> int | None:
    """Returns the bytes of device memory that one call of a program needs: arguments, outputs and temporaries.

    The arguments include the parameters, which all programs of a net share.

    Args:
        program: a `jax.stages.Compiled`.

    Returns:
        bytes; None for a program of another kind, or a backend that does not plan memory.
    """
    try:
        plan = program.memory_analysis()
    except (AttributeError, NotImplementedError):
        return None
    if plan is None:
        return None
    parts = (plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes)
    return sum(parts) - plan.alias_size_in_bytes
