"""Which model, in which precision, on which device."""

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from onecomp.errors import ConfigError, InputError
from onecomp.models.source import ModelSource, reason

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
TOKENIZER_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)
"""What Transformers raises for tokenizer files that are missing, damaged or of an unknown kind."""


@dataclass
class ModelConfig:
    """A model by Hub id or directory.

    Args:
        model_id: Hub id or directory; wins over ``path``.
        path: Directory.
        dtype: Precision of weights and activations: ``float16``, ``bfloat16``, ``float32``, or
            ``auto`` for the checkpoint's own. Gemma-3 overflows in float16 and is computed in
            bfloat16, as its ``model_type`` says.
        device: ``auto`` (CUDA, then MPS, then CPU) or a torch device.
        trust_remote_code: Allow the model's own Python code to run.

    Raises:
        ConfigError: No model, or an unknown dtype or device.
    """

    model_id: str | None = None
    path: str | None = None
    dtype: str = "float16"
    device: str = "auto"
    _: KW_ONLY
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.model_id is None and self.path is None:
            problems.append("neither model_id nor path is given. Give one of them.")
        if self.dtype not in {*DTYPES, "auto"}:
            problems.append(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)} or auto.")
        if not _is_device(self.device):
            problems.append(
                f"device={self.device!r}: must be auto or a torch device, e.g. cpu or cuda:0."
            )
        if problems:
            raise ConfigError("ModelConfig", problems)

    def get_model_id_or_path(self) -> str:
        """``model_id`` where given, otherwise ``path``."""
        return str(self.model_id if self.model_id is not None else self.path)

    @cached_property
    def source(self) -> ModelSource:
        """The model's files, found and checked at first use."""
        return ModelSource.open(
            self.get_model_id_or_path(), trust_remote_code=self.trust_remote_code
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        config = self.load_config()
        if self.dtype == "auto":
            return config.dtype or torch.float32
        if self.dtype == "float16" and config.model_type.startswith("gemma3"):
            return torch.bfloat16
        return DTYPES[self.dtype]

    @property
    def training_dtype(self) -> torch.dtype:
        """The dtype to train in: gradients would vanish in float16."""
        dtype = self.torch_dtype
        return torch.float32 if dtype == torch.float16 else dtype

    def get_device(self) -> torch.device:
        """A concrete device."""
        if self.device != "auto":
            return torch.device(self.device)
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    def load_config(self) -> PretrainedConfig:
        """The model's Hugging Face configuration."""
        return self.source.config

    def load_model(self, device_map: str | dict | None = None) -> PreTrainedModel:
        """The whole model in evaluation mode, for callers that ask for a live one."""
        model = AutoModelForCausalLM.from_pretrained(
            self.source.directory,
            dtype=self.torch_dtype,
            device_map=device_map,
            trust_remote_code=self.trust_remote_code,
        )
        return (model if device_map is not None else model.to(self.get_device())).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; padding uses the end-of-text token where none is set.

        Raises:
            InputError: The model has no tokenizer, or a damaged one.
        """
        tokenizer = load_tokenizer(self.source.directory, trust_remote_code=self.trust_remote_code)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def has_additional_data(self) -> bool:
        """Whether the directory carries data beyond the model (rotated models do)."""
        return False


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's directory.

    Raises:
        InputError: There is none, or it is damaged. For some kinds of model Transformers makes a
            tokenizer without vocabulary where the files are missing; that counts as none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        # The tokenizers library raises bare Exception where tokenizer.json is not as it should be.
        if type(error) is not Exception and not isinstance(error, TOKENIZER_ERRORS):
            raise
        raise _no_tokenizer(directory, reason(error)) from error
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if not set(tokenizer.get_vocab().values()) - special:
        raise _no_tokenizer(directory, "its vocabulary is empty")
    return tokenizer


def _no_tokenizer(directory: Path, why: str) -> InputError:
    return InputError(
        directory,
        f"has no tokenizer that can be read ({why}). Put the tokenizer files of the original "
        "model (tokenizer.json, tokenizer_config.json) there, or download the model again.",
    )


def _is_device(name: str) -> bool:
    try:
        return name == "auto" or bool(torch.device(name))
    except RuntimeError:
        return False
