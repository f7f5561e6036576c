"""What a gang left, as patches of its checkpoint and as a record."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from onecomp.export.checkpoint import write_shard
from onecomp.export.load import read_json
from onecomp.post_process.base import PATCHES, Outcome
from onecomp.post_process.blockwise.student_blocks import packed_tensors
from onecomp.post_process.gang_job import PROGRESS_FILE, TRAINED_FILE, GangJob
from onecomp.post_process.gang_student import outer_layers, quantized_blocks, trained_parts
from onecomp.post_process.global_ptq import outcome_of
from onecomp.post_process.training import Progress
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.trainable import Trained


def read_progress(work: Path) -> Progress:
    """Where training ended."""
    found = read_json(work / PROGRESS_FILE)
    return Progress(**{key: found[key] for key in vars(Progress())})


def gang_outcome(work: Path, zero_stage: int, seconds: float) -> Outcome:
    """What is recorded of a gang's training."""
    found = read_json(work / PROGRESS_FILE)
    outcome = outcome_of(read_progress(work), seconds)
    details = {
        **outcome.details,
        "workers": found["num_workers"],
        "zero_stage": zero_stage,
        "weight_bytes_per_worker": found["held_bytes"],
    }
    return replace(outcome, details=details)


def write_patches(job: GangJob) -> None:
    """Write what changed of the checkpoint's tensors, one block after the other."""
    blocks, work = quantized_blocks(job.checkpoint, job.model_config), job.directory
    trained, cpu = trained_parts(blocks, job.rates.latents), torch.device("cpu")
    with safe_open(work / TRAINED_FILE, framework="pt") as state:
        for index in range(len(blocks.skeleton.blocks)):
            name = blocks.skeleton.block_name(index)
            changed = _changed(blocks.load(index, cpu), name, state, trained)
            write_shard(work / PATCHES, f"block-{index:05d}.safetensors", changed)
        for name, layer in outer_layers(blocks):
            parent, _, leaf = name.rpartition(".")
            holder = nn.ModuleDict({leaf: layer})
            changed = _changed(holder, parent, state, trained)
            write_shard(work / PATCHES, f"outer-{name}.safetensors", changed)


def _changed(
    module: nn.Module, prefix: str, state: safe_open, trained: Trained
) -> dict[str, Tensor]:
    before = {key: tensor.clone() for key, tensor in packed_tensors(module, prefix).items()}
    for short, layer in module.named_modules():
        if isinstance(layer, QuantLinear):
            _teach(layer, f"{prefix}.{short}", state, trained)
    after = packed_tensors(module, prefix)
    return {key: after[key] for key in after if not torch.equal(after[key], before[key])}


def _teach(layer: QuantLinear, name: str, state: safe_open, trained: Trained) -> None:
    learned = layer.trainable(trained)
    with torch.no_grad():
        for key, parameter in learned.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state.get_tensor(f"{name}.{key}"))
    layer.adopt(learned)
