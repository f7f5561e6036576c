"""Calibration shards: fixed, numbered slices of the samples, the unit of parallel work."""

from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Int64
from torch import Tensor

from onecomp.calibration.samples import CalibrationSamples

MAX_SHARDS = 64
LEAST_SHARD_TOKENS = 1024
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class CalibrationShard:
    """One slice of the samples."""

    index: int
    input_ids: Int64[Tensor, "samples length"]
    attention_mask: Int64[Tensor, "samples length"]
    micro_batch: int
    """Samples that go through a block together."""

    def micro_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Token ids and mask of each micro-batch, in order."""
        ids, mask = (
            self.input_ids.split(self.micro_batch),
            self.attention_mask.split(self.micro_batch),
        )
        return list(zip(ids, mask, strict=True))


def cut_shards(
    samples: CalibrationSamples, num_shards: int | None = None
) -> list[CalibrationShard]:
    """Cut the samples into shards; the cut follows from the samples, never from the machine.

    Args:
        samples: All samples.
        num_shards: None for up to 64 shards of at least 1024 tokens.

    Returns:
        Shards in order; their sizes differ by one sample at most.
    """
    count, length = samples.input_ids.shape
    if num_shards is None:
        num_shards = min(MAX_SHARDS, max(1, count * length // LEAST_SHARD_TOKENS))
    num_shards = min(num_shards, count)
    edges = [count * i // num_shards for i in range(num_shards + 1)]
    return [
        CalibrationShard(
            index,
            samples.input_ids[first:last].clone(),  # a slice would be sent with all of the samples
            samples.attention_mask[first:last].clone(),
            max(1, MICRO_BATCH_TOKENS // length),
        )
        for index, (first, last) in enumerate(pairwise(edges))
    ]
