"""Errors of a result against the weight it stands for, row by row, so that pieces add up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.linalg import quadratic_form
from onecomp.quantizer.result import QuantizationResult


@dataclass(frozen=True)
class RowErrors:
    """Squared error of each row, and below it the row's own square, which it is relative to."""

    weight: Float[Tensor, "2 out"] | None = None
    """``||w - ŵ||²`` and ``||w||²``, float64."""
    output: Float[Tensor, "2 out"] | None = None
    """``(w - ŵ) H (w - ŵ)ᵀ`` and ``w H wᵀ``."""
    baseline: Float[Tensor, " out"] | None = None
    """Output error of the row plainly rounded, where the method is compared with that."""
    num_tokens: int = 0
    """Tokens that ``H`` is the mean of; 0 where only the ratio of output errors is to be told."""

    @classmethod
    def of(
        cls,
        result: QuantizationResult,
        weight: Float[Tensor, "out in"],
        hessian: Float[Tensor, "in in"] | None,
        num_tokens: int,
    ) -> "RowErrors":
        """Measure a result of all rows of ``weight``; output errors where there is a Hessian."""
        weight = weight.float()
        pair = weight - result.dequantize(weight.device), weight
        squares = torch.stack([part.double().square().sum(dim=1) for part in pair])
        if hessian is None:
            return cls(squares)
        return cls(squares, output_errors(result, weight, hessian), num_tokens=num_tokens)

    @staticmethod
    def join(parts: Sequence["RowErrors"]) -> "RowErrors":
        """Errors of a layer from those of consecutive rows."""
        weight, output, baseline = (
            None if None in rows else torch.cat(rows, dim=-1)
            for rows in zip(*(part._tensors() for part in parts), strict=True)
        )
        return replace(parts[0], weight=weight, output=output, baseline=baseline)

    def cpu(self) -> "RowErrors":
        """The same in the processor's memory."""
        weight, output, baseline = (None if t is None else t.cpu() for t in self._tensors())
        return replace(self, weight=weight, output=output, baseline=baseline)

    def _tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.weight, self.output, self.baseline

    def beside_baseline(self) -> float | None:
        """Output error as a multiple of plain rounding's; None where nothing is compared."""
        if self.baseline is None or self.output is None:
            return None
        error, rounded = self.output[0].double().sum().item(), self.baseline.double().sum().item()
        if rounded > 0:
            return error / rounded
        return math.inf if error > 0 else 1.0

    def fill(self, result: QuantizationResult, in_features: int) -> None:
        """Fill the error fields that are known; sums over rows are float64."""
        if self.weight is not None:
            error, energy = self.weight.sum(dim=1).tolist()
            result.weight_squared_error = error
            result.mean_weight_squared_error = error / (self.weight.shape[1] * in_features)
            result.relative_weight_squared_error = _ratio(error, energy)
        if self.output is not None:
            error, energy = self.output.double().sum(dim=1).tolist()
            result.relative_output_squared_error = _ratio(error, energy)
            if self.num_tokens:
                result.output_squared_error = error * self.num_tokens / 2
                result.mean_output_squared_error = error / (2 * self.output.shape[1])


def output_errors(
    result: QuantizationResult, weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> Float[Tensor, "2 out"]:
    """Output error of each row of a result, and the output energy of the row itself."""
    pair = weight - result.dequantize(weight.device), weight
    return torch.stack([quadratic_form(part.T, hessian) for part in pair])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
