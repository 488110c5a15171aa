"""The devices that programs are made for: those at hand to run on, or any others, to see what becomes of a program.

Whatever chooses by platform, in models and in programs, asks here and not the backend at hand.
"""

import contextlib
import dataclasses

import jax

ANY = "any"  # A platform: programs that are lowered for several at once choose as they are lowered.
_PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}  # What a device calls its platform, as the name of the backend.


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that programs are made for and do not run on, as a rule because they are not here.

    Attributes:
        platform: cpu, gpu (NVIDIA's), tpu, onnx, whose traces become graphs (`programs.onnx_graph`), or `ANY`.
        devices: of that platform, as `jax.experimental.topologies` describes them: programs are compiled for them all.
            With none, programs are exported: traced and lowered for one device of the platform, not compiled.
    """

    platform: str
    devices: tuple[jax.Device, ...] = ()

    @classmethod
    def of(cls, devices: tuple[jax.Device, ...]) -> "Target":
        """Makes the target of these devices, at least one."""
        return cls(_PLATFORMS.get(devices[0].platform, devices[0].platform), tuple(devices))


# JAX's caches of traces tell contexts apart, so that no trace for one platform serves another.
_target = jax.make_user_context(default_value=None)


def current() -> Target | None:
    """Returns the target of this thread; None for the devices at hand."""
    return _target.value


def platform() -> str:
    """Return the platform that this thread builds programs for: cpu, gpu, tpu, or `ANY` in an export."""
    target = current()
    return target.platform if target else jax.default_backend()


def programs_for(target: Target | None) -> contextlib.AbstractContextManager[None]:
    """Makes the programs built in this context, by this thread, ones for `target`; None for the devices at hand."""
    return _target(target)
