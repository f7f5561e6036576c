"""Round-to-nearest codes in GPTQ's layer."""

from torch import nn

from onecomp.quantizer.gptq.layer import GPTQLinear
from onecomp.quantizer.gptq.result import GPTQResult
from onecomp.quantizer.inference import inference_layer
from onecomp.quantizer.rtn.result import RTNResult


@inference_layer.register
def _(result: RTNResult, linear: nn.Linear, *, pack_weights: bool = True) -> GPTQLinear:
    return GPTQLinear.from_quantization_result(as_gptq(result), linear, pack_weights)


def as_gptq(result: RTNResult) -> GPTQResult:
    """The same codes and grids as GPTQ has them."""
    per_channel = result.groupsize == -1
    return GPTQResult(
        wbits=result.wbits,
        groupsize=result.groupsize,
        actorder=False,
        sym=result.sym,
        qweight=result.quantized_weight,
        scales=result.scale if per_channel else result.scale.T.contiguous(),
        qzeros=result.zero if per_channel else result.zero.T.contiguous(),
    )
