"""What the file of a block keeps, and in how many bytes."""

import pytest
import torch
from torch import Tensor

from onecomp.block_file import read_block_file, write_block_file
from onecomp.quantizer import ARBResult, CQResult, QBBResult, QuantizationResult


def random_bits(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


def result_of(low: int, shape: tuple[int, int]) -> QuantizationResult:
    bits = random_bits(*shape)
    if low == -1:
        return ARBResult(
            sign=bits * 2 - 1, alpha=torch.ones(shape[0], 1), mu=torch.ones(shape[0], 1)
        )
    return CQResult(quantized_weight=bits, left_mean=torch.ones(3), right_mean=torch.ones(3))


@pytest.mark.parametrize("shape", [(3, 7), (64, 96), (1, 1)])
@pytest.mark.parametrize("low", [-1, 0])
def test_matrices_of_two_values_take_a_bit_for_each(tmp_path, low, shape):
    result = result_of(low, shape)
    write_block_file(tmp_path / "00000.safetensors", {"layer": result})
    found = read_block_file(tmp_path / "00000.safetensors")["layer"]
    for name, tensor in result.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)
        assert found.tensors()[name].dtype == tensor.dtype
    if shape == (64, 96):
        others = sum(4 * t.numel() for t in result.tensors().values() if t.is_floating_point())
        file_bytes = (tmp_path / "00000.safetensors").stat().st_size
        assert file_bytes < 64 * 96 / 8 + others + 1000


@pytest.mark.parametrize("wbits", [1, 3, 4, 7, 8])
def test_codes_take_as_many_bits_as_their_largest(tmp_path, wbits):
    codes = torch.arange(64 * 96).remainder(2**wbits).view(64, 96).to(torch.uint8)
    result = QBBResult(wbits=wbits, codes=codes, alpha=torch.ones(64, 1, wbits).half())
    write_block_file(tmp_path / "00000.safetensors", {"layer": result})
    found = read_block_file(tmp_path / "00000.safetensors")["layer"]
    assert torch.equal(found.codes, codes)
    assert found.codes.dtype == torch.uint8
    file_bytes = (tmp_path / "00000.safetensors").stat().st_size
    assert file_bytes < wbits * 64 * 96 / 8 + 2 * 64 * wbits + 1000


@pytest.mark.parametrize(
    "values", [[[0, 1], [2, 1]], [[-1, 0], [1, 1]], [[1, 1], [1, 1]], [[-2, 1], [1, 1]]]
)
def test_other_bytes_stay_what_they_are(tmp_path, values):
    result = ARBResult(sign=torch.tensor(values, dtype=torch.int8))
    write_block_file(tmp_path / "00000.safetensors", {"layer": result})
    found = read_block_file(tmp_path / "00000.safetensors")["layer"]
    assert torch.equal(found.sign, result.sign)
    assert found.sign.dtype == torch.int8
