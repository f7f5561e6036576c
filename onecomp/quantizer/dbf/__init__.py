"""Double binary factorisation: settings, result and layer."""

from onecomp.quantizer.dbf.layer import DoubleBinaryLinear as DoubleBinaryLinear
from onecomp.quantizer.dbf.quantizer import DBF as DBF
from onecomp.quantizer.dbf.result import DBFResult as DBFResult
