"""Kinds of devices, and how long an amount of work takes on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import torch
import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from onecomp.errors import InputError
from onecomp.planning.amounts import Amount
from onecomp.planning.operations import Work

GIB = 2**30
CPU = "CPU"
EVALUATION_BYTES = 64
"""Memory traffic of one weight on one candidate grid, largely within caches."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Efficiency(_Entry):
    """Part of the promised rates that the engine's code reaches."""

    bf16: PositiveFloat
    fp32: PositiveFloat
    factor: PositiveFloat
    memory: PositiveFloat


class Device(_Entry):
    """One kind of device, as a datasheet has it; units as in ``gpus.yaml``."""

    memory_gib: PositiveFloat | None
    bf16_tflops: PositiveFloat
    fp32_tflops: PositiveFloat
    tf32_tflops: PositiveFloat | None = None
    memory_gb_s: PositiveFloat
    link_gb_s: PositiveFloat
    host_gb_s: PositiveFloat
    kernel_us: PositiveFloat
    efficiency: Efficiency | None = None
    source: str


class Surroundings(_Entry):
    """What connects devices, where nothing else is said."""

    network_gbit: PositiveFloat
    gpus_per_node: PositiveInt
    storage_gb_s: PositiveFloat


class HardwareTable(_Entry):
    """All kinds of devices."""

    efficiency: Efficiency
    defaults: Surroundings
    devices: dict[str, Device]

    def __or__(self, other: "HardwareAddition") -> "HardwareTable":
        return HardwareTable(
            efficiency=other.efficiency or self.efficiency,
            defaults=other.defaults or self.defaults,
            devices=self.devices | other.devices,
        )


class HardwareAddition(_Entry):
    """What a user's file may hold."""

    efficiency: Efficiency | None = None
    defaults: Surroundings | None = None
    devices: dict[str, Device] = {}


@dataclass(frozen=True)
class Hardware:
    """One kind of device at the rates that are counted on, with what connects it."""

    name: str
    source: str
    is_gpu: bool
    memory_bytes: Amount | None
    """None where the machine decides."""
    model_rates: Mapping[int, Amount]
    """Operations per second of forward passes, by bytes of the dtype."""
    float32_rate: Amount
    factor_rate: Amount
    memory_rate: Amount
    """Bytes per second."""
    kernel_s: Amount
    link_rate: Amount
    """Bytes per second from device to device within a node."""
    network_rate: Amount
    """Bytes per second between nodes."""
    gpus_per_node: int
    storage_rate: Amount
    corrections: Mapping[str, Amount] = field(default_factory=dict)
    """Seconds measured for each second expected, by phase: what a probe found."""

    @property
    def device_type(self) -> str:
        """As torch calls it."""
        return "cuda" if self.is_gpu else "cpu"

    def share(self, part: Amount) -> "Hardware":
        """A part of a device that several workers have."""
        return replace(
            self,
            memory_bytes=None if self.memory_bytes is None else part * self.memory_bytes,
            model_rates={size: part * rate for size, rate in self.model_rates.items()},
            float32_rate=part * self.float32_rate,
            factor_rate=part * self.factor_rate,
            memory_rate=part * self.memory_rate,
        )

    def expected_s(self, work: Work, dtype_bytes: int) -> Amount:
        """Seconds that the rates give for an amount of work."""
        return (
            work.model_operations / self.model_rates[dtype_bytes]
            + work.float32_operations / self.float32_rate
            + work.factor_operations / self.factor_rate
            + (work.memory_bytes + EVALUATION_BYTES * work.evaluations) / self.memory_rate
            + work.kernels * self.kernel_s
            + (work.read_bytes + work.written_bytes) / self.storage_rate
        )

    def seconds(self, phase: str, work: Work, dtype_bytes: int) -> Amount:
        """Seconds of a phase, corrected by what was measured."""
        return self.expected_s(work, dtype_bytes) * self.corrections.get(phase, 1.0)

    def transfer_s(self, num_bytes: Amount, num_workers: int) -> Amount:
        """Seconds to send bytes from one worker to another."""
        rate = self.link_rate if num_workers <= self.gpus_per_node else self.network_rate
        return num_bytes / min(rate, self.link_rate)


def load_table(addition: Path | None = None) -> HardwareTable:
    """The built-in kinds of devices, with those of a file of the user's.

    Raises:
        InputError: The file cannot be read, or an entry is not as it must be.
    """
    text = resources.files(__package__).joinpath("gpus.yaml").read_text(encoding="utf-8")
    table = HardwareTable.model_validate(yaml.safe_load(text))
    if addition is None:
        return table
    try:
        content = yaml.safe_load(addition.read_text(encoding="utf-8"))
        return table | HardwareAddition.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(addition, f"cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            addition, f"{place or 'its content'}: {first['msg']}. See docs/plan.md for the form."
        ) from error


def find_hardware(name: str, table: HardwareTable, network_gbit: Amount | None = None) -> Hardware:
    """One kind of device from the table.

    Args:
        name: Upper or lower case.
        table: The known kinds.
        network_gbit: Network between nodes; None for the table's.

    Raises:
        InputError: No such kind.
    """
    known = {key.upper(): key for key in table.devices}
    if name.upper() not in known:
        raise InputError(
            name,
            f"is not a known kind of GPU. Known: {', '.join(table.devices)}. "
            "Describe others in a file and give it with --hardware.",
        )
    key = known[name.upper()]
    device, near = table.devices[key], table.defaults
    share = device.efficiency or table.efficiency
    is_gpu = key != CPU
    bf16, fp32 = 1e12 * device.bf16_tflops * share.bf16, 1e12 * device.fp32_tflops * share.fp32
    return Hardware(
        name=key,
        source=device.source,
        is_gpu=is_gpu,
        memory_bytes=None if device.memory_gib is None else device.memory_gib * GIB,
        model_rates={2: bf16, 4: fp32 if is_gpu else bf16},
        float32_rate=fp32,
        factor_rate=1e12 * device.fp32_tflops * share.factor,
        memory_rate=1e9 * device.memory_gb_s * share.memory,
        kernel_s=1e-6 * device.kernel_us,
        link_rate=1e9 * min(device.link_gb_s, device.host_gb_s),
        network_rate=1e9 / 8 * (network_gbit or near.network_gbit),
        gpus_per_node=near.gpus_per_node,
        storage_rate=1e9 * near.storage_gb_s,
    )


def hardware_here(table: HardwareTable) -> str:
    """The kind of device that this machine has."""
    if not torch.cuda.is_available():
        return CPU
    memory = torch.cuda.get_device_properties(0).total_memory
    return closest_kind(torch.cuda.get_device_name(), memory, table)


def closest_kind(name: str, memory_bytes: Amount, table: HardwareTable) -> str:
    """The kind of GPU with this name, else the one whose memory is closest.

    Args:
        name: As the driver calls it, e.g. ``NVIDIA A100-SXM4-80GB``.
        memory_bytes: Of the GPU.
        table: The known kinds.
    """
    gpus = {kind: device.memory_gib * GIB for kind, device in table.devices.items() if kind != CPU}
    named = [kind for kind in gpus if all(p in name.upper() for p in kind.upper().split("-"))]
    return min(named or gpus, key=lambda kind: abs(gpus[kind] - memory_bytes))
