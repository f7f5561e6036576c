"""JointQ's codes in GPTQ's layer."""

import torch
from torch import nn

from onecomp.quantizer.gptq.layer import GPTQLinear
from onecomp.quantizer.gptq.result import GPTQResult
from onecomp.quantizer.inference import inference_layer
from onecomp.quantizer.jointq.result import JointQResult


@inference_layer.register
def _(result: JointQResult, linear: nn.Linear, *, pack_weights: bool = True) -> GPTQLinear:
    return GPTQLinear.from_quantization_result(as_gptq(result), linear, pack_weights)


def as_gptq(result: JointQResult) -> GPTQResult:
    """The same codes and grids as GPTQ has them: symmetric codes count from 2**(bits - 1)."""
    middle = 2 ** (result.bits - 1) if result.symmetric else 0
    codes = result.assignment.flatten(1).to(torch.int32) + middle
    scales, zeros = result.scale.to(torch.float16), result.zero_point.to(torch.float16) + middle
    is_grouped = result.group_size is not None
    return GPTQResult(
        wbits=result.bits,
        groupsize=result.group_size if is_grouped else -1,
        actorder=result.perm is not None,
        sym=result.symmetric,
        qweight=codes if result.perm is None else codes[:, torch.argsort(result.perm)],
        scales=scales.T.contiguous() if is_grouped else scales,
        qzeros=zeros.T.contiguous() if is_grouped else zeros,
        perm=result.perm if is_grouped else None,
    )
