"""From what a user asks for to an estimate."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from onecomp.calibration import CalibrationSamples
from onecomp.errors import ConfigError
from onecomp.job import QuantizationJob
from onecomp.models.skeleton import Skeleton
from onecomp.models.source import ModelSource
from onecomp.planning.amounts import Amount
from onecomp.planning.costs import UnitCosts
from onecomp.planning.estimate import Estimate, Settings
from onecomp.planning.hardware import (
    CPU,
    Hardware,
    HardwareTable,
    find_hardware,
    hardware_here,
    load_table,
)
from onecomp.planning.methods import method_shape
from onecomp.planning.model import PlannedModel
from onecomp.planning.probe import Measured, probe, require_short
from onecomp.planning.shapes import TextShape
from onecomp.planning.survey import settled
from onecomp.qep import QEPConfig
from onecomp.quantizer import Quantizer

MOST_LOCAL_WORKERS = 16


@dataclass(frozen=True)
class Place:
    """Where a run is planned to be."""

    num_workers: int | None
    """As of the command line: 0 for this process, None for one worker on a GPU, else this
    process."""
    gpus_per_worker: Amount = 1.0
    gpu: str | None = None
    """Kind of device; None for what this machine has."""
    table: HardwareTable | None = None
    network_gbit: Amount | None = None
    price_per_hour: Amount | None = None

    def hardware(self) -> Hardware:
        """The kind of device that each worker has, or its share of one."""
        table = self.table or load_table()
        name = self.gpu or hardware_here(table)
        hardware = find_hardware(name, table, self.network_gbit)
        if not 0 < self.gpus_per_worker < 1 or not hardware.is_gpu:
            return hardware
        return hardware.share(self.gpus_per_worker)

    def workers(self, hardware: Hardware) -> tuple[int, Settings]:
        """How many workers, and where."""
        if self.num_workers is not None and self.num_workers < 0:
            rule = f"num_workers={self.num_workers}: must be 0 or more."
            raise ConfigError("plan", [rule])
        in_process = not self.num_workers and (self.num_workers == 0 or not hardware.is_gpu)
        local = 1 if hardware.is_gpu else min(torch.get_num_threads(), MOST_LOCAL_WORKERS)
        each = max(1.0, self.gpus_per_worker) if hardware.is_gpu else 1.0
        price = None if self.price_per_hour is None else self.price_per_hour * each
        return self.num_workers or (local if in_process else 1), Settings(
            in_process=in_process,
            price_per_hour=price,
        )


@dataclass(frozen=True)
class Request:
    """What is to be made of which model."""

    model: PlannedModel
    quantizer: Quantizer
    text: TextShape | None
    """None where the method reads none."""
    qep: QEPConfig | None


def make_estimate(request: Request, place: Place) -> Estimate:
    """What the run will take there, by the table's rates.

    Raises:
        UserError: A model, method or place that cannot be planned.
    """
    hardware = place.hardware()
    num_workers, settings = place.workers(hardware)
    shape = request.model.shape(request.quantizer)
    costs = UnitCosts(
        shape,
        method_shape(settled(request.quantizer, shape)),
        request.text,
        request.qep,
        hardware,
        num_workers,
    )
    return Estimate(costs, settings)


def estimate_job(
    job: QuantizationJob,
    skeleton: Skeleton,
    samples: CalibrationSamples | None,
    place: Place,
) -> Estimate:
    """What a job that passed its checks will take, for ``fit.require_fit``."""
    text = None
    if samples is not None:
        num_samples, length = samples.input_ids.shape
        text = TextShape(num_samples, length, job.num_shards)
    request = Request(PlannedModel.of(skeleton), job.quantizer, text, job.qep)
    return make_estimate(request, place)


def probed(estimate: Estimate, request: Request, place: Place) -> tuple[Estimate, Measured]:
    """The estimate with this machine's measured rates, and what was measured.

    Raises:
        ConfigError: The plan is for another kind of device than this machine has.
        InputError: The probe would take too long.
    """
    if request.quantizer.needs_survey:
        rule = "is not known before its survey. Leave out --probe."
        raise ConfigError("plan", [f"what {request.quantizer.name} does with each layer {rule}"])
    started_s = time.process_time()
    table = place.table or load_table()
    here = hardware_here(table)
    if here != estimate.costs.hardware.name:
        rule = (
            f"gpu={estimate.costs.hardware.name}: a probe measures this machine, which has {here}."
        )
        raise ConfigError("plan", [f"{rule} Leave out --gpu or --probe."])
    require_short(estimate.costs, request.model.skeleton.source.directory)
    num_workers = estimate.num_workers if here == CPU else 1
    with _weights(request.model) as source:
        at_once = min(num_workers, torch.get_num_threads())
        measured = probe(estimate.costs, source, request.quantizer, max(1, at_once))
    hardware = replace(estimate.costs.hardware, corrections=measured.corrections)
    costs = replace(estimate.costs, hardware=hardware)
    settings = replace(estimate.settings, process_start_s=started_s)
    return replace(estimate, costs=costs, settings=settings), measured


@contextmanager
def _weights(model: PlannedModel) -> Iterator[ModelSource]:
    """The model's own weights; where there are none, two blocks of its shapes, at random."""
    skeleton = model.skeleton
    if model.headers:
        yield ModelSource.open(
            skeleton.source.directory, trust_remote_code=skeleton.source.trust_remote_code
        )
        return
    with tempfile.TemporaryDirectory(prefix="onecomp-shapes-") as folder:
        config = skeleton.model.config.to_dict() | {"num_hidden_layers": 2}
        config |= {k: v[:2] for k, v in config.items() if k == "layer_types" and v}
        short = type(skeleton.model.config).from_dict(config)
        random = AutoModelForCausalLM.from_config(short, dtype=skeleton.dtype)
        random.save_pretrained(folder)
        yield ModelSource.open(Path(folder))
