"""A plan: an estimate, whether it fits, and what was measured for it; as one JSON object."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from onecomp.planning.amounts import Amount
from onecomp.planning.costs import Unit
from onecomp.planning.estimate import Estimate
from onecomp.planning.fit import remedies, resources_of_kind, shortages
from onecomp.planning.hardware import HardwareTable, load_table
from onecomp.planning.memory import names_in_block, short_name
from onecomp.planning.probe import Measured
from onecomp.planning.request import Place, Request, make_estimate, probed
from onecomp.planning.shapes import BlockShape
from onecomp.planning.survey import SurveyEstimate, survey_estimate
from onecomp.resources import Resources, free_disk


@dataclass(frozen=True)
class Plan:
    """An estimate, whether it fits, and what was measured for it."""

    estimate: Estimate
    resources: Resources
    table: HardwareTable
    measured: Measured | None = None

    @cached_property
    def survey(self) -> SurveyEstimate | None:
        """What comes before the run, for a method that compares candidates."""
        return survey_estimate(self.estimate)

    @property
    def cost(self) -> Amount | None:
        """Price of all workers for the run and what comes before it."""
        estimate, survey = self.estimate, self.survey
        if estimate.cost is None or survey is None:
            return estimate.cost
        return estimate.cost * (1 + survey.wall_s / estimate.wall_s)

    @property
    def shortages(self) -> list[str]:
        """What there is too little of."""
        return [str(shortage) for shortage in shortages(self.estimate, self.resources)]

    @property
    def remedies(self) -> list[str]:
        """Settings that would fit."""
        return remedies(self.estimate, self.resources, self.table) if self.shortages else []

    @property
    def notes(self) -> list[str]:
        """What the reader should know."""
        costs = self.estimate.costs
        rates = f"{costs.hardware.source}; --probe measures those of this machine"
        if self.measured is not None:
            rates = "measured on this machine"
        notes = [*costs.model.notes, f"Rates: {rates}."]
        if costs.text is None:
            return [*notes, "The method reads no calibration text."]
        rows = [
            short_name(group)
            for kind in costs.model.kinds
            for group in kind.groups
            if costs.sends_rows(group, costs.num_at_once(kind, group))
        ]
        if rows:
            names = ", ".join(dict.fromkeys(rows))
            notes.append(f"Rows are sent instead of sums for: {names}.")
        return notes


def make_plan(
    request: Request, place: Place, *, with_probe: bool = False, run_dir: Path | None = None
) -> Plan:
    """The plan of a run.

    Args:
        request: What is to be made.
        place: Where.
        with_probe: Measure one block on this machine.
        run_dir: Where the run directory would be; its disk is looked at.

    Raises:
        UserError: Something that cannot be planned, or measured here.
    """
    estimate, measured = make_estimate(request, place), None
    if with_probe:
        estimate, measured = probed(estimate, request, place)
    resources = resources_of_kind(estimate)
    if run_dir is not None:
        resources = replace(resources, run_disk=free_disk(run_dir.expanduser().absolute()))
    return Plan(estimate, resources, place.table or load_table(), measured)


def as_json_values(plan: Plan) -> dict:
    """The plan as plain JSON values; bytes, operations and seconds without prefixes."""
    estimate, costs = plan.estimate, plan.estimate.costs
    model, memory = costs.model, estimate.memory
    return {
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "dtype": model.dtype,
            "parameters": model.num_parameters,
            "blocks": model.num_blocks,
            "stored": None if model.stored is None else asdict(model.stored),
        },
        "method": costs.method.as_json(),
        "qep": costs.qep is not None,
        "text": None if costs.text is None else asdict(costs.text) | _shards(plan),
        "hardware": {"name": costs.hardware.name, "source": costs.hardware.source},
        "workers": estimate.num_workers,
        "in_process": estimate.settings.in_process,
        "kinds": [_kind_json(estimate, kind) for kind in model.kinds],
        "phases": [asdict(phase) for phase in estimate.phases],
        "memory": {
            "device_bytes_per_worker": memory.device_bytes,
            "host_bytes_per_process": memory.host_bytes,
            "driver_bytes": memory.driver_bytes,
            "object_store_bytes": memory.object_store_bytes,
            "worst_moment": {"what": memory.worker.what, "bytes": dict(memory.worker.parts)},
        },
        "disk": {
            "run_directory_bytes": memory.run_disk_bytes,
            "results_bytes": memory.results_bytes,
            "checkpoint_bytes": memory.checkpoint_bytes,
        },
        "time": {
            "work_s": estimate.work_s,
            "chain_s": estimate.chain_s,
            "startup_s": estimate.settings.startup_s,
            "workers_start_s": estimate.workers_start_s,
            "wall_s": estimate.wall_s,
        },
        "survey": None if plan.survey is None else _survey_json(plan.survey),
        "cost": plan.cost,
        "fits": not plan.shortages,
        "shortages": plan.shortages,
        "remedies": plan.remedies,
        "notes": plan.notes,
        "probe": None if plan.measured is None else _probe_json(plan.measured),
    }


def _survey_json(survey: SurveyEstimate) -> dict[str, Amount]:
    return {
        "wall_s": survey.wall_s,
        "curvature_s": survey.curvature_s,
        "hidden_bytes_per_worker": survey.hidden_bytes,
    }


def _shards(plan: Plan) -> dict[str, int]:
    text = plan.estimate.costs.text
    return {"tokens": text.num_tokens, "shards": text.num_shards}


def _kind_json(estimate: Estimate, kind: BlockShape) -> dict:
    costs = estimate.costs
    return {
        "blocks": kind.count,
        "first": kind.indices[0],
        "parameters": kind.num_parameters,
        "quantized_weights": kind.num_quantized,
        "network_bytes_per_block": dict(estimate.network_bytes(kind)),
        "chain_s_per_block": estimate.block_chain_s(kind),
        "groups": [
            {
                "layers": names_in_block(group),
                "in_features": group.in_features,
                "out_features": list(group.out_features),
                "corrected": costs.is_corrected(group),
                "quantize_s": costs.seconds("quantize", Unit(kind, group)),
            }
            for group in kind.groups
        ],
    }


def _probe_json(measured: Measured) -> dict:
    return {
        phase: {
            "seconds": measured.seconds[phase],
            "correction": measured.corrections[phase],
            "rate": measured.rate(phase),
        }
        for phase in measured.corrections
    }
