"""ARB: settings, result and algorithm."""

from onecomp.quantizer.arb.quantizer import ARB as ARB
from onecomp.quantizer.arb.result import ARBResult as ARBResult
