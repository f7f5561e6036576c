"""Round to nearest: settings and result."""

from onecomp.quantizer.rtn import layer as layer
from onecomp.quantizer.rtn.quantizer import RTN as RTN
from onecomp.quantizer.rtn.result import RTNResult as RTNResult
