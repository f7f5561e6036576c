"""Quantization error propagation: later layers make up for the errors of earlier ones."""

from onecomp.qep.config import QEPConfig as QEPConfig
from onecomp.qep.correction import corrected_weight as corrected_weight
