"""Sums over tokens: what a layer's quantizer needs to know of its inputs.

Each calibration shard contributes ``XᵀX`` (and, for error propagation, ``(X - X̂)ᵀX̂``). The
contributions are added along one fixed binary tree over shard numbers, so that the sum has the
same bits wherever the shards were computed and in whatever order they arrive.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import LayerError
from onecomp.linalg import from_strips, gram_strips


@dataclass(frozen=True)
class GroupStatistics:
    """Sums over all calibration tokens for one input group; ``+`` of its parts."""

    num_tokens: int
    gram: list[Tensor]
    """``X̂ᵀX̂`` as strips, float32, see ``linalg.gram_strips``."""
    cross: Tensor | None = None
    """``(X - X̂)ᵀX̂``, float32 ``(in, in)``; None where nothing is corrected."""

    @classmethod
    def of(
        cls, rows: Float[Tensor, "*tokens in"], original_rows: Float[Tensor, "*tokens in"] | None
    ) -> "GroupStatistics":
        """Sums over these rows.

        Args:
            rows: Inputs that the layer will see when everything before it is quantized.
            original_rows: The same tokens' inputs in the original model.
        """
        rows = rows.reshape(-1, rows.shape[-1]).float()
        cross = None
        if original_rows is not None:
            original_rows = original_rows.reshape(-1, rows.shape[-1]).float()
            cross = (original_rows - rows).T @ rows
        return cls(len(rows), gram_strips(rows), cross)

    def __add__(self, other: "GroupStatistics") -> "GroupStatistics":
        cross = None if self.cross is None else self.cross + other.cross
        gram = [a + b for a, b in zip(self.gram, other.gram, strict=True)]
        return GroupStatistics(self.num_tokens + other.num_tokens, gram, cross)

    def hessian(self) -> Float[Tensor, "in in"]:
        """``2 / tokens * X̂ᵀX̂``."""
        return from_strips(self.gram).mul_(2.0 / self.num_tokens)

    def delta(self) -> Float[Tensor, "in in"] | None:
        """``2 / tokens * (X - X̂)ᵀX̂``."""
        return None if self.cross is None else self.cross * (2.0 / self.num_tokens)

    def require_finite(self, layer_name: str) -> None:
        """Check that no input was NaN or infinite.

        Raises:
            LayerError: With the number of bad input columns.
        """
        diagonal = torch.cat([strip[:, : len(strip)].diagonal() for strip in self.gram])
        bad = int((~torch.isfinite(diagonal)).sum())
        if bad or (self.cross is not None and not torch.isfinite(self.cross.sum())):
            raise LayerError(
                layer_name,
                f"its calibration inputs hold NaN or infinite values ({bad} of {len(diagonal)} "
                "columns). Compute in a wider dtype (--dtype bfloat16 or float32), or check the "
                "model's weights.",
            )

    @property
    def num_rows(self) -> int:
        """Tokens that the sums are over."""
        return self.num_tokens

    @property
    def num_bytes(self) -> int:
        """Size of the sums."""
        tensors = [*self.gram, *([] if self.cross is None else [self.cross])]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class FewRows:
    """Inputs of one shard that are fewer than half their width: smaller to send than their sums."""

    rows: Tensor
    """In the dtype of the stream."""
    original_rows: Tensor | None

    def statistics(self) -> GroupStatistics:
        """The sums, made by whoever owns the group."""
        return GroupStatistics.of(self.rows, self.original_rows)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Size of the rows."""
        tensors = [self.rows] if self.original_rows is None else [self.rows, self.original_rows]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Contribution:
    """What shards ``first`` to ``last - 1``, one node of the tree, add to a group's sums."""

    first: int
    last: int
    content: GroupStatistics | FewRows


@dataclass
class ShardSums:
    """Collects one shard's inputs to one group, micro-batch by micro-batch.

    Rows are kept until they are worth a Gram matrix, ``rows >= in / 2``; from then on they are
    summed. So the order of every addition depends on shapes alone. Sums of rows that were kept have
    the same bits whoever makes them: which of the two is sent is a matter of speed only.
    """

    shard: int
    _rows: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    _sums: GroupStatistics | None = None

    def add(
        self, rows: Float[Tensor, "tokens in"], original_rows: Float[Tensor, "tokens in"] | None
    ) -> None:
        """Add the inputs of one micro-batch."""
        self._rows.append((rows, original_rows))
        num_rows = sum(len(rows) for rows, _ in self._rows)
        if self._sums is not None or 2 * num_rows >= rows.shape[1]:
            for part in self._rows:
                sums = GroupStatistics.of(*part)
                self._sums = sums if self._sums is None else self._sums + sums
            self._rows.clear()

    def contribution(self) -> Contribution | None:
        """This shard's leaf of the tree; None when no token of it reached the group."""
        content: GroupStatistics | FewRows | None = self._sums
        if content is None and self._rows:
            rows, originals = zip(*self._rows, strict=True)
            content = FewRows(
                torch.cat(rows), None if originals[0] is None else torch.cat(originals)
            )
        return None if content is None else Contribution(self.shard, self.shard + 1, content)


def with_sums(contributions: Iterable[Contribution]) -> list[Contribution]:
    """The same, with rows replaced by their sums."""
    return [
        replace(part, content=part.content.statistics())
        if isinstance(part.content, FewRows)
        else part
        for part in contributions
    ]


def merge(nodes: Iterable[Contribution], num_shards: int) -> list[Contribution]:
    """Add up contributions as far as the fixed tree allows.

    A subtree of Gram matrices becomes one contribution; rows are left for the owner.

    Args:
        nodes: Disjoint nodes of the tree.
        num_shards: Shards of the whole run.
    """
    held = {(node.first, node.last): node for node in nodes}
    return list(_merge(held, 0, num_shards)) if held else []


def _merge(
    held: Mapping[tuple[int, int], Contribution], first: int, last: int
) -> Iterator[Contribution]:
    if (first, last) in held:
        yield held[first, last]
        return
    if last - first == 1:
        return
    middle = (first + last) // 2
    parts = [*_merge(held, first, middle), *_merge(held, middle, last)]
    whole = [part.last - part.first for part in parts] == [middle - first, last - middle]
    if whole and all(isinstance(part.content, GroupStatistics) for part in parts):
        yield Contribution(first, last, parts[0].content + parts[1].content)
    else:
        yield from parts


def total(contributions: Iterable[Contribution], num_shards: int) -> GroupStatistics | None:
    """Sum along the fixed tree; None when no shard contributed.

    Args:
        contributions: Disjoint nodes, in any order.
        num_shards: Shards of the whole run.
    """
    return _total({(c.first, c.last): c for c in contributions}, 0, num_shards)


def _total(
    nodes: dict[tuple[int, int], Contribution], first: int, last: int
) -> GroupStatistics | None:
    if (first, last) in nodes:
        content = nodes[first, last].content
        return content.statistics() if isinstance(content, FewRows) else content
    if last - first == 1:
        return None
    middle = (first + last) // 2
    left, right = _total(nodes, first, middle), _total(nodes, middle, last)
    if left is None or right is None:
        return left if right is None else right
    return left + right
