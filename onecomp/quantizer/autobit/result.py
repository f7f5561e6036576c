"""What the survey finds of one layer."""

from dataclasses import dataclass

from torch import Tensor

from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class SurveyResult(QuantizationResult):
    """Errors that each candidate would make; there is no quantized weight."""

    errors: Tensor | None = None
    """``(candidates, out)``, float32: squared error of each row, weighted by the Hessian or plain;
    infinite where a candidate is not for the layer."""
    num_tokens: int = 0
    """Tokens that the Hessian is the mean over; 1 where errors are plain."""

    def row_dims(self) -> dict[str, int]:
        """Rows come second."""
        return {**super().row_dims(), "errors": 1}
