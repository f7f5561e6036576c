"""OneComp: post-training quantization of large language models, in one process or on Ray."""

from onecomp.calibration import CalibrationConfig as CalibrationConfig
from onecomp.errors import ConfigError as ConfigError
from onecomp.errors import InputError as InputError
from onecomp.errors import LayerError as LayerError
from onecomp.errors import OneCompError as OneCompError
from onecomp.errors import WorkerError as WorkerError
from onecomp.evaluation import calculate_perplexity as calculate_perplexity
from onecomp.executor import Executor as Executor
from onecomp.executor import LocalExecutor as LocalExecutor
from onecomp.executor import default_executor as default_executor
from onecomp.export.load import QuantizedModelLoader as QuantizedModelLoader
from onecomp.export.load import load_quantized_model as load_quantized_model
from onecomp.log import setup_logger as setup_logger
from onecomp.models import ModelConfig as ModelConfig
from onecomp.qep import QEPConfig as QEPConfig
from onecomp.quantizer import GPTQ as GPTQ
from onecomp.quantizer import RTN as RTN
from onecomp.quantizer import GPTQResult as GPTQResult
from onecomp.quantizer import QuantizationResult as QuantizationResult
from onecomp.quantizer import Quantizer as Quantizer
from onecomp.quantizer import ResultLoader as ResultLoader
from onecomp.quantizer import RTNResult as RTNResult
from onecomp.runner import Runner as Runner

__all__ = [
    "GPTQ",
    "RTN",
    "CalibrationConfig",
    "ConfigError",
    "Executor",
    "GPTQResult",
    "InputError",
    "LayerError",
    "LocalExecutor",
    "ModelConfig",
    "OneCompError",
    "QEPConfig",
    "QuantizationResult",
    "QuantizedModelLoader",
    "Quantizer",
    "RTNResult",
    "ResultLoader",
    "Runner",
    "WorkerError",
    "calculate_perplexity",
    "default_executor",
    "load_quantized_model",
    "setup_logger",
]
