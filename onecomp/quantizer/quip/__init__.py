"""QuIP: incoherence processing and rounding with feedback; settings and result."""

from onecomp.quantizer.quip.quantizer import QUIP as QUIP
from onecomp.quantizer.quip.result import QUIPResult as QUIPResult
