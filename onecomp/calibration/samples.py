"""The token batch that calibrates a model."""

import hashlib
from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CalibrationSamples:
    """Calibration text as tokens, one sample per row, on the CPU."""

    input_ids: Int64[Tensor, "samples length"]
    """Token ids."""
    attention_mask: Int64[Tensor, "samples length"]
    """1 where a token counts; our own samples are never padded, so all ones."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def content_hash(self) -> str:
        """SHA-256, in hex, of the shape, the token ids and the mask; the identity of the data."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.attention_mask):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()
