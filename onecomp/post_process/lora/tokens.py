"""Training samples of different lengths: their tokens in an Arrow file, mapped, and batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
"""Label of what is no target."""
COLUMN = "input_ids"


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side, the shorter ones padded at their end."""

    input_ids: Int64[Tensor, "samples length"]
    attention_mask: Int64[Tensor, "samples length"]
    """0 where a token is padding."""
    labels: Int64[Tensor, "samples length"]
    """The tokens; ``IGNORED`` where padding is."""

    @classmethod
    def of(cls, samples: Sequence[Int64[Tensor, " _"]]) -> "Batch":
        """Pad to the longest sample."""
        ids = pad_sequence(list(samples), batch_first=True)
        mask = pad_sequence([torch.ones_like(s) for s in samples], batch_first=True)
        return cls(ids, mask, ids.masked_fill(mask == 0, IGNORED))

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )

    @property
    def is_token(self) -> Bool[Tensor, "samples length"]:
        """Where no padding is."""
        return self.attention_mask.bool()

    @property
    def targets(self) -> Int64[Tensor, " targets"]:
        """The tokens that are predicted: all but each sample's first, one sample after another."""
        return self.labels[:, 1:][self.is_token[:, 1:]]

    def predictions(
        self, logits: Float[Tensor, "samples length vocabulary"]
    ) -> Float[Tensor, "targets vocabulary"]:
        """The logits that predict ``targets``."""
        before = logits[:, :-1]
        has_target = self.is_token[:, 1:]
        return before.flatten(0, 1) if bool(has_target.all()) else before[has_target]


class TokenFile:
    """Samples of an Arrow file, mapped; a sample is read when it is asked for.

    Args:
        path: Written by :func:`write_tokens`.
    """

    def __init__(self, path: Path):
        import datasets  # noqa: PLC0415 - takes a second

        self._rows = datasets.Dataset.from_file(str(path))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return pc.list_value_length(self._rows.data.column(COLUMN)).to_pylist()

    def sample(self, number: int) -> Int64[Tensor, " length"]:
        """Tokens of one sample."""
        return torch.tensor(self._rows[number][COLUMN], dtype=torch.int64)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Samples by number."""
        return Batch.of([self.sample(number) for number in numbers])


def write_tokens(path: Path, samples: Iterable[list[int]]) -> TokenFile:
    """Write samples one after the other; only one is held at a time.

    Args:
        path: New file.
        samples: Tokens of each sample.
    """
    import datasets  # noqa: PLC0415 - takes a second
    from datasets.arrow_writer import ArrowWriter  # noqa: PLC0415

    features = datasets.Features({COLUMN: datasets.Sequence(datasets.Value("int32"))})
    with ArrowWriter(path=str(path), features=features) as writer:
        for sample in samples:
            writer.write({COLUMN: sample})
        writer.finalize()
    return TokenFile(path)
