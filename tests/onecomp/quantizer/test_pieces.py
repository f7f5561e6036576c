from dataclasses import dataclass

import pytest
import torch

from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN, QuantizationResult, Quantizer
from onecomp.quantizer.pieces import (
    CPU_TILE,
    CUDA_TILE,
    EDGE,
    LEAST_ROWS,
    even_cuts,
    piece_cost,
    prepare_cost,
    row_pieces,
    row_tile,
)

QKV = {"q": 576, "k": 192, "v": 192}


@dataclass
class WholeLayers(Quantizer):
    def quantize_layer(self, module, input=None, hessian=None):  # noqa: A002
        return module.weight.data


class OwnRounding(RTN):
    def quantize_layer(self, module, input=None, hessian=None):  # noqa: A002
        return module.weight.data - module.weight.data.mean(dim=0)


class OwnWeights(GPTQ):
    def quantize_weights(self, weights, factors):
        return super().quantize_weights(weights, factors)


class RenamedGPTQ(GPTQ):
    def default_name(self) -> str:
        return "mine"


@pytest.mark.parametrize("num_rows", [1, 15, 99, 116, 231, 232, 576, 960, 1000, 4097, 11008])
@pytest.mark.parametrize("tile", [1, 100, 128, 512, 1000, 4096])
def test_cuts_are_even_and_not_too_fine(num_rows, tile):
    cuts = even_cuts(num_rows, tile)
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
    assert cuts[-1][1] == num_rows
    sizes = [b - a for a, b in cuts]
    assert max(sizes) - min(sizes) <= 2 * EDGE
    assert min(sizes) >= min(LEAST_ROWS, num_rows)
    assert max(sizes) < max(tile, 2 * (LEAST_ROWS + EDGE)) + EDGE
    assert all(a % EDGE == 0 for a, _ in cuts)
    if tile >= num_rows:
        assert len(cuts) == 1


@pytest.mark.parametrize("quantizer", [GPTQ(), RTN(), GPTQ(module_wbits={"k": 3})])
@pytest.mark.parametrize("tile", [128, 200, 512, 4096])
def test_every_row_lies_in_one_piece(quantizer, tile):
    pieces = row_pieces(quantizer, QKV, 64, tile)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert {piece.count for piece in pieces} == {len(pieces)}
    found = {name: torch.zeros(rows, dtype=int) for name, rows in QKV.items()}
    for piece in pieces:
        for rows in piece.ranges:
            found[rows.layer_name][rows.start : rows.stop] += 1
        assert piece.num_rows == sum(len(part) for part in piece.rows_of(found).values())
        assert sum(piece.share(name) for name in QKV) == pytest.approx(1)
    assert all((counts == 1).all() for counts in found.values())


def test_layers_lie_on_top_of_each_other():
    pieces = row_pieces(GPTQ(), QKV, 64, 512)
    found = [[(r.layer_name, r.start, r.stop) for r in piece.ranges] for piece in pieces]
    assert found == [[("q", 0, 480)], [("q", 480, 576), ("k", 0, 192), ("v", 0, 192)]]
    assert [str(piece.ranges[0]) for piece in pieces] == [
        "rows 0 to 479 of its weight",
        "rows 480 to 575 of its weight",
    ]
    assert str(pieces[1].ranges[1]) == "its weight"


def test_layers_of_different_bits_share_no_piece():
    pieces = row_pieces(GPTQ(module_wbits={"k": 3}), QKV, 64, 4096)
    assert [[rows.layer_name for rows in piece.ranges] for piece in pieces] == [["k"], ["q", "v"]]


@pytest.mark.parametrize(
    "quantizer", [WholeLayers(), OwnRounding(), OwnWeights(), WholeLayers(flag_hessian=True)]
)
def test_a_method_that_does_not_say_its_rows_are_independent_gets_one_piece(quantizer):
    [piece] = row_pieces(quantizer, {"a": 5000, "b": 300}, 64, 128)
    assert [(len(rows), rows.is_whole) for rows in piece.ranges] == [(5000, True), (300, True)]


def test_a_class_that_quantizes_as_its_base_is_cut_as_that_is():
    assert len(row_pieces(RenamedGPTQ(), QKV, 64, 128)) == len(row_pieces(GPTQ(), QKV, 64, 128)) > 1


def test_the_tile_follows_from_the_kind_of_device_and_the_width():
    tiles = [row_tile("cpu", size) for size in (64, 4096, 8192, 28672)]
    assert tiles == [CPU_TILE[1], CPU_TILE[1], CPU_TILE[1] // 2, CPU_TILE[0]]
    assert row_tile(torch.device("cuda", 1), 28672) == CUDA_TILE


@pytest.mark.parametrize("quantizer", [GPTQ(), GPTQ(mse=True), RTN(), RTN(mse=True), WholeLayers()])
@pytest.mark.parametrize("qep", [None, QEPConfig()])
def test_costs_grow_with_rows_and_columns(quantizer, qep):
    def cost(rows: int, columns: int) -> float:
        [piece] = row_pieces(quantizer, {"layer": rows}, columns, 4096)
        return piece_cost(quantizer, piece, qep)

    assert 0 < cost(200, 512) < cost(400, 512) < cost(400, 1024)


def test_costs_follow_the_work_that_is_done():
    def cost(quantizer: Quantizer, qep: QEPConfig | None, name: str = "q_proj") -> float:
        [piece] = row_pieces(quantizer, {name: 512}, 512, 4096)
        return piece_cost(quantizer, piece, qep)

    assert cost(GPTQ(), None) < cost(GPTQ(mse=True), None)
    assert cost(GPTQ(), None) == cost(GPTQ(), QEPConfig(), "mlp.down_proj")
    assert cost(GPTQ(), None) < cost(GPTQ(), QEPConfig())
    assert cost(RTN(), None) == cost(RTN(), QEPConfig())
    assert prepare_cost(RTN(), 512, QEPConfig()) == 0
    once = prepare_cost(GPTQ(), 512, None)
    assert prepare_cost(GPTQ(), 512, QEPConfig()) == once > 0
    assert prepare_cost(GPTQ(), 512, QEPConfig(percdamp=0.5)) == 2 * once


@dataclass(eq=False)
class WithNotes(QuantizationResult):
    notes: torch.Tensor | None = None


def test_a_result_whose_rows_cannot_be_told_is_not_joined():
    parts = [WithNotes(torch.ones(2, 3), notes=torch.full((2,), value)) for value in (1.0, 2.0)]
    with pytest.raises(ValueError, match=r"^WithNotes\.notes differs .* from row_dims\(\)\.$"):
        QuantizationResult.join(parts)
    joined = QuantizationResult.join(parts[:1] * 2)
    assert joined.dequantized_weight.shape == (4, 3)
    assert torch.equal(joined.notes, parts[0].notes)
