"""QBB: settings, result and algorithm."""

from onecomp.quantizer.qbb.quantizer import QBB as QBB
from onecomp.quantizer.qbb.result import QBBResult as QBBResult
