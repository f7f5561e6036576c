"""A group that is cut into pieces is the group that is not, whoever solves what and when."""

import mmap
import pickle
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest
import torch
from driver_process import FORKSERVER
from torch import Tensor, nn

from onecomp.errors import LayerError
from onecomp.jobs import (
    PieceResult,
    PreparedGroup,
    join_pieces,
    prepare_group,
    quantize_group,
    quantize_piece,
)
from onecomp.linalg import HessianFactor
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN, QuantizationResult, Quantizer
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.pieces import RowPiece, row_pieces, row_tile
from onecomp.statistics import GroupStatistics

SIZE = 48
TILE = 128
SHAPES = {"a.q_proj": 300, "a.mlp.up_proj": 130, "a.mlp.down_proj": 260, "a.one_row": 1}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(shapes: dict[str, int], size: int = SIZE) -> dict[str, Tensor]:
    return {name: draw(rows, size, seed=i) for i, (name, rows) in enumerate(shapes.items())}


def sums(size: int = SIZE, num_tokens: int = 400) -> GroupStatistics:
    rows = draw(num_tokens, size, seed=7) @ draw(size, size, seed=8)
    return GroupStatistics.of(rows, rows + draw(num_tokens, size, seed=9))


METHODS: dict[str, tuple[Quantizer, QEPConfig | None]] = {
    "sym": (GPTQ(groupsize=16), None),
    "asym": (GPTQ(groupsize=16, sym=False), None),
    "searched": (GPTQ(groupsize=16, mse=True, q_grid=50, actorder=True), None),
    "weighted": (GPTQ(groupsize=16, mse=True, q_grid=50, weighted_mse=True), QEPConfig()),
    "ordered": (GPTQ(groupsize=16, actorder=True), QEPConfig()),
    "static": (GPTQ(groupsize=16, actorder=True, static_groups=True), QEPConfig()),
    "one group a row": (GPTQ(wbits=3, actorder=True), QEPConfig(percdamp=0.1)),
    "mixed bits": (
        GPTQ(groupsize=16, mlp_wbits=2, mlp_groupsize=-1, module_wbits={"a.q_proj": 8}),
        QEPConfig(),
    ),
    "measured": (GPTQ(groupsize=16, calc_quant_error=True), QEPConfig()),
    "guarded": (GPTQ(wbits=2, percdamp=100.0), None),
    "rounded": (RTN(groupsize=16), None),
    "rounded and measured": (RTN(mse=True, grid=20, calc_quant_error=True), None),
}


@dataclass(frozen=True)
class Work:
    """A group, ready to be solved piece by piece."""

    quantizer: Quantizer
    qep: QEPConfig | None
    weights: dict[str, Tensor]
    prepared: PreparedGroup
    pieces: list[RowPiece]

    @classmethod
    def of(cls, method: str, tile: int = TILE) -> "Work":
        quantizer, qep = METHODS[method]
        prepared = prepare_group(quantizer, sums(), qep, list(SHAPES), SIZE)
        pieces = row_pieces(quantizer, SHAPES, SIZE, tile)
        return cls(quantizer, qep, weights_of(SHAPES), prepared, pieces)

    def solve(self, piece: RowPiece) -> PieceResult:
        rows = piece.rows_of(self.weights)
        return quantize_piece(self.quantizer, piece, rows, self.prepared, self.qep)

    def whole(self) -> tuple[dict[str, QuantizationResult], list[str]]:
        return quantize_group(self.quantizer, self.weights, sums(), self.qep, tile=TILE)


def sent(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


def solve_elsewhere(pickled: bytes) -> bytes:
    work, index = pickle.loads(pickled)
    return pickle.dumps(work.solve(work.pieces[index]))


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor below dataclasses, dicts and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def assert_same(
    found: tuple[dict[str, QuantizationResult], list[str]],
    expected: tuple[dict[str, QuantizationResult], list[str]],
) -> None:
    assert found[1] == expected[1]
    assert list(found[0]) == list(expected[0])
    for name, result in expected[0].items():
        other = found[0][name]
        assert type(other) is type(result)
        assert {**other.values(), "quantization_time": 0} == {
            **result.values(),
            "quantization_time": 0,
        }
        assert other.tensors().keys() == result.tensors().keys()
        for key, tensor in result.tensors().items():
            assert other.tensors()[key].dtype == tensor.dtype
            assert torch.equal(other.tensors()[key], tensor), f"{name} {key}"
            assert other.tensors()[key].is_contiguous()


@pytest.mark.parametrize("method", METHODS)
def test_pieces_solved_anywhere_in_any_order_are_the_group(method):
    """Every piece by a worker of its own, which got everything pickled."""
    work = Work.of(method)
    assert len(work.pieces) > 3
    indices = [piece.index for piece in work.pieces]
    random.Random(0).shuffle(indices)
    results = [sent(sent(work).solve(work.pieces[i])) for i in indices]
    assert_same(join_pieces(list(SHAPES), results), work.whole())


def test_pieces_solved_by_another_process_are_the_group():
    """Half of them by one that was started anew."""
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:
        for method in ("searched", "mixed bits", "measured", "rounded"):
            work = Work.of(method)
            half = len(work.pieces) // 2
            there = pool.map(solve_elsewhere, [pickle.dumps((work, i)) for i in range(half)])
            here = [work.solve(piece) for piece in reversed(work.pieces[half:])]
            results = [*here, *map(pickle.loads, there)]
            assert_same(join_pieces(list(SHAPES), results), work.whole())


@pytest.mark.parametrize("method", METHODS)
def test_a_group_in_pieces_is_as_good_as_whole(method):
    """Pieces of 100 rows and more change no bit here, but for sums over rows."""
    work = Work.of(method)
    pieces, lines = work.whole()
    whole, whole_lines = quantize_group(work.quantizer, work.weights, sums(), work.qep, tile=4096)
    assert lines == whole_lines
    for name, result in whole.items():
        assert torch.equal(pieces[name].dequantize(), result.dequantize())
        found = pieces[name].get_statistics()
        for key, value in result.get_statistics().items():
            assert (found[key] is None) == (value is None)
            if value is not None and key != "quantization_time":
                assert found[key] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_sent", [False, True])
def test_nothing_that_is_shared_is_written_to(method, is_sent):
    work = Work.of(method)
    if is_sent:
        work = sent(work)
    shared = list(tensors_in([work.weights, work.prepared]))
    assert len(shared) >= len(SHAPES)
    kept = [tensor.clone() for tensor in shared]
    versions = [tensor._version for tensor in shared]
    join_pieces(list(SHAPES), [work.solve(piece) for piece in work.pieces])
    assert [tensor._version for tensor in shared] == versions
    assert all(torch.equal(*pair) for pair in zip(shared, kept, strict=True))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("method", ["searched", "static", "mixed bits", "measured"])
def test_memory_that_cannot_be_written_is_enough(tmp_path, method):
    """What is sent lies in a store that several processes share: who writes to it ends."""
    work = Work.of(method)
    expected = work.whole()

    def protected(tensor: Tensor) -> Tensor:
        return read_only(tensor, tmp_path / "page")

    factors = HessianFactors.__new__(HessianFactors)
    factors.__setstate__(with_tensors(work.prepared.factors.__getstate__(), protected))
    delta = work.prepared.delta
    prepared = PreparedGroup(factors, None if delta is None else protected(delta), 400)
    weights = with_tensors(work.weights, protected)
    work = Work(work.quantizer, work.qep, weights, prepared, work.pieces)
    assert_same(join_pieces(list(SHAPES), [work.solve(p) for p in work.pieces]), expected)


def read_only(tensor: Tensor, path: Path) -> Tensor:
    """A copy in pages of a file that may only be read."""
    path.write_bytes(tensor.numpy().tobytes())
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    path.unlink()
    return torch.frombuffer(pages, dtype=tensor.dtype).reshape(tensor.shape)


def with_tensors(value: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: with_tensors(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(part, change) for part in value)
    return value


def test_what_is_sent_takes_little_more_than_half_of_a_square():
    """But for ``C``, which is not symmetric."""
    size = 512
    statistics = sums(size, num_tokens=600)
    names, matrix_bytes = ["q_proj"], 4 * size**2
    plain = prepare_group(GPTQ(actorder=True), statistics, None, names, size)
    corrected = prepare_group(GPTQ(), statistics, QEPConfig(percdamp=0.1), names, size)
    plain.factors.at(0.01, by_activation=True).unit_upper  # noqa: B018 - a piece was solved before
    assert len(pickle.dumps(plain)) < 2 * 0.65 * matrix_bytes
    assert len(pickle.dumps(corrected)) < (1 + 3 * 0.65) * matrix_bytes
    assert prepare_group(RTN(), None, None, names, size) == PreparedGroup()


@pytest.mark.parametrize("size", [48, 300, 513])
def test_factors_arrive_as_they_were(size):
    hessian = sums(size, num_tokens=2 * size).hessian()
    factors = HessianFactors(hessian, 2 * size)
    made = factors.at(0.01), factors.at(0.01, by_activation=True)
    arrived = sent(factors)
    assert torch.equal(arrived.hessian, hessian)
    assert arrived.num_tokens == 2 * size
    there = arrived.at(0.01), arrived.at(0.01, by_activation=True)
    assert there[0].order is None
    assert torch.equal(there[1].order, torch.argsort(hessian.diagonal(), descending=True))
    for factor, original in zip(there, made, strict=True):
        assert torch.equal(factor.upper, original.upper)
        assert torch.equal(factor.unit_upper, original.unit_upper)


def indefinite(size: int = SIZE) -> GroupStatistics:
    gram = torch.diag(torch.tensor([-100.0, *[1.0] * (size - 1)]))
    return GroupStatistics(2, [gram], draw(size, size))


@pytest.mark.parametrize("qep", [None, QEPConfig(), QEPConfig(percdamp=0.1)])
@pytest.mark.parametrize("is_sent", [False, True])
def test_the_ladder_is_climbed_before_the_pieces(monkeypatch, qep, is_sent):
    """Each damping once, whether there is a factor in the end or not."""
    climbed, make = [], HessianFactor.of

    def counted(hessian: Tensor, *, percdamp: float, **options: object) -> HessianFactor:
        climbed.append(percdamp)
        return make(hessian, percdamp=percdamp, **options)

    monkeypatch.setattr(HessianFactor, "of", counted)
    for statistics, rungs in [(sums(), 1), (indefinite(), 5)]:
        climbed.clear()
        prepared = prepare_group(GPTQ(), statistics, qep, list(SHAPES), SIZE)
        assert len(climbed) == rungs * len({0.01, 0.01 if qep is None else qep.percdamp})
        weights = weights_of(SHAPES)
        climbed.clear()
        for piece in row_pieces(GPTQ(), SHAPES, SIZE, TILE):
            shared = sent(prepared) if is_sent else prepared
            quantize_piece(GPTQ(), piece, piece.rows_of(weights), shared, qep)
        assert climbed == []


def test_what_was_done_otherwise_is_told_once():
    _, rounded = Work.of("guarded").whole()
    assert len(rounded) == 1
    assert rounded[0].startswith("round to nearest: ")
    assert rounded[0].endswith(f" of {sum(SHAPES.values())} rows")
    weights = weights_of(SHAPES)
    _, lines = quantize_group(GPTQ(), weights, indefinite(), QEPConfig(), tile=TILE)
    assert [line.split(" with ")[0] for line in lines] == [
        "weights not corrected: The Hessian is not positive definite",
        "round to nearest: The Hessian is not positive definite",
    ]
    _, lines = quantize_group(GPTQ(), weights, None, None, tile=TILE)
    assert lines == ["round to nearest: no calibration token reached it"]


def test_rounded_rows_are_those_of_all_pieces():
    work = Work.of("guarded")
    parts = [work.solve(piece) for piece in work.pieces]
    _, [line] = join_pieces(list(SHAPES), parts)
    assert sum(part.rounded_rows[""] > 0 for part in parts) > 1
    num_rounded = sum(part.rounded_rows[""] for part in parts)
    assert line == f"round to nearest: {num_rounded} of {sum(SHAPES.values())} rows"


def test_the_time_of_a_layer_is_its_share_of_its_pieces():
    work = Work.of("sym")
    parts = [work.solve(piece) for piece in work.pieces]
    results, _ = join_pieces(list(SHAPES), parts)
    for part in parts:
        times = [
            result.quantization_time / part.piece.share(n) for n, result in part.results.items()
        ]
        assert times == pytest.approx([times[0]] * len(times))
        assert 0 < times[0] <= part.seconds
    for name, result in results.items():
        times = [p.results[name].quantization_time for p in parts if name in p.results]
        assert result.quantization_time == pytest.approx(sum(times))
    assert all(result.quantization_time > 0 for result in results.values())


def test_a_missing_piece_and_one_that_came_twice_are_noticed():
    work = Work.of("rounded")
    parts = [work.solve(piece) for piece in work.pieces]
    for wrong in (parts[:-1], [*parts, parts[0]]):
        with pytest.raises(AssertionError, match="are not all pieces, each once"):
            join_pieces(list(SHAPES), wrong)


def test_a_piece_names_the_rows_that_are_not_finite():
    weights = {"layer": draw(300, 8)}
    weights["layer"][200:202, 3] = torch.inf
    message = "^layer: rows 144 to 299 of its weight hold 2 NaN or infinite values of 1248. The ch"
    with pytest.raises(LayerError, match=message):
        quantize_group(RTN(), weights, None, None, tile=TILE)


@pytest.mark.parametrize("method", ["searched", "one group a row", "rounded"])
def test_a_tall_layer_by_itself_is_what_a_run_makes_of_it(method):
    """Both are cut into pieces: 2500 rows are more than a tile."""
    quantizer, _ = METHODS[method]
    weight, statistics = draw(2500, SIZE), sums()
    results, _ = quantize_group(quantizer, {"layer": weight}, statistics, None)
    assert len(row_pieces(quantizer, {"layer": 2500}, SIZE, row_tile("cpu", SIZE))) == 2
    module = nn.Linear(SIZE, 2500, bias=False).requires_grad_(requires_grad=False)
    module.weight.copy_(weight)
    alone = quantizer.quantize_layer(module, None, statistics.hessian())
    for key, tensor in alone.tensors().items():
        assert torch.equal(results["layer"].tensors()[key], tensor)


@pytest.mark.parametrize("actorder", [False, True])
def test_a_layer_of_one_row_has_the_error_that_is_told(actorder):
    weight, statistics = draw(1, SIZE), sums()
    before, quantizer = weight.clone(), GPTQ(wbits=2, actorder=actorder)
    results, _ = quantize_group(quantizer, {"layer": weight}, statistics, None)
    assert torch.equal(weight, before)
    off = weight - results["layer"].dequantize()
    hessian = statistics.hessian()
    expected = ((off @ hessian @ off.T) / (weight @ hessian @ weight.T)).item()
    found = results["layer"].relative_output_squared_error
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 0


class Named(Quantizer):
    """A user's method that asks for its layer's name while other threads use it, too."""

    def quantize_layer(self, module, input=None, hessian=None):  # noqa: A002
        time.sleep(0.01)
        return torch.full_like(module.weight, float(self.module_to_name[module]))


def test_threads_share_a_quantizer():
    quantizer = Named()

    def value(number: int) -> float:
        results, _ = quantize_group(quantizer, {str(number): draw(2, 3)}, None, None)
        return results[str(number)].dequantize().max().item()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(value, range(12))) == [float(number) for number in range(12)]
