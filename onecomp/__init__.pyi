"""What ``import onecomp`` offers; each name is imported when it is first used."""

# Relative, because lazy_loader reads nothing else.

from .calibration import CalibrationConfig as CalibrationConfig
from .errors import ConfigError as ConfigError
from .errors import InputError as InputError
from .errors import LayerError as LayerError
from .errors import OneCompError as OneCompError
from .errors import WorkerError as WorkerError
from .evaluation import calculate_perplexity as calculate_perplexity
from .executor import Executor as Executor
from .executor import LocalExecutor as LocalExecutor
from .executor import default_executor as default_executor
from .export.load import QuantizedModelLoader as QuantizedModelLoader
from .export.load import load_quantized_model as load_quantized_model
from .log import setup_logger as setup_logger
from .models import ModelConfig as ModelConfig
from .planning.vram import VRAMBitwidthEstimation as VRAMBitwidthEstimation
from .planning.vram import estimate_target_bitwidth as estimate_target_bitwidth
from .planning.vram import estimate_wbits_from_vram as estimate_wbits_from_vram
from .post_process.base import PostQuantizationProcess as PostQuantizationProcess
from .post_process.blockwise.process import BlockWisePTQ as BlockWisePTQ
from .post_process.global_ptq import GlobalPTQ as GlobalPTQ
from .post_process.global_ptq_distributed import GlobalPTQDistributed as GlobalPTQDistributed
from .post_process.lora.process import PostProcessLoraSFT as PostProcessLoraSFT
from .post_process.lora.process import (
    PostProcessLoraTeacherOnlySFT as PostProcessLoraTeacherOnlySFT,
)
from .post_process.lora.process import PostProcessLoraTeacherSFT as PostProcessLoraTeacherSFT
from .qep import QEPConfig as QEPConfig
from .quantizer import ARB as ARB
from .quantizer import CQ as CQ
from .quantizer import DBF as DBF
from .quantizer import GPTQ as GPTQ
from .quantizer import QBB as QBB
from .quantizer import QUIP as QUIP
from .quantizer import RTN as RTN
from .quantizer import ARBResult as ARBResult
from .quantizer import AutoBitQuantizer as AutoBitQuantizer
from .quantizer import CQResult as CQResult
from .quantizer import DBFResult as DBFResult
from .quantizer import DoubleBinaryLinear as DoubleBinaryLinear
from .quantizer import GPTQResult as GPTQResult
from .quantizer import JointQ as JointQ
from .quantizer import JointQResult as JointQResult
from .quantizer import Onebit as Onebit
from .quantizer import OnebitLinear as OnebitLinear
from .quantizer import OnebitResult as OnebitResult
from .quantizer import QBBResult as QBBResult
from .quantizer import QuantizationResult as QuantizationResult
from .quantizer import Quantizer as Quantizer
from .quantizer import QUIPResult as QUIPResult
from .quantizer import ResultLoader as ResultLoader
from .quantizer import RTNResult as RTNResult
from .runner import Runner as Runner
