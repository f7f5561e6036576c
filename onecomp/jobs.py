"""Quantizing one input group: prepared once, solved in pieces of rows wherever they run, joined."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import LayerError, QuantizationError
from onecomp.linalg import all_finite, one_thread, quadratic_form
from onecomp.models.layout import InputGroup
from onecomp.qep.config import QEPConfig
from onecomp.qep.correction import corrected_weight
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.errors_of import RowErrors, output_errors
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.pieces import RowPiece, piece_cost, prepare_cost, row_pieces, row_tile
from onecomp.quantizer.result import QuantizationResult
from onecomp.schedule import GroupCost, is_worth_splitting
from onecomp.statistics import GroupStatistics

NOT_WORSE = 1 + 1e-4
"""Up to this multiple of plain rounding's error a layer is as good: sums have last bits."""


@dataclass(frozen=True)
class GroupReceipt:
    """What the driver learns of a finished group: numbers only."""

    layers: dict[str, dict[str, float | None]]
    """Error fields by layer name."""
    fallbacks: list[str]
    num_tokens: int
    seconds: float
    worker: int
    received_bytes: int


@dataclass(frozen=True)
class PreparedGroup:
    """What the pieces of a group share; it may be sent, and is never written to."""

    factors: HessianFactors | None = None
    """With every factor made that the pieces need; None where they need no Hessian."""
    delta: Float[Tensor, "in in"] | None = None
    """``C`` of error propagation; None where nothing is corrected."""
    num_tokens: int = 0
    """Tokens that the sums are over."""

    @property
    def fallbacks(self) -> list[str]:
        """What had to be done other than asked, in words."""
        return [] if self.factors is None else self.factors.fallbacks

    def to(self, device: torch.device | str) -> "PreparedGroup":
        """The same on the device of the weights; once, not for each piece."""
        return replace(
            self,
            factors=None if self.factors is None else self.factors.to(device),
            delta=None if self.delta is None else self.delta.to(device),
        )


@dataclass(frozen=True)
class Preparation:
    """Numbers about a ``PreparedGroup``, for whoever joins its pieces."""

    num_tokens: int
    seconds: float
    received_bytes: int


@dataclass(frozen=True)
class PieceResult:
    """A piece that was solved, on the CPU."""

    piece: RowPiece
    results: dict[str, QuantizationResult]
    """Of the piece's rows, by layer name; behind the name of the method where there are several."""
    errors: dict[str, RowErrors]
    fallbacks: list[str]
    """Those of the preparation first."""
    rounded_rows: dict[str, int]
    """By method, what the names of its results begin with."""
    seconds: float

    def map_results(
        self, change: Callable[[QuantizationResult], QuantizationResult]
    ) -> "PieceResult":
        """The same with every result changed."""
        return replace(self, results={name: change(r) for name, r in self.results.items()})


def block_events(block_index: int, receipts: Sequence[GroupReceipt]) -> list[dict]:
    """What the journal is to have of a block: one event for each group, and one for the block."""
    groups = [
        {"event": "group", "block": block_index, "group": index, **asdict(receipt)}
        for index, receipt in enumerate(receipts)
    ]
    return [
        *groups,
        {
            "event": "block",
            "block": block_index,
            "output_error": mean_output_error(receipts),
            "bytes_moved": sum(receipt.received_bytes for receipt in receipts),
        },
    ]


def mean_output_error(receipts: Sequence[GroupReceipt]) -> float | None:
    """Mean relative squared output error over layers that have one."""
    errors = [
        numbers["relative_output_squared_error"]
        for receipt in receipts
        for numbers in receipt.layers.values()
        if "relative_output_squared_error" in numbers
    ]
    return sum(errors) / len(errors) if errors else None


def group_pieces(quantizer: Quantizer, group: InputGroup, device_type: str) -> list[RowPiece]:
    """The pieces of a group of a model; the driver and all workers cut alike.

    Args:
        quantizer: Says whether rows are independent, and which layers may share a piece.
        group: Names and shapes of the layers.
        device_type: ``cpu`` or ``cuda``, of all workers.
    """
    out_features = dict(zip(group.layer_names, group.out_features, strict=True))
    return row_pieces(
        quantizer, out_features, group.in_features, row_tile(device_type, group.in_features)
    )


def group_cost(
    quantizer: Quantizer, group: InputGroup, qep: QEPConfig | None, device_type: str
) -> GroupCost:
    """What a group takes, for who decides where it is quantized.

    Args:
        quantizer: Method and settings.
        group: Names and shapes of the layers.
        qep: How weights are corrected.
        device_type: ``cpu`` or ``cuda``, of all workers.
    """
    corrected = qep is not None and any(map(qep.corrects, group.layer_names))
    pieces = tuple(
        piece_cost(quantizer, piece, qep) for piece in group_pieces(quantizer, group, device_type)
    )
    if not is_worth_splitting(group, device_type, corrected=corrected):
        pieces = (sum(pieces),)
    return GroupCost(prepare_cost(quantizer, group.in_features, qep, device_type), pieces)


def quantize_group(
    quantizer: Quantizer,
    weights: Mapping[str, Float[Tensor, "out in"]],
    statistics: GroupStatistics | None,
    qep: QEPConfig | None,
    *,
    tile: int | None = None,
) -> tuple[dict[str, QuantizationResult], list[str]]:
    """Quantize layers that share an input, all pieces one after the other.

    Args:
        quantizer: Method and settings.
        weights: Float32 weights by full layer name.
        statistics: Sums over the group's inputs; None for methods that need none.
        qep: Corrects the weights first where the statistics allow it.
        tile: Most rows of a piece; None for what ``row_tile`` says.

    Returns:
        Results by layer name, and what had to be done other than asked, in words.

    Raises:
        LayerError: Weights or inputs that are not finite, or arithmetic that failed for good.
    """
    first = next(iter(weights.values()))
    prepared = prepare_group(
        quantizer, statistics, qep, list(weights), first.shape[1], device=first.device
    )
    out_features = {name: len(weight) for name, weight in weights.items()}
    tile = tile or row_tile(first.device, first.shape[1])
    pieces = row_pieces(quantizer, out_features, first.shape[1], tile)
    return join_pieces(
        list(weights),
        [quantize_piece(quantizer, p, p.rows_of(weights), prepared, qep) for p in pieces],
    )


def prepare_group(
    quantizer: Quantizer,
    statistics: GroupStatistics | None,
    qep: QEPConfig | None,
    layer_names: Sequence[str],
    in_features: int,
    *,
    device: torch.device | str = "cpu",
) -> PreparedGroup:
    """Make what all pieces need, on one thread: the Hessian and its factors, ladder climbed.

    Args:
        quantizer: Method and settings.
        statistics: Sums over the group's inputs; None when no token reached it.
        qep: Whether and how weights are corrected.
        layer_names: Full names, in the order of the group.
        in_features: Columns of each layer.
        device: Where to compute.

    Raises:
        LayerError: Inputs that are not finite.
    """
    if statistics is not None:
        statistics.require_finite(layer_names[0])
    num_tokens = 0 if statistics is None else statistics.num_tokens
    with one_thread(), torch.no_grad():
        if quantizer.flag_hessian:
            factors = _factors(statistics, in_features, device)
            for key in quantizer.factor_keys():
                with suppress(QuantizationError):  # who asks for it again is told at once
                    factors.at(key.percdamp, key.by_activation)
            delta = _delta(statistics, factors, qep, layer_names)
            return PreparedGroup(factors, delta, num_tokens)
        if quantizer.calc_quant_error and statistics is not None:
            return PreparedGroup(HessianFactors(statistics.hessian().to(device)), None, num_tokens)
    return PreparedGroup(num_tokens=num_tokens)


def _factors(
    statistics: GroupStatistics | None, in_features: int, device: torch.device | str
) -> HessianFactors:
    if statistics is None:  # with all inputs alike, second-order methods round to nearest
        reason = "round to nearest: no calibration token reached it"
        return HessianFactors(torch.eye(in_features, device=device), fallbacks=[reason])
    return HessianFactors(statistics.hessian().to(device), statistics.num_tokens)


def _delta(
    statistics: GroupStatistics | None,
    factors: HessianFactors,
    qep: QEPConfig | None,
    layer_names: Sequence[str],
) -> Tensor | None:
    """``C``, with the factor made that the correction divides by; None to correct nothing."""
    if statistics is None or qep is None or not any(map(qep.corrects, layer_names)):
        return None
    delta = statistics.delta()
    if delta is None:
        return None
    try:
        factors.in_any_order(qep.percdamp)
    except QuantizationError as error:
        factors.fallbacks.append(f"weights not corrected: {error}")
        return None
    return delta.to(factors.hessian.device)


def quantize_piece(
    quantizer: Quantizer,
    piece: RowPiece,
    rows: Mapping[str, Float[Tensor, "_ in"]],
    prepared: PreparedGroup,
    qep: QEPConfig | None,
) -> PieceResult:
    """Correct and quantize rows, on one thread, so that the bits are the same anywhere.

    Args:
        quantizer: Method and settings, the same as for ``prepare_group``.
        piece: What is quantized.
        rows: Float32 rows of each layer in it, ``RowPiece.rows_of`` the weights.
        prepared: What the pieces of the group share, on the device of the rows.
        qep: How weights are corrected, where ``prepared`` says that they are.

    Raises:
        LayerError: Weights that are not finite, or arithmetic that failed for good.
    """
    _require_finite(piece, rows)
    started = time.monotonic()
    with one_thread(), torch.no_grad():
        rows = _corrected(rows, prepared, qep)
        solved = [
            _solve(method, prefix, piece, rows, prepared)
            for prefix, method in quantizer.methods().items()
        ]
    return replace(
        solved[0],
        results={name: result for part in solved for name, result in part.results.items()},
        errors={name: errors for part in solved for name, errors in part.errors.items()},
        fallbacks=[*prepared.fallbacks, *(text for part in solved for text in part.fallbacks)],
        rounded_rows={prefix: n for part in solved for prefix, n in part.rounded_rows.items()},
        seconds=time.monotonic() - started,
    )


def _solve(
    method: Quantizer,
    prefix: str,
    piece: RowPiece,
    rows: Mapping[str, Tensor],
    prepared: PreparedGroup,
) -> PieceResult:
    """Rows quantized by one method, whose results' names begin with ``prefix``."""
    started = time.monotonic()
    found = None if prepared.factors is None else prepared.factors.for_piece()
    try:
        results = dict(method.quantize_weights(rows, found if method.flag_hessian else None))
    except QuantizationError as error:
        raise LayerError(piece.ranges[0].layer_name, str(error)) from error
    seconds = time.monotonic() - started
    for name, result in results.items():
        result.quantization_time = seconds * piece.share(name)
    errors = _errors(method, rows, results, prepared, found)
    return PieceResult(
        piece,
        {prefix + name: result for name, result in results.items()},
        {prefix + name: of_layer for name, of_layer in errors.items()},
        fallbacks=[] if found is None else [prefix + text for text in found.fallbacks],
        rounded_rows={prefix: 0 if found is None else found.rounded_rows},
        seconds=seconds,
    )


def _require_finite(piece: RowPiece, rows: Mapping[str, Tensor]) -> None:
    for part in piece.ranges:
        weight = rows[part.layer_name]
        if not all_finite(weight):
            bad = int((~torch.isfinite(weight)).sum())
            verb = "holds" if part.is_whole else "hold"
            raise LayerError(
                part.layer_name,
                f"{part} {verb} {bad} NaN or infinite values of {weight.numel()}. "
                "The checkpoint is damaged, or --dtype is too narrow for it.",
            )


def _corrected(
    rows: Mapping[str, Tensor], prepared: PreparedGroup, qep: QEPConfig | None
) -> dict[str, Tensor]:
    """All rows of a piece are corrected in one product, and taken where a layer is corrected."""
    if prepared.delta is None or qep is None or not any(map(qep.corrects, rows)):
        return dict(rows)
    stacked = torch.cat(list(rows.values()))
    factor = prepared.factors.in_any_order(qep.percdamp)
    corrected = corrected_weight(stacked, prepared.delta, factor, qep.perccorr)
    parts = corrected.split([len(part) for part in rows.values()])
    return {
        name: part if qep.corrects(name) else rows[name]
        for name, part in zip(rows, parts, strict=True)
    }


def _errors(
    quantizer: Quantizer,
    rows: Mapping[str, Tensor],
    results: Mapping[str, QuantizationResult],
    prepared: PreparedGroup,
    found: HessianFactors | None,
) -> dict[str, RowErrors]:
    """All where that was asked for; output errors also where a method uses the Hessian."""
    known = {} if found is None else found.row_errors
    hessian = None if found is None or not prepared.num_tokens else found.hessian
    errors = {}
    for name, result in results.items():
        measured = RowErrors(output=known.get(name))
        if quantizer.calc_quant_error:
            full = RowErrors.of(result, rows[name], hessian, prepared.num_tokens)
            measured = full if full.output is not None else replace(full, output=measured.output)
        elif measured.output is None and hessian is not None:
            measured = RowErrors(output=output_errors(result, rows[name], hessian))
        baseline = _baseline_error(quantizer, name, rows[name], hessian)
        errors[name] = replace(measured, baseline=baseline).cpu()
    return errors


def _baseline_error(
    quantizer: Quantizer, name: str, rows: Tensor, hessian: Tensor | None
) -> Tensor | None:
    """Output error of each row plainly rounded; None where the method is not compared with it."""
    rounded = None if hessian is None else quantizer.baseline(name, rows)
    return None if rounded is None else quadratic_form((rows - rounded).T, hessian)


def join_pieces(
    layer_names: Sequence[str], pieces: Iterable[PieceResult]
) -> tuple[dict[str, QuantizationResult], list[str]]:
    """Put a group together.

    Args:
        layer_names: Full names, in the order of the group.
        pieces: All of them, in any order.

    Returns:
        Results by layer name, and what had to be done other than asked, in words.
    """
    pieces = sorted(pieces, key=lambda part: part.piece.index)
    found = [part.piece.index for part in pieces]
    assert found == list(range(pieces[0].piece.count)), f"{found} are not all pieces, each once"
    fallbacks = list(dict.fromkeys(text for part in pieces for text in part.fallbacks))
    num_rows = sum(part.piece.num_rows for part in pieces)
    results = {}
    for prefix in pieces[0].rounded_rows:
        for name in (prefix + layer_name for layer_name in layer_names):
            results[name], ratio = _join([part for part in pieces if name in part.results], name)
            if ratio is not None and ratio > NOT_WORSE:
                fallbacks.append(
                    f"worse than plain rounding: {ratio:.3g} times its output error ({name})"
                )
        if rounded := sum(part.rounded_rows[prefix] for part in pieces):
            fallbacks.append(f"{prefix}round to nearest: {rounded} of {num_rows} rows")
    return results, fallbacks


def _join(parts: Sequence[PieceResult], name: str) -> tuple[QuantizationResult, float | None]:
    """A whole result, and its output error as a multiple of plain rounding's."""
    result = QuantizationResult.join([part.results[name] for part in parts])
    times = [part.results[name].quantization_time for part in parts]
    result.quantization_time = sum(times)
    errors = [part.errors[name] for part in parts if name in part.errors]
    if not errors:
        return result, None
    joined = RowErrors.join(errors)
    joined.fill(result, parts[0].piece.in_features)
    return result, joined.beside_baseline()
