"""The survey: what each candidate would do to each layer, measured by the engine of any run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.linalg import quadratic_form
from onecomp.quantizer.autobit.result import SurveyResult
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.errors_of import RowErrors, output_errors
from onecomp.quantizer.factors import FactorKey, HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer


@dataclass
class Survey(WeightQuantizer):
    """Quantizes every layer with every candidate, with its own settings, and keeps the errors only.

    With ``flag_hessian`` the error of a row is ``ΔW H ΔWᵀ``. Without, it is ``‖ΔW‖²`` of the
    candidate on the identity as Hessian, with which second-order methods round to nearest on their
    own grids; no text is read then.
    """

    quantizers: list[Quantizer] = field(default_factory=list)

    def layer_problems(self, layer_name: str, in_features: int, out_features: int) -> list[str]:
        """None: the candidates were asked before."""
        return []

    def is_separable(self, layer_name: str) -> bool:
        """Whether all candidates of the layer solve its rows independently."""
        return all(c.is_separable(layer_name) for c in self.quantizers if c.accepts(layer_name))

    def piece_key(self, layer_name: str) -> tuple[object, ...]:
        """Layers that may share a piece with every candidate."""
        return tuple((c.accepts(layer_name), *c.piece_key(layer_name)) for c in self.quantizers)

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """Those of every candidate."""
        keys = (key for candidate in self.quantizers for key in candidate.factor_keys())
        return tuple(dict.fromkeys(keys))

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """That of all candidates."""
        return sum(candidate.solve_cost(num_rows, in_features) for candidate in self.quantizers)

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, SurveyResult]:
        """Errors of every candidate on layers that share an input."""
        errors = {name: _unfit(weight, len(self.quantizers)) for name, weight in weights.items()}
        for index, candidate in enumerate(self.quantizers):
            own = {name: weight for name, weight in weights.items() if candidate.accepts(name)}
            for name, of_rows in self._errors(candidate, own, factors).items():
                errors[name][index] = of_rows.float()
        if factors is not None:
            factors.row_errors |= _least(weights, errors, factors.hessian)
        num_tokens = 1 if factors is None else factors.num_tokens
        return {n: SurveyResult(errors=e.cpu(), num_tokens=num_tokens) for n, e in errors.items()}

    def _errors(
        self, candidate: Quantizer, weights: Mapping[str, Tensor], factors: HessianFactors | None
    ) -> dict[str, Float[Tensor, " out"]]:
        if not weights:
            return {}
        own = _own_factors(candidate, weights.values(), factors)
        results = candidate.quantize_weights(weights, own)
        if factors is None:
            return {
                name: RowErrors.of(result, weights[name], None, 0).weight[0]
                for name, result in results.items()
            }
        known: Mapping[str, Tensor] = {}
        if own is not None:
            factors.fallbacks += [f"{candidate.name}: {text}" for text in own.fallbacks]
            known = own.row_errors
        return {
            name: known[name][0]
            if name in known
            else output_errors(result, weights[name], factors.hessian)[0]
            for name, result in results.items()
        }


def _own_factors(
    candidate: Quantizer, weights: Iterable[Tensor], factors: HessianFactors | None
) -> HessianFactors | None:
    """What the candidate is given, with nothing found yet."""
    if not candidate.flag_hessian:
        return None
    if factors is not None:
        return factors.for_piece()
    weight = next(iter(weights))
    return HessianFactors.of_identity(weight.shape[1], candidate.factor_keys(), weight.device)


def _unfit(weight: Tensor, num_candidates: int) -> Float[Tensor, "candidates out"]:
    return torch.full((num_candidates, len(weight)), torch.inf, device=weight.device)


def _least(
    weights: Mapping[str, Tensor], errors: Mapping[str, Tensor], hessian: Tensor
) -> dict[str, Float[Tensor, "2 out"]]:
    """For progress lines: the least error of each row, and the energy of the row."""
    return {
        name: torch.stack([errors[name].amin(dim=0), quadratic_form(weight.T, hessian)])
        for name, weight in weights.items()
    }
