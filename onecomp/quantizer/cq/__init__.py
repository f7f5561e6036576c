"""CQ: settings, result and algorithm."""

from onecomp.quantizer.cq.quantizer import CQ as CQ
from onecomp.quantizer.cq.result import CQResult as CQResult
