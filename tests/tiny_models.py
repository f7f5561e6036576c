"""Tiny random models of real architectures, a real tokenizer, and English-like text for them."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 256 + 2
"""All bytes, the end of the text and padding."""
MAX_POSITIONS = 512
HEAD_DIM = 16

WORDS = (
    "the a one some every this old new small large quick slow red green quiet bright river house "
    "garden city teacher child model number letter machine question answer road winter morning "
    "runs sees holds makes follows finds writes reads opens counts near under over with from into"
)

FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": partial(MistralConfig, sliding_window=None),
    "qwen2": Qwen2Config,
    "qwen3": partial(Qwen3Config, head_dim=HEAD_DIM),
    "phi3": Phi3Config,
    "gemma2": partial(Gemma2Config, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM),
    "gemma3": partial(Gemma3TextConfig, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM),
    "opt": OPTConfig,
}


def save_tiny_model(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **sizes: object,
) -> Path:
    """Write a random model of ``family`` and a byte-level tokenizer to ``directory``.

    Args:
        family: A key of `FAMILIES`.
        directory: Created if need be.
        dtype: Of the saved weights; they are drawn in float32.
        seed: Of the weights; nothing else of torch's random state is touched.
        max_shard_size: ``"100KB"`` or so splits the weights into shards with an index.
        **sizes: What `tiny_config` takes.

    Returns:
        ``directory``.
    """
    model = tiny_model(family, seed=seed, **sizes).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_model(family: str, *, seed: int = 0, **sizes: object) -> PreTrainedModel:
    """A random model of ``family``, float32, evaluation mode, weights as in `scale_weights`."""
    config = tiny_config(family, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        scale_weights(model)
    return model.eval()


def tiny_config(
    family: str,
    *,
    num_layers: int = 2,
    hidden_size: int = 64,
    intermediate_size: int | None = None,
    num_kv_heads: int | None = None,
    tie: bool = False,
) -> PreTrainedConfig:
    """Configuration of a tiny model; sizes are multiples of 32, heads have 16 dimensions.

    Args:
        family: A key of `FAMILIES`.
        num_layers: Blocks.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP; twice ``hidden_size`` if not given.
        num_kv_heads: Key and value heads; half the heads if not given. OPT has no such setting.
        tie: Input and output embeddings are one tensor.
    """
    num_heads = hidden_size // HEAD_DIM
    width = intermediate_size or 2 * hidden_size
    tokens = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    if family == "opt":
        mine = {"ffn_dim": width, "word_embed_proj_dim": hidden_size, "dropout": 0.0}
    else:
        kv_heads = num_kv_heads or num_heads // 2
        mine = {"intermediate_size": width, "num_key_value_heads": kv_heads}
    return FAMILIES[family](
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tie,
        **tokens,
        **mine,
    )


def scale_weights(model: nn.Module) -> None:
    """Draw weights at which every layer matters and the logits differ from token to token.

    Matrices get deviation 1 / sqrt(in), so that a layer keeps the size of its input; norms and
    biases get a random part, so that a path that forgets them changes the output.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: token ids 0 to 255 are bytes, any text survives."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=MAX_POSITIONS,
    )


def sample_text(num_words: int, seed: int = 0) -> str:
    """English-like text: sentences of 6 to 12 words, four a paragraph, blank lines between."""
    draw, words = random.Random(seed), WORDS.split()
    paragraphs: list[list[str]] = [[]]
    while num_words > 0:
        length = min(num_words, draw.randint(6, 12))
        num_words -= length
        if len(paragraphs[-1]) == 4:
            paragraphs.append([])
        paragraphs[-1].append(" ".join(draw.choices(words, k=length)).capitalize() + ".")
    return "\n\n".join(" ".join(sentences) for sentences in paragraphs) + "\n"
