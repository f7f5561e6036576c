"""GPTQ: settings, result, algorithm and inference layer."""

from onecomp.quantizer.gptq.layer import GPTQLinear as GPTQLinear
from onecomp.quantizer.gptq.quantizer import GPTQ as GPTQ
from onecomp.quantizer.gptq.result import GPTQResult as GPTQResult
