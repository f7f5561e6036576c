"""A checkpoint, block by block: each part is written when its results exist, no model is held."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from onecomp.errors import LayerError
from onecomp.export.checkpoint import finish_checkpoint, write_shard
from onecomp.linalg import all_finite
from onecomp.models.skeleton import Skeleton
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.result import QuantizationResult
from onecomp.storage import AnyPath


def has_format(quantizer: Quantizer) -> bool:
    """Whether the method has a checkpoint format of its own."""
    try:
        quantizer.get_quant_config()
    except NotImplementedError:
        return False
    return True


def outer_names(skeleton: Skeleton) -> dict[str, str]:
    """Tensors outside the blocks: name in the checkpoint -> name in the source.

    The checkpoint uses the model's own names, which a source written from the bare model
    abbreviates. What the source has and the model does not know is kept under its name.
    """
    of_model = {skeleton.tensor_name(name): name for name in skeleton.model.state_dict()}
    blocks = tuple(
        skeleton.tensor_name(f"{skeleton.block_name(i)}.{key}").removesuffix(key)
        for i, block in enumerate(skeleton.blocks)
        for key in list(block.state_dict())[:1]
    )
    return {
        of_model.get(stored, stored): stored
        for stored in skeleton.source.tensor_files
        if not stored.startswith(blocks)
    }


def block_names(skeleton: Skeleton, block_index: int) -> dict[str, str]:
    """Tensors of one block before it is quantized: name in the checkpoint -> name in the source."""
    prefix = skeleton.block_name(block_index)
    names = [f"{prefix}.{key}" for key in skeleton.blocks[block_index].state_dict()]
    stored = {name: skeleton.tensor_name(name) for name in names}
    return {n: s for n, s in stored.items() if s in skeleton.source.tensor_files}


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that no value is NaN or infinite: one pass over each floating tensor.

    Raises:
        LayerError: For the first tensor with such values.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise LayerError(
                name,
                f"{(~tensor.isfinite()).sum()} of {tensor.numel()} values are NaN or infinite in "
                f"{dtype}. If the original ones are finite, {dtype} is too narrow for them: take "
                "another dtype. Otherwise download or save the model again.",
            )


def _read(skeleton: Skeleton, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under their names in the checkpoint, in the skeleton's dtype."""
    read = skeleton.source.read(names.values(), dtype=skeleton.dtype)
    return {name: read[stored] for name, stored in names.items()}


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes one shard for what lies outside the blocks, and one for each block."""

    directory: AnyPath
    quantizer: Quantizer
    dequantized: bool
    """Store dequantized weights in the model's dtype instead of codes."""
    pack_weights: bool = True

    def has_outer(self, skeleton: Skeleton) -> bool:
        """Whether the part outside the blocks is written."""
        return (self.directory / self.shard_name(0, len(skeleton.blocks))).is_file()

    def has_block(self, skeleton: Skeleton, block_index: int) -> bool:
        """Whether a block's part is written."""
        name = self.shard_name(block_index + 1, len(skeleton.blocks))
        return (self.directory / name).is_file()

    def shard_name(self, number: int, num_blocks: int) -> str:
        """File name; 0 is the part outside the blocks, block ``i`` has number ``i + 1``."""
        return f"model-{number + 1:05d}-of-{num_blocks + 1:05d}.safetensors"

    def write_outer(self, skeleton: Skeleton) -> None:
        """Embeddings, last norm, output head: copied from the source in the skeleton's dtype.

        Raises:
            LayerError: A value is NaN or infinite.
        """
        tensors = _read(skeleton, outer_names(skeleton))
        self._write(0, tensors, skeleton)

    def write_block(
        self, skeleton: Skeleton, block_index: int, results: Mapping[str, QuantizationResult]
    ) -> None:
        """One block: quantized layers from their results, everything else from the source.

        Raises:
            LayerError: A value is NaN or infinite.
        """
        replaced = {f"{name}.weight" for name in results}
        names = block_names(skeleton, block_index)
        tensors = _read(skeleton, {n: stored for n, stored in names.items() if n not in replaced})
        for name, result in results.items():
            tensors |= self._layer_tensors(skeleton, name, result, tensors)
        self._write(block_index + 1, tensors, skeleton)

    def _write(self, number: int, tensors: Mapping[str, Tensor], skeleton: Skeleton) -> None:
        require_finite(tensors)
        write_shard(self.directory, self.shard_name(number, len(skeleton.blocks)), tensors)

    def _layer_tensors(
        self,
        skeleton: Skeleton,
        name: str,
        result: QuantizationResult,
        others: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        if self.dequantized:
            return {f"{name}.weight": result.dequantize().to(skeleton.dtype)}
        shape = skeleton.model.get_submodule(name)
        linear = nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
        bias = others.get(f"{name}.bias")
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        layer = self.quantizer.create_inference_layer(
            result, linear, pack_weights=self.pack_weights
        )
        return {f"{name}.{key}": tensor for key, tensor in layer.packed_state().items()}

    def finish(self, skeleton: Skeleton, layer_names: list[str]) -> None:
        """Index, configuration, tokenizer and everything else beside the weights."""
        config = skeleton.source.config.to_dict()
        config["dtype"] = str(skeleton.dtype).removeprefix("torch.")
        num_blocks = len(skeleton.blocks)
        if not self.dequantized:
            config["quantization_config"] = self.quantizer.finalize_quant_config_for_save(
                self.quantizer.get_quant_config(), layer_names, num_blocks
            )
        names = [self.shard_name(number, num_blocks) for number in range(num_blocks + 1)]
        finish_checkpoint(self.directory, names, config, skeleton.source.directory)
