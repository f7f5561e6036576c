import pytest
import torch

from onecomp.calibration.samples import CalibrationSamples
from onecomp.calibration.shards import cut_shards


def samples_of(count: int, length: int) -> CalibrationSamples:
    ids = torch.arange(count * length).reshape(count, length)
    return CalibrationSamples(ids, torch.ones_like(ids))


@pytest.mark.parametrize(
    ("count", "length", "expected"),
    [(512, 2048, 64), (128, 256, 32), (20, 128, 2), (3, 64, 1), (1, 8192, 1), (5, 4096, 5)],
)
def test_up_to_64_shards_of_at_least_1024_tokens(count, length, expected):
    shards = cut_shards(samples_of(count, length))
    assert len(shards) == expected
    assert [shard.index for shard in shards] == list(range(expected))


@pytest.mark.parametrize("num_shards", [None, 1, 3, 7, 100])
def test_shards_hold_all_samples_in_order_in_even_parts(num_shards):
    samples = samples_of(37, 100)
    shards = cut_shards(samples, num_shards)
    assert torch.equal(torch.cat([s.input_ids for s in shards]), samples.input_ids)
    assert torch.equal(torch.cat([s.attention_mask for s in shards]), samples.attention_mask)
    sizes = {len(shard.input_ids) for shard in shards}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize(("length", "expected"), [(100, 40), (2048, 2), (4096, 1), (9000, 1)])
def test_micro_batches_hold_up_to_4096_tokens_and_all_samples_in_order(length, expected):
    [shard] = cut_shards(samples_of(45, length), 1)
    batches = shard.micro_batches()
    assert max(len(ids) for ids, _ in batches) == expected
    assert torch.equal(torch.cat([ids for ids, _ in batches]), shard.input_ids)
    assert torch.equal(torch.cat([mask for _, mask in batches]), shard.attention_mask)
