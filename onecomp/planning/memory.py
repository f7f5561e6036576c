"""Peak memory, disk and network of a run, from shapes alone; bytes throughout.

The peaks are those of the engine's code: what a worker holds all the time, and the worst moment of
the calls that it runs one after the other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onecomp.models.layout import InputGroup
from onecomp.planning import operations as ops
from onecomp.planning.amounts import Amount
from onecomp.planning.costs import UnitCosts
from onecomp.planning.shapes import BlockShape
from onecomp.resources import CUDA_CONTEXT_BYTES

MIB = 2**20
PROCESS_BYTES = 575 * MIB
"""A process that has imported everything, before it holds anything."""
HEAP_TENSOR_BYTES = 32 * MIB
"""The C library's allocator keeps what it got for smaller pieces, and gives back larger ones."""
HEAP_SHARE = 0.9
"""What a process of one worker keeps beyond what it holds, as a share of it, of small tensors."""
SHARED_HEAP_SHARE = 0.25
"""The same where several workers have one process: their worst moments are not the same."""
LARGE_SHARE = 0.1
"""The same of large tensors."""
CUDA_HOST_BYTES = 2500 * MIB
"""Host memory of a process that uses CUDA, its libraries included."""
FACTOR_MATRICES = 5
"""Square float32 matrices beside the Hessian while it is factored."""
PREPARED_MATRICES = 3
"""While rows are solved: the factor, its rows divided, and a copy being made."""
TILE_MATRICES = 9
"""Float32 copies of a tile of rows while it is solved and compared with rounding."""

RATED_MATRICES = 4
"""No method needs more than so many times the weights that it solves at once and their Hessian."""


@dataclass(frozen=True)
class Moment:
    """A moment of a worker's work, and what it holds then, in bytes by name."""

    what: str
    parts: Mapping[str, Amount]

    @property
    def num_bytes(self) -> Amount:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs room for; bytes."""

    worker: Moment
    """Worst moment of the worker that holds the most: on its GPU, or in its host memory."""
    device_bytes: Amount
    """GPU memory of each worker; 0 on a CPU."""
    host_bytes: Amount
    """Host memory of each worker's process, or of this process with all its workers."""
    driver_bytes: Amount
    object_store_bytes: Amount
    """Of the node that owns the largest group; 0 in this process."""
    results_bytes: Amount
    """Results in the run directory."""
    checkpoint_bytes: Amount
    """Checkpoint, made in the run directory and moved to its place at the end."""
    calibration_bytes: Amount

    @property
    def run_disk_bytes(self) -> Amount:
        """The whole run directory, before the checkpoint moves out of it."""
        return self.results_bytes + self.checkpoint_bytes + self.calibration_bytes


@dataclass(frozen=True)
class MemoryModel:
    """Room that the calls of a run take.

    Args:
        costs: Model, method, text, device and number of workers.
        in_process: All of them are threads of one process.
    """

    costs: UnitCosts
    in_process: bool

    def plan(self) -> MemoryPlan:
        """All peaks."""
        worst = max(self._moments(), key=lambda moment: moment.num_bytes)
        waiting = self.waiting_bytes()
        is_gpu = self.costs.hardware.is_gpu
        held = self._host_beside_gpu() if is_gpu else worst.num_bytes
        if self.in_process:
            held = self.costs.num_workers * held + waiting
        host = PROCESS_BYTES + held * (1 + self._kept_share())
        return MemoryPlan(
            worker=worst,
            device_bytes=worst.num_bytes + CUDA_CONTEXT_BYTES if is_gpu else 0.0,
            host_bytes=host + (CUDA_HOST_BYTES if is_gpu else 0),
            driver_bytes=host if self.in_process else PROCESS_BYTES + 3 * self._token_bytes(),
            object_store_bytes=0.0 if self.in_process else waiting,
            results_bytes=self._results_bytes(),
            checkpoint_bytes=self._checkpoint_bytes(),
            calibration_bytes=self._token_bytes(),
        )

    # One worker

    def _moments(self) -> Iterator[Moment]:
        """The moments that may be the worst, of every kind of block."""
        if self.costs.text is not None:
            yield self._embedding()
        for kind, num_computed in self.costs.model.computed():
            if not num_computed or not kind.groups:
                continue
            for group in kind.groups:
                yield self._quantizing(kind, group)
            if self.costs.text is not None:
                yield from self._observing(kind)

    def _held_always(self, kind: BlockShape) -> dict[str, Amount]:
        """Streams in front of every block in flight and behind one, and the block's weights."""
        model, num_streams = self.costs.model, self.costs.num_streams
        if self.costs.text is None:
            return {}
        stream = self.costs.most_tokens * model.hidden_size * model.dtype_bytes * num_streams
        weights = kind.num_parameters * model.dtype_bytes * (1 + num_streams)
        copies = 1 + self.costs.blocks_in_flight
        return {"hidden states": copies * stream, "weights of blocks": weights}

    def _embedding(self) -> Moment:
        model = self.costs.model
        streams = self.costs.most_tokens * model.hidden_size * model.dtype_bytes
        table = model.num_embedding_weights * model.dtype_bytes
        return Moment("embedding", {"hidden states": 2 * streams, "embedding": 2 * table})

    def _observing(self, kind: BlockShape) -> Iterator[Moment]:
        for group in kind.groups:
            parts = self._held_always(kind)
            parts["suspended passes"] = self._suspended_bytes(kind, group.index)
            parts["a pass"] = self._passing_bytes(kind)
            observed = [group] if self.costs.qep is not None else kind.groups
            parts["sums"] = sum(self._sums_held_bytes(kind, each) for each in observed)
            yield Moment(f"summing up inputs of {short_name(group)}", parts)

    def _suspended_bytes(self, kind: BlockShape, index: int) -> Amount:
        """What all passes hold in front of a group; the original ones go on only when observed."""
        if self.costs.qep is None:
            return 0.0
        observed = [g.index for g in kind.groups[: index + 1] if self.costs.is_corrected(g)]
        original = kind.stretches[max(observed)].held_bytes if observed else 0.0
        return self.costs.most_tokens * (kind.stretches[index].held_bytes + original)

    def _passing_bytes(self, kind: BlockShape) -> Amount:
        return kind.passing_bytes.at(self.costs.text.micro_batch_tokens)

    def _sums_held_bytes(self, kind: BlockShape, group: InputGroup) -> Amount:
        """Nodes of the summation tree that wait for others, and what is made of a micro-batch."""
        text, corrected = self.costs.text, self.costs.is_corrected(group)
        shards = text.most_shards(self.costs.num_workers)
        num_groups = self.costs.num_at_once(kind, group)
        each = self.costs.contribution_bytes(group, num_groups)
        if self.costs.sends_rows(group, num_groups):
            return shards * each
        rows = text.micro_batch_tokens * group.in_features * ops.FLOAT_BYTES
        return each * (shards.bit_length() + 1) + rows * (1 + 2 * corrected)

    def _quantizing(self, kind: BlockShape, group: InputGroup) -> Moment:
        size, costs = group.in_features, self.costs
        parts = self._held_always(kind)
        if costs.qep is not None and costs.text is not None:
            parts["suspended passes"] = self._suspended_bytes(kind, group.index)
        tile = self._solving_bytes(group)
        parts["weights of the group"] = group.num_weights * (
            2 * costs.model.dtype_bytes + ops.FLOAT_BYTES
        )
        square = ops.FLOAT_BYTES * size**2
        if not costs.method.has_hessian:
            parts["rows being solved"] = tile
            return Moment(f"quantizing {short_name(group)}", parts)
        corrected = costs.is_corrected(group)
        at_once = costs.num_at_once(kind, group)
        num_parts = 0 if costs.text is None else costs.num_received(group, at_once)
        total = ops.sums_bytes(group, corrected=corrected)
        received = num_parts * costs.contribution_bytes(group, at_once)
        parts["sums"] = received + total * (num_parts > 1)
        parts["Hessian and factor"] = square * (1 + corrected + FACTOR_MATRICES)
        solving = square * (1 + corrected + PREPARED_MATRICES) + tile
        if solving > parts["Hessian and factor"]:
            parts["Hessian and factor"] = square * (1 + corrected + PREPARED_MATRICES)
            parts["rows being solved"] = tile
        return Moment(f"quantizing {short_name(group)}", parts)

    def _solving_bytes(self, group: InputGroup) -> Amount:
        """What a solver makes beside the group's weights, its Hessian and its factor."""
        costs, rows, size = self.costs, sum(group.out_features), group.in_features
        rated = costs.method.rated
        if rated is None:
            return TILE_MATRICES * min(rows, costs.row_tile(group)) * size * ops.FLOAT_BYTES
        is_separable = all(map(rated.is_separable, group.layer_names))
        at_once = min(rows, costs.row_tile(group)) if is_separable else rows
        return RATED_MATRICES * (at_once + size) * size * ops.FLOAT_BYTES

    def _host_beside_gpu(self) -> Amount:
        """Host memory of a worker whose data is on a GPU: what is read, written and sent."""
        model = self.costs.model
        block = max(kind.num_parameters for kind in model.kinds) * model.dtype_bytes
        return 2 * block + self._largest_results() + self._largest_contributions()

    # Between workers

    def waiting_bytes(self) -> Amount:
        """What was made and waits to be used: contributions, what pieces share, results."""
        split = [group for group in self._groups() if self.costs.is_split(group)]
        prepared = max(map(self.costs.prepared_bytes, split), default=0.0)
        in_flight = self.costs.blocks_in_flight
        results = max(2, in_flight) * self._largest_results()
        return in_flight * self._largest_contributions() + in_flight * prepared + results

    def _groups(self) -> list[InputGroup]:
        return [group for kind in self.costs.model.kinds for group in kind.groups]

    def _largest_contributions(self) -> Amount:
        """Contributions that exist at a time: of one group, or of a block without propagation."""
        if not self.costs.method.has_hessian:
            return 0.0
        by_block = [
            [self.group_sent_bytes(kind, group) for group in kind.groups]
            for kind in self.costs.model.kinds
        ]
        pick = max if self.costs.qep is not None else sum
        return max(pick(sizes) for sizes in by_block if sizes)

    def _largest_results(self) -> Amount:
        return max(
            sum(map(self.costs.results_bytes, kind.groups)) for kind in self.costs.model.kinds
        )

    def group_sent_bytes(self, kind: BlockShape, group: InputGroup) -> Amount:
        """Contributions to a group's sums, wherever they go."""
        num_groups = self.costs.num_at_once(kind, group)
        counts = self.costs.num_contributions(group, num_groups)
        return sum(counts) * self.costs.contribution_bytes(group, num_groups)

    def least_sent_bytes(self, kind: BlockShape, group: InputGroup) -> Amount:
        """What has to leave a worker: rows of all but the owner, or a contribution of each."""
        num_groups = self.costs.num_at_once(kind, group)
        counts = self.costs.num_contributions(group, num_groups)
        is_rows = self.costs.sends_rows(group, num_groups)
        number = sum(counts) - max(counts) if is_rows else sum(map(bool, counts)) - 1
        return number * self.costs.contribution_bytes(group, num_groups)

    def network_bytes(self, kind: BlockShape) -> dict[str, Amount]:
        """Bytes that go from worker to worker for one block, by what they are."""
        if self.costs.num_workers == 1 or self.in_process:
            return {}
        others = self.costs.num_workers - 1
        results = sum(map(self.costs.results_bytes, kind.groups))
        if self.costs.text is None:
            return {"results": results}
        split = [group for group in kind.groups if self.costs.is_split(group)]
        sent = sum(self.group_sent_bytes(kind, group) for group in kind.groups)
        return {
            "sums": sent * others / self.costs.num_workers,
            "sums, the least possible": sum(
                self.least_sent_bytes(kind, group) for group in kind.groups
            ),
            "factors": others * sum(map(self.costs.prepared_bytes, split)),
            "results": results * (others if self.costs.qep is not None else 1),
        }

    def _kept_share(self) -> Amount:
        """What the allocator keeps of memory that is free again."""
        model, text = self.costs.model, self.costs.text
        if text is None or self.costs.hardware.is_gpu:
            return LARGE_SHARE
        if text.micro_batch_tokens * model.hidden_size * model.dtype_bytes >= HEAP_TENSOR_BYTES:
            return LARGE_SHARE
        return SHARED_HEAP_SHARE if self.in_process else HEAP_SHARE

    # Disk

    def _results_bytes(self) -> Amount:
        model, method = self.costs.model, self.costs.method
        return sum(kind.count * ops.block_result_bytes(kind, method) for kind in model.kinds)

    def _checkpoint_bytes(self) -> Amount:
        model, method = self.costs.model, self.costs.method
        if not self.costs.has_checkpoint:
            return 0.0
        blocks = sum(
            kind.count * ops.block_checkpoint_bytes(kind, method, model.dtype_bytes)
            for kind in model.kinds
        )
        return blocks + model.dtype_bytes * model.num_outer_parameters

    def _token_bytes(self) -> Amount:
        """Token ids and mask of every sample, int64."""
        return 0.0 if self.costs.text is None else 16.0 * self.costs.text.num_tokens


def names_in_block(group: InputGroup) -> list[str]:
    """Names of a group's layers within its block.

    >>> names_in_block(InputGroup(3, 0, ("model.layers.3.mlp.gate_proj",), 8, (8,)))
    ['mlp.gate_proj']
    """
    return [name.partition(f".{group.block_index}.")[2] for name in group.layer_names]


def short_name(group: InputGroup) -> str:
    """Name of a group's first layer within its block."""
    return names_in_block(group)[0]
