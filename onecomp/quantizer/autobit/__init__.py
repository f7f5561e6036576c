"""Mixed precision: a method for each layer, within a number of bits on average."""

from onecomp.quantizer.autobit.assignment import Assignment as Assignment
from onecomp.quantizer.autobit.quantizer import AutoBitQuantizer as AutoBitQuantizer
from onecomp.quantizer.autobit.result import SurveyResult as SurveyResult
