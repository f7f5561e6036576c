"""Operations and bytes of every phase, from shapes: what the code of the engine really does.

Operations are multiplications and additions, each counted as one. Phases are named as a plan shows
them; ``costs.UnitCosts`` puts them together to the calls of a worker.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce

from onecomp.linalg import strip_bounds
from onecomp.models.layout import InputGroup
from onecomp.planning.amounts import Amount
from onecomp.planning.methods import MethodShape
from onecomp.planning.shapes import BlockShape, Linear

FLOAT_BYTES = 4
SENT_CODE_BYTES = 1
"""Of a code on its way from the owner to whoever applies or stores it."""
CODE_BYTES = 4
"""Codes are int32 while they are made and packed."""
SCALE_BYTES = 4
"""A scale and a zero point in float16."""
EVALUATION_KERNELS = 10
EVALUATIONS_AT_ONCE = 1 << 17
"""Weights times candidates in one pass of the range search."""
SOLVER_KERNELS = 6
"""For each column of a tile of rows: rounding, its error, and what it changes in the panel."""
SOLVER_PASSES = 10
"""Times that the solver reads or writes each weight outside its products."""
GUARD_PASSES = 14
"""The same for the comparison with plain rounding."""


@dataclass(frozen=True)
class Work:
    """Amounts of what costs time; ``+`` and ``*`` as of vectors."""

    model_operations: Amount = 0
    """Products in the model's dtype."""
    float32_operations: Amount = 0
    """Products in float32."""
    factor_operations: Amount = 0
    """Cholesky factors and triangular solutions in float32."""
    evaluations: Amount = 0
    """Errors of one weight on one candidate grid."""
    memory_bytes: Amount = 0
    """Read and written by elementwise passes."""
    kernels: Amount = 0
    """Calls to the device that do little."""
    read_bytes: Amount = 0
    """From the model's files or the run directory."""
    written_bytes: Amount = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(self._of(f.name) + other._of(f.name) for f in fields(Work)))

    def __mul__(self, factor: Amount) -> "Work":
        return Work(*(self._of(f.name) * factor for f in fields(Work)))

    def _of(self, name: str) -> Amount:
        return vars(self)[name]

    @property
    def operations(self) -> Amount:
        """Arithmetic of any kind; one evaluation is about twenty operations."""
        products = self.model_operations + self.float32_operations + self.factor_operations
        return products + 20 * self.evaluations

    @staticmethod
    def sum(parts: "Iterable[Work]") -> "Work":
        """Sum of any number."""
        return reduce(Work.__add__, parts, Work())


def strip_share(size: int) -> Amount:
    """Part of a symmetric matrix that its strips hold.

    >>> strip_share(2048)
    0.53125
    """
    return sum((last - first) * (size - first) for first, last in strip_bounds(size)) / size**2


def sums_bytes(group: InputGroup, *, corrected: bool) -> Amount:
    """Size of one contribution to a group's sums: Gram strips, and the cross product if any."""
    return FLOAT_BYTES * group.in_features**2 * (strip_share(group.in_features) + corrected)


def rows_bytes(group: InputGroup, tokens: Amount, dtype_bytes: int, *, corrected: bool) -> Amount:
    """Size of the inputs themselves, sent instead of sums where a shard has few."""
    return tokens * group.in_features * dtype_bytes * (1 + corrected)


def read(
    num_parameters: Amount, stored_bytes_each: Amount, dtype_bytes: int, copies: int = 1
) -> Work:
    """Weights from the files to where they are computed with; files come from the disk once."""
    return Work(
        read_bytes=num_parameters * stored_bytes_each,
        memory_bytes=copies * num_parameters * (stored_bytes_each + dtype_bytes),
    )


def embed(tokens: Amount, hidden_size: int, dtype_bytes: int) -> Work:
    """Everything in front of the blocks."""
    return Work(memory_bytes=2 * tokens * hidden_size * dtype_bytes)


def forward(operations: Linear, tokens: Amount, length: int) -> Work:
    """Part of a forward pass; a token attends to half of its sample on average."""
    return Work(model_operations=tokens * operations.at(length / 2))


def sums(group: InputGroup, tokens: Amount, *, corrected: bool) -> Work:
    """Gram matrix of a group's inputs, by its strips, and the cross product where corrected."""
    size = group.in_features
    return Work(
        float32_operations=2 * tokens * size**2 * (strip_share(size) + corrected),
        memory_bytes=3 * FLOAT_BYTES * tokens * size * (1 + corrected),
    )


def merge(group: InputGroup, num_additions: Amount, *, corrected: bool) -> Work:
    """Additions of two contributions."""
    return Work(memory_bytes=3 * num_additions * sums_bytes(group, corrected=corrected))


def factor(group: InputGroup) -> Work:
    """The damped Hessian's Cholesky factor, inverted and put in the order of solving."""
    size = group.in_features
    return Work(
        factor_operations=size**3 / 3 + size**3,
        memory_bytes=12 * FLOAT_BYTES * size**2,
    )


def correct(group: InputGroup, num_rows: Amount) -> Work:
    """The correction of error propagation: three products of all rows with square matrices."""
    size = group.in_features
    return Work(
        float32_operations=6 * num_rows * size**2,
        memory_bytes=6 * FLOAT_BYTES * num_rows * size,
    )


def search(group: InputGroup, num_rows: Amount, method: MethodShape) -> Work:
    """The range search of every group of columns."""
    weights = num_rows * group.in_features
    evaluations = weights * method.num_candidates
    kernels = EVALUATION_KERNELS * evaluations / EVALUATIONS_AT_ONCE
    passes = 8 if method.num_candidates else 4
    return Work(
        evaluations=evaluations, memory_bytes=passes * FLOAT_BYTES * weights, kernels=kernels
    )


def solve(group: InputGroup, num_rows: Amount, method: MethodShape, tile: int) -> Work:
    """Columns solved one after the other, and each row compared with plain rounding.

    Args:
        group: The group.
        num_rows: Rows of its layers that are solved.
        method: Method and settings.
        tile: Most rows that are solved at once.
    """
    size, weights = group.in_features, num_rows * group.in_features
    if method.rated is not None:
        multiplications = method.rated.solve_cost(int(num_rows), size)
        return Work(float32_operations=2 * multiplications, memory_bytes=6 * FLOAT_BYTES * weights)
    if not method.has_hessian:
        return Work(memory_bytes=6 * FLOAT_BYTES * weights)
    guard = 3 * 2 * num_rows * size**2 * strip_share(size)
    return Work(
        float32_operations=num_rows * size**2 + guard,
        memory_bytes=FLOAT_BYTES * weights * (SOLVER_PASSES + GUARD_PASSES),
        kernels=SOLVER_KERNELS * size * -(-num_rows // tile),
    )


def apply(group: InputGroup, dtype_bytes: int) -> Work:
    """Quantized weights put into the block."""
    return Work(memory_bytes=group.num_weights * (SENT_CODE_BYTES + 5 * FLOAT_BYTES + dtype_bytes))


def results_bytes(group: InputGroup, method: MethodShape) -> Amount:
    """Results as they travel and wait to be stored."""
    scales = method.num_scales(group.in_features) * sum(group.out_features)
    return SENT_CODE_BYTES * group.num_weights + SCALE_BYTES * scales


def stored_result_bytes(group: InputGroup, method: MethodShape) -> Amount:
    """Results in the run directory: a byte for each code."""
    scales = method.num_scales(group.in_features) * sum(group.out_features)
    return group.num_weights + SCALE_BYTES * scales


def checkpoint_bytes(group: InputGroup, method: MethodShape, dtype_bytes: int) -> Amount:
    """The group's layers in the checkpoint: codes, scales and what else the layout has."""
    if method.layout is None:
        return dtype_bytes * group.num_weights
    if method.layout != "gptq":
        vectors = 2 * (sum(group.out_features) + 2 * len(group.layer_names) * group.in_features)
        return group.num_weights * method.wbits / 8 + vectors
    scales = method.num_scales(group.in_features) * sum(group.out_features)
    packed = (group.num_weights + scales) * method.wbits / 8
    return packed + 2 * scales + 4 * group.in_features * len(group.layer_names)


def block_result_bytes(block: BlockShape, method: MethodShape) -> Amount:
    """A block's results in the run directory."""
    return sum(stored_result_bytes(group, method) for group in block.groups)


def block_checkpoint_bytes(block: BlockShape, method: MethodShape, dtype_bytes: int) -> Amount:
    """A block's part of the checkpoint."""
    other = block.num_parameters - block.num_quantized
    return dtype_bytes * other + sum(
        checkpoint_bytes(group, method, dtype_bytes) for group in block.groups
    )


def write(block: BlockShape, method: MethodShape, dtype_bytes: int) -> Work:
    """A block's results and its part of the checkpoint: packed, and flushed to the disk."""
    other = dtype_bytes * (block.num_parameters - block.num_quantized)
    files = block_result_bytes(block, method) + block_checkpoint_bytes(block, method, dtype_bytes)
    return Work(
        written_bytes=files,
        read_bytes=other,
        memory_bytes=files + 3 * other + 6 * CODE_BYTES * block.num_quantized,
    )
