"""The table of a sweep: what each SDPoint instance costs, how accurate it is, and how fast on which device. No JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdpoint_jax.instance import SDPointInstance

Setting = tuple[str, str, str, int]  # Device, runtime, dtype, batch size.


@dataclasses.dataclass(frozen=True)
class Latency:
    """How fast one instance runs on one device, at one batch size.

    Attributes:
        device: its platform and kind, and its number of threads where it is a CPU, as
            `cpu: AMD EPYC 7763, 2 threads`.
        runtime: what runs the program: `xla` or `onnxruntime`.
        dtype: of the computation: `float32` or `bfloat16`.
        batch_size: images of one call.
        p50_ms: median time of one call, from uint8 images to logits, both in the host's memory, in milliseconds.
        p95_ms: time that 95 of 100 calls do not exceed, in milliseconds.
        repeats: measured calls.
        peak_memory_bytes: planned for the compiled program, its arguments included; None where it is not known.
        compile_seconds: time to compile the program; None where a cache had it.
        versions: of the libraries, by name.
    """

    device: str
    runtime: str
    dtype: str
    batch_size: int
    p50_ms: float
    p95_ms: float
    repeats: int
    peak_memory_bytes: int | None
    compile_seconds: float | None
    versions: Mapping[str, str]

    @property
    def images_per_second(self) -> float:
        """Images over the median time of a call."""
        return 1000 * self.batch_size / self.p50_ms

    @property
    def setting(self) -> Setting:
        """Names what is measured once: a later measurement of the same replaces this one."""
        return self.device, self.runtime, self.dtype, self.batch_size


@dataclasses.dataclass(frozen=True)
class InstanceRow:
    """One row of the table.

    Attributes:
        instance: the instance.
        macs: multiply-accumulates for one image.
        params: trainable parameters, the same for every instance.
        top1: share of the evaluated images that are classified correctly, in 0..1.
        top5: likewise, among the five most likely classes; None for less than six classes.
        loss: mean cross-entropy.
        n: evaluated images.
        reestimated_from: the images that the BatchNorm statistics come from, in words.
        reestimate_images: how many of them.
        latencies: one for each setting that was measured; see `Latency.setting`.
    """

    instance: SDPointInstance
    macs: int
    params: int
    top1: float
    top5: float | None
    loss: float
    n: int
    reestimated_from: str
    reestimate_images: int
    latencies: tuple[Latency, ...] = ()

    @property
    def name(self) -> str:
        """Names the instance, as `p05_r0.75`."""
        return self.instance.name

    @property
    def top1_standard_error(self) -> float:
        """Returns that of `top1`, as the share of `n` independent images."""
        return (self.top1 * (1 - self.top1) / self.n) ** 0.5

    def latency(self, setting: Setting) -> Latency | None:
        """Returns what was measured in `setting`; None where nothing was."""
        return next((latency for latency in self.latencies if latency.setting == setting), None)

    def with_latency(self, latency: Latency) -> "InstanceRow":
        """Adds a measurement, in place of an earlier one of the same setting.

        Compiling is measured when a program is compiled for the first time: later, a cache has it, and the seconds of
        the earlier measurement stay, unless the versions of the libraries are others.
        """
        earlier = self.latency(latency.setting)
        if earlier and latency.compile_seconds is None and latency.versions == earlier.versions:
            latency = dataclasses.replace(latency, compile_seconds=earlier.compile_seconds)
        kept = [other for other in self.latencies if other.setting != latency.setting]
        return dataclasses.replace(self, latencies=(*kept, latency))

    def to_record(self) -> dict[str, Any]:
        """Returns the row as JSON holds it: point and ratio beside the name, latencies only if there are any."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        latencies = [dataclasses.asdict(latency) for latency in fields.pop("latencies")]
        instance = fields.pop("instance")
        where = {"instance": instance.name, "point": instance.point, "ratio": instance.ratio}
        return where | fields | ({"latencies": latencies} if latencies else {})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "InstanceRow":
        """Returns the inverse of `to_record`.

        Raises:
            ValueError: the record is not that of a row; names what is missing or wrong.
        """
        try:
            fields = {key: value for key, value in record.items() if key not in ("point", "ratio")}
            fields["instance"] = SDPointInstance.from_name(fields["instance"])
            fields["latencies"] = tuple(Latency(**latency) for latency in fields.get("latencies", ()))
            return cls(**fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a row of a sweep's table: {error}") from None
