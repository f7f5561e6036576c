"""JointQ's settings, and how it treats layers that share an input."""

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.export.quant_config import LayerFormat, gptq_format, gptq_quant_config
from onecomp.linalg import HessianFactor
from onecomp.quantizer.baseline import nearest_weight
from onecomp.quantizer.checks import as_number, is_whole, whole_problems
from onecomp.quantizer.factors import FactorKey, HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.gptq import GPTQ
from onecomp.quantizer.grid import GridSearch
from onecomp.quantizer.jointq.algorithm import Effort
from onecomp.quantizer.jointq.lambda_path import Falling, LambdaPath, Rising, RowSolver
from onecomp.quantizer.jointq.perturbation import Perturbation
from onecomp.quantizer.jointq.problem import Kept, Problem, damped, regularizer
from onecomp.quantizer.jointq.result import JointQResult
from onecomp.quantizer.jointq.starts import GPTQStart, Starts, in_group_order
from onecomp.quantizer.layer_settings import fitting_sizes, group_problems, stored_bits
from onecomp.quantizer.pieces import even_cuts, row_tile

FIXED, INCREMENTAL = "fixed_lambda", "incremental_lambda"
MODES = ("identity", "diagonal")
ROWS_AT_ONCE = 1024
"""Rows that are solved together where memory matters; calls take too long on fewer."""
MOST_ROWS = 1024
"""Rows that iterated local search takes by default."""
COLUMN_COST, WEIGHT_COST = 15, 10_000
"""Multiplications of a product that take as long as a restart for one weight, by column and beside
them; measured on a CPU."""
CALLS_COST = 4_000_000
"""The same for the calls that a column costs in a restart, however many rows there are."""
LAMBDAS = (0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass
class JointQ(WeightQuantizer):
    """Joint optimization of codes and scales, row by row; saved in GPTQ's layout.

    The method of Fujitsu's OneComp. Results have ``bits``-bit codes on one grid per group, as GPTQ
    has them, with a lower output error, for several times GPTQ's time.

    ``regularization_lambda`` is a fraction of the mean squared input: it means the same for any
    number of tokens and any scale of the inputs. The options behind ``gptq`` are additions.

    Example:
        >>> JointQ(bits=3, group_size=64).name
        'JointQ_3bit_gs64'
    """

    row_separable: ClassVar[bool] = True
    flag_calibration: bool = True
    flag_hessian: bool = True
    bits: int = 4
    """Bits per weight, 1 to 7, or 8 with ``symmetric``: codes are int8."""
    symmetric: bool = False
    """Zero point fixed in the middle of the codes."""
    group_size: int | None = 128
    """Columns that share a scale, a divisor of ``in_features``; None for a whole row."""
    log_level: int = 0
    """Accepted for compatibility: progress is the driver's to report."""
    device: str | torch.device | None = None
    """Accepted for compatibility: layers are solved where their weights are."""
    regularization_lambda: float = 0.1
    """Strength with ``fixed_lambda``, at least 0."""
    regularization_mode: str = "diagonal"
    """``"identity"`` for the same in every column, or ``"diagonal"``: more for active columns."""
    regularization_gamma: float = 0.5
    """Exponent of a column's activity with ``"diagonal"``, 0 to 1."""
    lambda_mode: str = FIXED
    """``"fixed_lambda"``, or ``"incremental_lambda"``: each row takes the largest of
    ``lambda_list`` that its outputs bear. Works with both regularization modes."""
    lambda_list: list[float] = field(default_factory=lambda: list(LAMBDAS))
    """Rising strengths of ``incremental_lambda``."""
    incremental_eps_y: float = 0.03
    """Relative growth of the output error that a step may cost."""
    incremental_eps_w: float = 0.10
    """Relative fall of the weight error that it must then bring."""
    incremental_initial_skip_ew_threshold: float = 0.3
    """Relative weight error above which a row takes the next strength in any case."""
    actorder: bool = False
    """Groups of columns in order of falling activation."""
    ils_enabled: bool = False
    """Iterated local search of the worst rows, at several times the cost."""
    ils_num_iterations: int = 10
    ils_num_clones: int = 8
    """Copies of a row, each changed at random."""
    ils_num_channels: int | None = None
    """Most rows, of those solved together; None for 1024."""
    enable_clip_optimize: bool = True
    """Start also from plain grids and a local search in each group."""
    enable_clip_optimize_ep: bool = False
    """The same with errors propagated to later groups."""
    enable_gptq: bool = True
    """Start also from GPTQ."""
    gptq: GPTQ | None = None
    """How GPTQ solves; its bits, group size and symmetry are not used. None for a range search
    weighted by activation, and columns solved in order of activation."""
    _: KW_ONLY
    num_restarts: int = 2
    """How often GPTQ solves again on the scales found; each costs a third of the default's time."""
    regularization_largest_loss: float = 0.05
    """Share of the output error of a row's start that ``fixed_lambda`` may add to it; rows that
    would lose more are regularized a tenth as much, or not at all."""

    def default_name(self) -> str:
        """Name from bits and group size."""
        groups = "perchannel" if self.group_size is None else f"gs{self.group_size}"
        return f"JointQ_{self.bits}bit_{groups}"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = []
        most = 8 if self.symmetric else 7
        if not is_whole(self.bits, 1, most):
            problems.append(
                f"bits={self.bits!r}: must be a whole number from 1 to {most} with "
                f"symmetric={self.symmetric!r}, as codes are int8."
            )
        if self.group_size is not None and not is_whole(self.group_size, 1):
            problems.append(
                f"group_size={self.group_size!r}: must be None (one group a row) or at least 1."
            )
        return problems + self._regularization_problems() + self._search_problems()

    def _regularization_problems(self) -> list[str]:
        problems = []
        if self.regularization_mode not in MODES:
            problems.append(
                f"regularization_mode={self.regularization_mode!r}: must be one of {MODES}."
            )
        if not 0 <= as_number(self.regularization_gamma) <= 1:
            problems.append(
                f"regularization_gamma={self.regularization_gamma!r}: must be from 0 to 1."
            )
        if self.lambda_mode not in (FIXED, INCREMENTAL):
            problems.append(
                f"lambda_mode={self.lambda_mode!r}: must be {FIXED!r} or {INCREMENTAL!r}."
            )
        is_list = isinstance(self.lambda_list, list | tuple)
        steps = [as_number(value) for value in self.lambda_list] if is_list else []
        if not steps or not all(
            low < high for low, high in zip([-1e-9, *steps], steps, strict=False)
        ):
            problems.append(
                f"lambda_list={self.lambda_list!r}: must be rising numbers, the first at least 0."
            )
        shares = {
            "regularization_lambda": self.regularization_lambda,
            "incremental_eps_y": self.incremental_eps_y,
            "incremental_eps_w": self.incremental_eps_w,
            "incremental_initial_skip_ew_threshold": self.incremental_initial_skip_ew_threshold,
            "regularization_largest_loss": self.regularization_largest_loss,
        }
        return problems + [
            f"{name}={value!r}: must be at least 0."
            for name, value in shares.items()
            if not as_number(value) >= 0
        ]

    def _search_problems(self) -> list[str]:
        counts = {
            "ils_num_iterations": self.ils_num_iterations,
            "ils_num_clones": self.ils_num_clones,
            "ils_num_channels": self._most_rows(),
        }
        problems = whole_problems(counts, 1)
        problems += whole_problems({"num_restarts": self.num_restarts}, 0)
        if self.gptq is not None and not isinstance(self.gptq, GPTQ):
            problems.append(f"gptq={self.gptq!r}: must be a GPTQ, or None for the default.")
        return problems

    def layer_problems(self, layer_name: str, in_features: int, out_features: int) -> list[str]:
        """Group sizes have to divide ``in_features``."""
        size = -1 if self.group_size is None else self.group_size
        remedy = fitting_sizes("group_size", in_features, None)
        return group_problems("group_size", size, layer_name, in_features, remedy)

    def bits_per_weight(
        self,
        layer_name: str,
        in_features: int,
        out_features: int,
        *,
        wbits: int | float | None = None,
    ) -> float:
        """Codes, scales and zero points of a checkpoint; the order of ``actorder`` is left out."""
        size = -1 if self.group_size is None else self.group_size
        return stored_bits(wbits or self.bits, size, in_features)

    def baseline(self, layer_name: str, weight: Float[Tensor, "_ in"]) -> Float[Tensor, "_ in"]:
        """Round to nearest on plain grids."""
        size = -1 if self.group_size is None else self.group_size
        return nearest_weight(weight, wbits=self.bits, groupsize=size, sym=self.symmetric)

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """GPTQ's, and one as damped as the objective is regularized, to solve again with."""
        if not self.enable_gptq:
            return ()
        gptq = self._gptq()
        dampings = sorted({gptq.percdamp, max(gptq.percdamp, self._path().lambdas[0])})
        by_activation = self.actorder or gptq.actorder
        return tuple(FactorKey(damping, by_activation) for damping in dampings)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Calls, products and work on each weight, once for the starts and for each restart.

        Where one strength is enough, as for most rows of a model with ``fixed_lambda``. Of rising
        strengths about half are tried; a round of iterated local search takes a third of a restart
        for every clone.
        """
        rounds = self.num_restarts + 1.0
        if self.ils_enabled:
            rows = min(num_rows, self._most_rows())
            rounds += self.ils_num_iterations * self.ils_num_clones * rows / num_rows / 3
        if self.lambda_mode == INCREMENTAL:
            rounds *= max(1.0, len(self.lambda_list) / 2)
        by_weight = COLUMN_COST * in_features + WEIGHT_COST
        calls = -(-num_rows // ROWS_AT_ONCE) * CALLS_COST
        return float(rounds * in_features * (num_rows * by_weight + calls))

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, JointQResult]:
        """Quantize layers that share an input; their rows are solved together."""
        inputs = self._inputs(factors)
        starts = self._gptq_starts(inputs, factors)
        sizes = [len(weight) for weight in weights.values()]
        solved = [
            self._solve(_rows_between(weights.values(), *cut), inputs, starts)
            for cut in self._cuts(sum(sizes), inputs.hessian)
        ]
        states, lambdas = zip(*solved, strict=True)
        parts = Kept.join(states).split(sizes)
        accepted = torch.cat(lambdas).split(sizes)
        return {
            name: self._result(kept, rows, inputs.order)
            for name, kept, rows in zip(weights, parts, accepted, strict=True)
        }

    def _cuts(self, num_rows: int, hessian: Tensor) -> list[tuple[int, int]]:
        """Rows that are solved at once: few enough for the memory, enough to outweigh the calls.

        Iterated local search compares more of them, as its settings count in those.
        """
        tile = row_tile(hessian.device, len(hessian))
        if not self.ils_enabled:
            tile = min(tile, max(ROWS_AT_ONCE, (num_rows + len(hessian)) // 2))
        return even_cuts(num_rows, tile)

    def _inputs(self, factors: HessianFactors) -> "_Inputs":
        hessian, order = factors.hessian, None
        if self.actorder:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
            hessian = hessian[order][:, order]
        added = regularizer(hessian, self.regularization_mode, self.regularization_gamma)
        return _Inputs(hessian, added, order)

    def _gptq_starts(self, inputs: "_Inputs", factors: HessianFactors) -> dict[float, GPTQStart]:
        """GPTQ by damping, rising; none where the Hessian cannot be factored."""
        starts = {}
        for key in self.factor_keys():
            try:
                factor = factors.at(key.percdamp, key.by_activation)
            except QuantizationError as error:
                factors.fallbacks.append(f"no start from GPTQ: {error}")
                continue
            factor = in_group_order(factor) if self.actorder else factor
            starts[key.percdamp] = self._gptq_start(factor, inputs)
        return starts

    def _gptq(self) -> GPTQ:
        if self.gptq is not None:
            return self.gptq
        return GPTQ(mse=True, weighted_mse=True, actorder=True, static_groups=True)

    def _gptq_start(self, factor: HessianFactor, inputs: "_Inputs") -> GPTQStart:
        gptq = self._gptq()
        return GPTQStart(
            factor=factor,
            importance=inputs.hessian.diagonal().sqrt() if gptq.weighted_mse else None,
            search=GridSearch(gptq.q_grid, gptq.q_norm) if gptq.mse else None,
            live=not gptq.static_groups,
            blocksize=gptq.blocksize,
        )

    def _effort(self) -> Effort:
        perturbation = None
        if self.ils_enabled:
            perturbation = Perturbation(
                self.ils_num_iterations, self.ils_num_clones, self._most_rows()
            )
        return Effort(self.num_restarts, perturbation)

    def _most_rows(self) -> int:
        return MOST_ROWS if self.ils_num_channels is None else self.ils_num_channels

    def _path(self) -> LambdaPath:
        if self.lambda_mode == FIXED:
            return Falling.of(self.regularization_lambda, self.regularization_largest_loss)
        return Rising(
            tuple(self.lambda_list),
            self.incremental_eps_y,
            self.incremental_eps_w,
            self.incremental_initial_skip_ew_threshold,
        )

    def _solve(
        self, weight: Float[Tensor, "out in"], inputs: "_Inputs", gptq: Mapping[float, GPTQStart]
    ) -> tuple[Kept, Float[Tensor, "out"]]:
        """Solution of rows, and the strength of regularization that each was solved with."""
        plain = next(iter(gptq.values()), None)
        solver = RowSolver(
            problem_at=lambda columns, strength: Problem(
                columns=columns,
                gram=damped(inputs.hessian, strength * inputs.added),
                groupsize=self.group_size or len(columns),
                wbits=self.bits,
                symmetric=self.symmetric,
            ),
            hessian=inputs.hessian,
            starts=Starts(self.enable_clip_optimize, self.enable_clip_optimize_ep, plain),
            gptq_at=lambda strength: gptq.get(strength, plain),
            effort=self._effort(),
        )
        columns = weight.T if inputs.order is None else weight.T[inputs.order]
        return solver.along(columns.contiguous(), self._path())

    def _result(self, kept: Kept, lambdas: Tensor, order: Tensor | None) -> JointQResult:
        num_groups, out_features = kept.scale.shape
        zero_point = kept.zero_point
        if self.symmetric:  # codes count from the middle of the range, which is their zero
            zero_point = torch.zeros_like(zero_point)
        steps = kept.steps.view(num_groups, -1, out_features)
        codes = steps + zero_point.to(torch.int8)[:, None]
        return JointQResult(
            bits=self.bits,
            symmetric=self.symmetric,
            group_size=self.group_size,
            scale=kept.scale.T.to("cpu", torch.float64).contiguous(),
            zero_point=zero_point.T.to("cpu", torch.int8).contiguous(),
            assignment=codes.permute(2, 0, 1).to("cpu", torch.int8).contiguous(),
            perm=None if order is None else order.cpu(),
            accepted_lambda=lambdas.cpu(),
        )

    def get_quant_config(self) -> dict:
        """Top level of a GPTQ v1 checkpoint's ``quantization_config``."""
        return gptq_quant_config(
            wbits=self.bits,
            groupsize=-1 if self.group_size is None else self.group_size,
            actorder=self.actorder and self.group_size is not None,
            sym=self.symmetric,
        )

    def layer_format(self, layer_name: str) -> LayerFormat:
        """GPTQ's layout."""
        return gptq_format(self.bits, -1 if self.group_size is None else self.group_size)


def _rows_between(
    weights: Iterable[Float[Tensor, "_ in"]], start: int, stop: int
) -> Float[Tensor, "_ in"]:
    """Rows of weights that lie on top of each other; nothing else is copied."""
    parts, top = [], 0
    for weight in weights:
        parts.append(weight[max(start - top, 0) : max(stop - top, 0)])
        top += len(weight)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class _Inputs:
    """What is known of the inputs that the layers share."""

    hessian: Float[Tensor, "in in"]
    """In the order in which columns form groups."""
    added: Float[Tensor, "in"]
    """What lambda = 1 adds to its diagonal."""
    order: Tensor | None
    """That order; None for the layer's own."""
