"""Settings of double binary factorisation, and how it treats layers that share an input."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.export.quant_config import LayerFormat, dbf_format, dbf_quant_config
from onecomp.linalg import all_finite
from onecomp.quantizer.baseline import nearest_weight, sign_mean_weight
from onecomp.quantizer.checks import as_number, is_texts, positive_problems, whole_problems
from onecomp.quantizer.dbf.admm import Search
from onecomp.quantizer.dbf.algorithm import dbf_quantize
from onecomp.quantizer.dbf.coordinates import BALANCE_MODES, Balancing
from onecomp.quantizer.dbf.factors import BinaryFactors
from onecomp.quantizer.dbf.rank import achievable_bits, bits_with_scales, is_clamped, rank_of
from onecomp.quantizer.dbf.result import DBFResult, packed_signs
from onecomp.quantizer.drift import drift_problems
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.layer_settings import setting_of

PLANNED_STEPS = 16
"""Steps of the alternation, where ``iters`` allows so many: the penalty rises within them. More
steps lower the error by little for what they take."""
REFINE_STEPS = 12
"""Steps of the alternation that take as long as refining."""
MOST_BITS = 8
SOLVE_COST = 4.0
"""Products of the shapes of a step that take as long as the step, measured on a CPU."""


@dataclass
class DBF(WeightQuantizer):
    """Double binary factorization (Boža and Macko, 2025, arXiv:2505.11076).

    A weight becomes the product of two matrices of signs with a scale on either side and between
    them, which takes 1 to 2 bits a weight. The number of columns of the first one follows from
    ``target_bits`` and the shape; a layer that is far from square has no room for many bits.

    The error that is minimised is that of the outputs, with and without balancing, for inputs that
    carry noise (``drift_ratio``); balancing sets the coordinates in which the search starts and
    measures its penalty, nothing else.

    Example:
        >>> DBF(target_bits=1.5).name
        'DBF_1.5bit'
    """

    flag_calibration: bool = True
    flag_hessian: bool = True
    target_bits: float = 1.5
    """Bits of signs per weight; the scales add 16 bits for each output, input and column of A."""
    iters: int = 600
    """Most steps of the alternation. It plans 16: the penalty has risen by then, and further steps
    no longer pay."""
    reg: float = 3e-2
    """Damping of each least-squares step, a fraction of the Gram matrix's mean diagonal."""
    use_balancing: bool = True
    """Search in coordinates in which rows and columns have more equal norms."""
    balance_iters: int = 40
    """Most sweeps of balancing."""
    balance_alpha: float = 1.0
    """Norm of a balanced row. It is the unit of measurement only: results do not depend on it."""
    balance_mode: str = "l1"
    """Norm of a row or column, ``"l1"`` or ``"l2"``."""
    use_adaptive_rho: bool = True
    """Change the penalty where primal and dual residual are far apart."""
    mlp_target_bits: float | None = None
    """Bits of layers whose name contains ``mlp``."""
    module_target_bits: dict[str, float] | None = None
    """Bits by full layer name; wins over ``mlp_target_bits``."""
    bitpack_on_quantize: bool = True
    """Keep the signs of results eight to a byte."""
    _: KW_ONLY
    drift_ratio: float = 1.0
    """Energy of what other quantized layers do to each input, relative to the input's own."""

    def default_name(self) -> str:
        """Name from the bits."""
        return f"DBF_{self.target_bits:g}bit"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = []
        if not as_number(self.target_bits) > 0:
            problems.append(f"target_bits={self.target_bits!r}: must be a number above 0.")
        by_layer = self.module_target_bits or {}
        own = {"mlp_target_bits": self.mlp_target_bits}
        if isinstance(by_layer, dict) and is_texts([*by_layer]):
            own |= {f"module_target_bits[{name!r}]": bits for name, bits in by_layer.items()}
        else:
            problems.append(f"module_target_bits={by_layer!r}: must be a dict of bits by name.")
        problems += [
            f"{name}={bits!r}: must be a number, at least 1.0."
            for name, bits in own.items()
            if not (bits is None and name == "mlp_target_bits") and not as_number(bits) >= 1.0
        ]
        return problems + self._search_problems()

    def _search_problems(self) -> list[str]:
        problems = whole_problems({"iters": self.iters}, 1)
        if not as_number(self.reg) >= 0:
            problems.append(f"reg={self.reg!r}: must be a number, at least 0.")
        if self.use_balancing:
            problems += whole_problems({"balance_iters": self.balance_iters}, 1)
            problems += positive_problems({"balance_alpha": self.balance_alpha})
        if self.use_balancing and self.balance_mode not in BALANCE_MODES:
            modes = " or ".join(map(repr, BALANCE_MODES))
            problems.append(f"balance_mode={self.balance_mode!r}: must be {modes}.")
        return problems + drift_problems(self.drift_ratio)

    # Bits and shapes

    @staticmethod
    def resolve_bits(
        layer_name: str | None,
        default_bits: float,
        mlp_bits: float | None = None,
        module_bits: dict[str, float] | None = None,
    ) -> float:
        """Bits of a layer: by its name, else for MLPs, else the default.

        >>> DBF.resolve_bits("model.layers.0.mlp.up_proj", 1.5, mlp_bits=1.25)
        1.25
        """
        return setting_of(layer_name, default_bits, mlp_bits, module_bits)

    def layer_bits(self, layer_name: str) -> float:
        """Bits that were asked for of one layer."""
        return float(
            self.resolve_bits(
                layer_name, self.target_bits, self.mlp_target_bits, self.module_target_bits
            )
        )

    def model_problems(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """At least one layer must have room for the bits that are asked of it."""
        short = self._clamped(shapes)
        if not shapes or len(short) < len(shapes):
            return []
        most = max(_most_bits(shape) for shape in shapes.values())
        name = max(short, key=lambda name: _most_bits(shapes[name]))
        out_features, in_features = shapes[name]
        return [
            f"target_bits={self.layer_bits(name):g}: no layer has room for so many, {name} of "
            f"{out_features} x {in_features} holds {most:.4g}, which is the most. "
            f"Use target_bits={most:.4g} or less, or GPTQ."
        ]

    def remarks(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Layers without room for the bits that are asked of them, with what they get."""
        short = self._clamped(shapes)
        if not short:
            return []
        kinds: dict[tuple[int, int, float], list[str]] = {}
        for name in short:
            kinds.setdefault((*shapes[name], self.layer_bits(name)), []).append(name)
        listed = "; ".join(
            f"{_names(names)} of {out_features} x {in_features}: "
            f"{achievable_bits(out_features, in_features, bits):.4g} of {bits:g}"
            for (out_features, in_features, bits), names in kinds.items()
        )
        return [
            f"{len(short)} of {len(shapes)} layers get fewer bits than asked, all that a product "
            f"of their shape has room for: {listed}."
        ]

    def _clamped(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        return [name for name, shape in shapes.items() if is_clamped(*shape, self.layer_bits(name))]

    def bits_per_weight(
        self,
        layer_name: str,
        in_features: int,
        out_features: int,
        *,
        wbits: int | float | None = None,
    ) -> float:
        """Signs and scales, as far as the shape has room."""
        bits = self.layer_bits(layer_name) if wbits is None else wbits
        return bits_with_scales(out_features, in_features, float(bits))

    # Quantizing

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Steps of products and Cholesky factors, as if the rows were one layer's."""
        rank = rank_of(num_rows, in_features, self.target_bits)
        num_steps = min(self.iters, PLANNED_STEPS) + REFINE_STEPS
        each = rank * (num_rows + in_features) * (rank + in_features) + rank**3
        return float(SOLVE_COST * num_steps * each)

    def baseline(
        self, layer_name: str, weight: Float[Tensor, "_ in"]
    ) -> Float[Tensor, "_ in"] | None:
        """Signs with their rows' mean below two bits, else rounding to the whole bits in them.

        Bits are those that the shape has room for.
        """
        room = _most_bits((weight.shape[0], weight.shape[1]))
        bits = int(min(self.layer_bits(layer_name), room))
        if bits < 2:
            return sign_mean_weight(weight)
        return nearest_weight(weight, wbits=min(bits, MOST_BITS))

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, DBFResult]:
        """Quantize layers that share an input; small ones of one shape are solved together."""
        alike: dict[tuple[int, int], list[str]] = {}
        for name, weight in weights.items():
            out_features, in_features = weight.shape
            rank = rank_of(out_features, in_features, self.layer_bits(name))
            alike.setdefault((out_features, rank), []).append(name)
        results: dict[str, DBFResult] = {}
        for (out_features, rank), names in alike.items():
            # Together where they are small beside the Hessian, for the memory that a search takes.
            at_once = max(1, weights[names[0]].shape[1] // out_features)
            for first in range(0, len(names), at_once):
                some = names[first : first + at_once]
                solved = self._solve(_stacked([weights[name] for name in some]), factors, rank)
                results |= {name: self._result(name, solved, i) for i, name in enumerate(some)}
        return {name: results[name] for name in weights}

    def _solve(
        self, weight: Float[Tensor, "layers out in"], factors: HessianFactors, rank: int
    ) -> BinaryFactors:
        """Factors under the Hessian, or under the next simpler one with which there are any."""
        search = Search(min(self.iters, PLANNED_STEPS), self.reg, self.use_adaptive_rho)
        balancing = None
        if self.use_balancing:
            balancing = Balancing(self.balance_iters, self.balance_alpha, self.balance_mode)
        try:
            return dbf_quantize(weight, factors.hessian, rank, search, balancing, self.drift_ratio)
        except QuantizationError as error:
            factors.fallbacks.append(f"diagonal of the Hessian: {error}")
        diagonal = torch.diag_embed(factors.hessian.diagonal())
        return dbf_quantize(weight, diagonal, rank, search, None, self.drift_ratio)

    def _result(self, name: str, solved: BinaryFactors, index: int) -> DBFResult:
        left, right = solved.row_signs[index], solved.column_signs[index]
        signs = {"dbf_A": left, "dbf_B": right}
        if self.bitpack_on_quantize:
            stored = {key: packed_signs(matrix) for key, matrix in signs.items()}
        else:
            stored = {key: _half(matrix) for key, matrix in signs.items()}
        shapes = [
            list(matrix.shape) if self.bitpack_on_quantize else None for matrix in (left, right)
        ]
        return DBFResult(
            target_bits=self.layer_bits(name),
            **self._settings(),
            is_dbf_quantized=True,
            dbf_Da=_half(solved.row_scale[index]),
            dbf_mid=_half(solved.middle[index]),
            dbf_Db=_half(solved.column_scale[index]),
            **stored,
            dbf_A_is_packed=self.bitpack_on_quantize,
            dbf_B_is_packed=self.bitpack_on_quantize,
            dbf_A_original_shape=shapes[0],
            dbf_B_original_shape=shapes[1],
        )

    # Export

    def _settings(self) -> dict[str, bool | int | float | str]:
        """What a result and a checkpoint repeat of the settings, beside the bits."""
        return {
            "iters": self.iters,
            "reg": self.reg,
            "use_balancing": self.use_balancing,
            "balance_iters": self.balance_iters,
            "balance_alpha": self.balance_alpha,
            "balance_mode": self.balance_mode,
            "use_adaptive_rho": self.use_adaptive_rho,
        }

    def get_quant_config(self) -> dict:
        """Top level of a DBF checkpoint's ``quantization_config``."""
        return dbf_quant_config(
            target_bits=float(self.target_bits),
            settings=self._settings(),
            mlp_target_bits=self.mlp_target_bits,
            module_target_bits=self.module_target_bits,
        )

    def layer_format(self, layer_name: str) -> LayerFormat:
        """Signs and scales; the rank follows from the bits."""
        return dbf_format(self.layer_bits(layer_name), self._settings())


def _stacked(weights: list[Tensor]) -> Float[Tensor, "layers out in"]:
    """One layer is not copied."""
    return weights[0][None] if len(weights) == 1 else torch.stack(weights)


def _half(tensor: Tensor) -> Tensor:
    half = tensor.to("cpu", torch.float16).contiguous()
    if not all_finite(half):
        largest = tensor.abs().max().item()
        raise QuantizationError(f"A scale of {largest:.3g} does not fit float16 (largest 65504).")
    return half


def _most_bits(shape: tuple[int, int]) -> float:
    """Bits per weight of the largest rank."""
    return sum(shape) / max(shape)


def _names(names: list[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"
