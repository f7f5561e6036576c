import pytest
import torch

from onecomp.errors import ConfigError
from onecomp.export.packing import pack_columns, pack_rows, packable, unpack_columns, unpack_rows

ALL_WBITS = [1, 2, 3, 4, 5, 6, 7, 8]


def random_codes(rows: int, cols: int, wbits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(wbits)
    codes = torch.randint(0, 2**wbits, (rows, cols), generator=generator, dtype=torch.int32)
    codes[:, 0], codes[:, 1] = 0, 2**wbits - 1
    return codes


def bit_stream(packed: torch.Tensor, column: int) -> int:
    """The words of one column as one big integer, first word lowest."""
    words = packed[:, column].numpy().astype("<u4").tobytes()
    return int.from_bytes(words, "little")


@pytest.mark.parametrize("wbits", ALL_WBITS)
def test_unpacking_inverts_packing(wbits):
    codes = random_codes(96, 5, wbits)
    packed = pack_rows(codes, wbits)
    assert packed.shape == (96 * wbits // 32, 5)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_rows(packed, wbits, 96), codes)


@pytest.mark.parametrize("wbits", ALL_WBITS)
def test_columns_are_rows_of_the_transpose(wbits):
    codes = random_codes(64, 3, wbits)
    packed = pack_columns(codes.T, wbits)
    assert torch.equal(packed, pack_rows(codes, wbits).T)
    assert torch.equal(unpack_columns(packed, wbits, 64), codes.T)


@pytest.mark.parametrize("wbits", ALL_WBITS)
def test_value_k_is_at_bit_k_times_wbits(wbits):
    codes = random_codes(64, 4, wbits)
    packed = pack_rows(codes, wbits)
    for column in range(4):
        expected = sum(int(code) << (k * wbits) for k, code in enumerate(codes[:, column]))
        assert bit_stream(packed, column) == expected


@pytest.mark.parametrize("k", [10, 21])
def test_some_three_bit_values_straddle_two_words(k):
    codes = torch.zeros(32, 1, dtype=torch.int32)
    codes[k] = 7
    packed = pack_rows(codes, 3).flatten()
    assert (packed != 0).sum() == 2
    assert packed.shape == (3,)


def test_eight_four_bit_values_fill_a_word_with_its_sign_bit():
    packed = pack_rows(torch.arange(8, 16, dtype=torch.int32).unsqueeze(1), 4)
    assert packed.item() == 0xFEDCBA98 - 2**32


def test_higher_bits_are_cut_off():
    codes = random_codes(32, 2, 4)
    assert torch.equal(pack_rows(codes - 16, 4), pack_rows(codes, 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_any_integer_type_packs_alike(dtype):
    codes = random_codes(32, 2, 7)
    assert torch.equal(pack_rows(codes.to(dtype), 7), pack_rows(codes, 7))


@pytest.mark.parametrize(("wbits", "rows", "divisor"), [(2, 24, 16), (4, 12, 8), (6, 16, 32)])
def test_rows_that_do_not_fill_words_are_refused(wbits, rows, divisor):
    with pytest.raises(ConfigError, match=f"{rows} values .* must be a multiple of {divisor}"):
        pack_rows(torch.zeros(rows, 2, dtype=torch.int32), wbits)


def test_wrong_number_of_rows_is_refused():
    with pytest.raises(ConfigError, match="2 words of 4-bit values hold 16 values, not 24"):
        unpack_rows(torch.zeros(2, 3, dtype=torch.int32), 4, 24)


def test_packable_needs_a_width_with_a_layout_and_both_sides_to_divide():
    assert all(packable(wbits, 64, 96) for wbits in range(2, 9))
    assert packable(4, 8, 24)
    assert not packable(4, 12, 24)
    assert not packable(4, 24, 12)
    assert not packable(3, 32, 48)
    assert not packable(1, 64, 64)
    assert not packable(9, 288, 288)
