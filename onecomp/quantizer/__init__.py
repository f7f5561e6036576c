"""Quantizers: one folder a method, the same files in each."""

from onecomp.quantizer.arb import ARB as ARB
from onecomp.quantizer.arb import ARBResult as ARBResult
from onecomp.quantizer.autobit import AutoBitQuantizer as AutoBitQuantizer
from onecomp.quantizer.autobit import SurveyResult as SurveyResult
from onecomp.quantizer.base import Quantizer as Quantizer
from onecomp.quantizer.cq import CQ as CQ
from onecomp.quantizer.cq import CQResult as CQResult
from onecomp.quantizer.dbf import DBF as DBF
from onecomp.quantizer.dbf import DBFResult as DBFResult
from onecomp.quantizer.dbf import DoubleBinaryLinear as DoubleBinaryLinear
from onecomp.quantizer.gptq import GPTQ as GPTQ
from onecomp.quantizer.gptq import GPTQResult as GPTQResult
from onecomp.quantizer.jointq import JointQ as JointQ
from onecomp.quantizer.jointq import JointQResult as JointQResult
from onecomp.quantizer.onebit import Onebit as Onebit
from onecomp.quantizer.onebit import OnebitLinear as OnebitLinear
from onecomp.quantizer.onebit import OnebitResult as OnebitResult
from onecomp.quantizer.qbb import QBB as QBB
from onecomp.quantizer.qbb import QBBResult as QBBResult
from onecomp.quantizer.quip import QUIP as QUIP
from onecomp.quantizer.quip import QUIPResult as QUIPResult
from onecomp.quantizer.result import QuantizationResult as QuantizationResult
from onecomp.quantizer.result_loader import ResultLoader as ResultLoader
from onecomp.quantizer.rtn import RTN as RTN
from onecomp.quantizer.rtn import RTNResult as RTNResult
from onecomp.quantizer.several import Several as Several
