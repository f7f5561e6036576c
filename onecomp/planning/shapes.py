"""The shapes that a plan is made of: a model, its kinds of blocks, the calibration text."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from onecomp.calibration.shards import LEAST_SHARD_TOKENS, MAX_SHARDS, MICRO_BATCH_TOKENS
from onecomp.models.layout import BlockLayout, InputGroup
from onecomp.planning.amounts import Amount


@dataclass(frozen=True)
class Linear:
    """A number that grows with the tokens of a pass: ``constant + each * tokens``."""

    constant: Amount
    each: Amount

    @classmethod
    def through(cls, small: tuple[int, Amount], large: tuple[int, Amount]) -> "Linear":
        """The line through two points ``(tokens, value)``."""
        each = (large[1] - small[1]) / (large[0] - small[0])
        return cls(max(0.0, small[1] - each * small[0]), each)

    def at(self, tokens: Amount) -> Amount:
        """Its value."""
        return self.constant + self.each * tokens


@dataclass(frozen=True)
class Stretch:
    """The part of a block's forward pass that ends in front of an input group, or at its end."""

    operations: Linear
    """Per token, by the length of the sample: attention looks at all tokens before."""
    held_bytes: Amount
    """Per token, while a pass waits at the end of the stretch."""


@dataclass(frozen=True)
class BlockShape:
    """One kind of decoder block: all blocks of a kind have the same shapes."""

    indices: tuple[int, ...]
    """The blocks of this kind."""
    groups: tuple[InputGroup, ...]
    """Of the first block of the kind."""
    stretches: tuple[Stretch, ...]
    """One in front of each group, and the last, behind which the pass is over."""
    passing_bytes: Linear
    """Most that exists at a time in a pass of some tokens."""
    num_parameters: int
    num_matrix_weights: int
    """Parameters in matrices and larger tensors; the rest are norms and biases."""
    num_fused_weights: int
    """Parameters in tensors of three dimensions, which the engine does not quantize."""
    dependencies: tuple[frozenset[int], ...] | None = None
    """As in ``BlockLayout``."""

    @cached_property
    def _stage_sizes(self) -> dict[int, int]:
        stages = BlockLayout(0, "", self.groups, self.dependencies).stages
        return {group.index: len(stage) for stage in stages for group in stage}

    def stage_size(self, group: InputGroup) -> int:
        """Groups, itself included, that do not depend on each other."""
        return self._stage_sizes[group.index]

    @property
    def count(self) -> int:
        """Blocks of this kind."""
        return len(self.indices)

    @property
    def num_quantized(self) -> int:
        """Weights in target layers."""
        return sum(group.num_weights for group in self.groups)


@dataclass(frozen=True)
class StoredWeights:
    """What the headers of the weight files say."""

    num_bytes: int
    num_values: int
    dtypes: tuple[str, ...]
    """As safetensors names them, the largest share first."""
    num_files: int


@dataclass(frozen=True)
class ModelShape:
    """A model as far as a plan needs it."""

    name: str
    architecture: str
    dtype: str
    dtype_bytes: int
    hidden_size: int
    num_blocks: int
    kinds: tuple[BlockShape, ...]
    num_outer_parameters: int
    """Outside the blocks; tied tensors count once."""
    num_embedding_weights: int
    """What is run in front of the blocks."""
    stored: StoredWeights | None
    """None where the directory has no weight files."""
    notes: tuple[str, ...] = ()
    """What the reader should know."""

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return self.num_outer_parameters + sum(k.count * k.num_parameters for k in self.kinds)

    @cached_property
    def last_target_block(self) -> int:
        """The last block that has a group; blocks behind it are copied, not computed."""
        return max(index for kind in self.kinds if kind.groups for index in kind.indices)

    def computed(self) -> Iterator[tuple[BlockShape, int]]:
        """The kinds, and how many blocks of each lie before or at the last one with a group."""
        for kind in self.kinds:
            yield kind, sum(index <= self.last_target_block for index in kind.indices)


@dataclass(frozen=True)
class TextShape:
    """The calibration text, cut as ``calibration.shards`` cuts it."""

    num_samples: int
    length: int
    wanted_shards: int | None = None
    """As a job asks for; None for as many as the samples give."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return self.num_samples * self.length

    @property
    def num_shards(self) -> int:
        """Calibration shards."""
        natural = min(MAX_SHARDS, max(1, self.num_tokens // LEAST_SHARD_TOKENS))
        return min(self.wanted_shards or natural, self.num_samples)

    @property
    def shard_tokens(self) -> int:
        """Tokens of the largest shard."""
        return -(-self.num_samples // self.num_shards) * self.length

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that go through a block together, at most."""
        return min(self.shard_tokens, max(1, MICRO_BATCH_TOKENS // self.length) * self.length)

    def most_shards(self, num_workers: int) -> int:
        """Shards of the worker that holds the most."""
        return -(-self.num_shards // num_workers)
