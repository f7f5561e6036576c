import pytest
import torch

from onecomp.export.bits import pack_bits, unpack_bits


def draw_signs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).sign()


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (4, 16), (2, 3, 7)])
def test_bits_equal_those_of_a_binary_number(shape):
    signs = draw_signs(*shape)
    text = "".join("1" if sign > 0 else "0" for sign in signs.flatten().tolist())
    text += "1" * (-len(text) % 8)
    expected = [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    assert pack_bits(signs).tolist() == expected
    assert pack_bits(signs > 0).tolist() == expected


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (4, 16), (2, 3, 7)])
def test_unpacking_is_the_inverse(shape):
    signs = draw_signs(*shape)
    assert torch.equal(unpack_bits(pack_bits(signs), shape), signs)


def test_zero_counts_as_positive():
    assert pack_bits(torch.tensor([0.0, -0.0, -1.0, 0.0])).tolist() == [0b11011111]
