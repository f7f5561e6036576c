"""OneBit: settings, result, algorithm and inference layer."""

from onecomp.quantizer.onebit.layer import OnebitLinear as OnebitLinear
from onecomp.quantizer.onebit.quantizer import Onebit as Onebit
from onecomp.quantizer.onebit.result import OnebitResult as OnebitResult
