"""Configurations of large models, from public knowledge, and shapes made of tiny ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onecomp.planning.costs import UnitCosts
from onecomp.planning.estimate import Estimate
from onecomp.planning.methods import method_shape
from onecomp.planning.model import PlannedModel
from onecomp.planning.request import Place
from onecomp.planning.shapes import ModelShape, TextShape
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, Quantizer

LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def _directory(root: Path, config: dict) -> Path:
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="session")
def llama_405b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration of Llama-3.1-405B and nothing else."""
    return _directory(tmp_path_factory.mktemp("llama-405b"), LLAMA_405B)


@pytest.fixture(scope="session")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of DeepSeek-V3, whose weights are stored in 8 bits."""
    return _directory(tmp_path_factory.mktemp("deepseek-v3"), DEEPSEEK_V3)


@pytest.fixture(scope="session")
def estimate_of() -> Callable:
    """``estimate_of(directory, gpu=..., num_workers=..., ...)``: a plan's estimate."""
    known: dict[tuple[Path, str], ModelShape] = {}  # tracing a large model takes a second

    def estimate(
        directory: Path,
        *,
        gpu: str = "H100",
        num_workers: int = 8,
        samples: int = 128,
        length: int = 2048,
        qep: bool = True,
        quantizer: Quantizer | None = None,
        price: float | None = None,
    ) -> Estimate:
        method = quantizer or GPTQ(groupsize=32, mse=True, actorder=True, static_groups=True)
        key = directory, method.name
        if key not in known:
            known[key] = PlannedModel.open(str(directory), "auto").shape(method)
        place = Place(num_workers, gpu=gpu, price_per_hour=price)
        hardware = place.hardware()
        number, settings = place.workers(hardware)
        costs = UnitCosts(
            known[key],
            method_shape(method),
            TextShape(samples, length) if method.flag_hessian else None,
            QEPConfig() if qep and method.flag_hessian else None,
            hardware,
            number,
        )
        return Estimate(costs, settings)

    return estimate
