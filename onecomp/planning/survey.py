"""What comes before the run of a method that compares its candidates first."""

from dataclasses import dataclass, replace

from onecomp.planning.amounts import Amount
from onecomp.planning.costs import Unit, UnitCosts
from onecomp.planning.estimate import Estimate
from onecomp.planning.methods import method_shape
from onecomp.planning.shapes import ModelShape
from onecomp.quantizer import AutoBitQuantizer, Quantizer
from onecomp.survey.curvature import MOST_SHARDS

FORWARD_PASSES = 4
"""Forward passes that take as long as one there and one back: the way back computes each block
again, and its gradients take two passes."""
BLOCKS_READ = 2
"""Times that a shard's worker reads a block."""


@dataclass(frozen=True)
class SurveyEstimate:
    """Seconds before the first block, and what a worker holds that measures gradients."""

    comparing: Estimate
    """Every candidate quantizes every layer; nothing is stored but errors."""
    curvature_s: Amount
    hidden_bytes: Amount
    """Hidden states in front of every block, of one shard, in the processor's memory."""

    @property
    def wall_s(self) -> Amount:
        """Seconds of both."""
        return self.comparing.wall_s - self.comparing.settings.startup_s + self.curvature_s


def settled(quantizer: Quantizer, model: ModelShape) -> Quantizer:
    """The method, with its assignment where that follows from the layers alone."""
    if not isinstance(quantizer, AutoBitQuantizer):
        return quantizer
    groups = [group for kind in model.kinds for group in kind.groups]
    shapes = {name: shape for group in groups for name, shape in group.shapes.items()}
    return replace(quantizer, assignment=quantizer.assign_unmeasured(shapes))


def survey_estimate(estimate: Estimate) -> SurveyEstimate | None:
    """What comes before the run that was estimated, on the same workers; None for nothing."""
    quantizer = estimate.costs.method.rated
    if not isinstance(quantizer, AutoBitQuantizer) or quantizer.assignment is not None:
        return None
    survey = quantizer.survey()
    costs = replace(
        estimate.costs,
        method=method_shape(survey),
        qep=None,
        has_checkpoint=False,
        text=estimate.costs.text if survey.flag_calibration else None,
    )
    comparing = replace(estimate, costs=costs)
    if costs.text is None or not quantizer.use_curvature_b:
        return SurveyEstimate(comparing, 0.0, 0.0)
    return SurveyEstimate(comparing, _curvature_s(costs), _hidden_bytes(costs))


def _curvature_s(costs: UnitCosts) -> Amount:
    """Shards go through the model one by one, each on one worker."""
    text, in_turn = costs.text, -(-min(MOST_SHARDS, costs.text.num_shards) // costs.num_workers)
    total: Amount = 0.0
    for kind in costs.model.kinds:
        unit = Unit(kind, tokens=text.shard_tokens)
        forward = (
            costs.work("observe", unit)["forward"] + costs.work("finish_block", unit)["forward"]
        )
        seconds = FORWARD_PASSES * costs.phase_s("forward", forward)
        seconds += BLOCKS_READ * costs.seconds("begin_block", unit)
        total += kind.count * in_turn * seconds
    return total


def _hidden_bytes(costs: UnitCosts) -> Amount:
    tokens, model = costs.text.shard_tokens, costs.model
    return (model.num_blocks + 1) * tokens * model.hidden_size * model.dtype_bytes
