"""Scores of a checkpoint directory, as the command line reports them."""

from dataclasses import asdict, dataclass

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecomp.errors import ConfigError, InputError
from onecomp.evaluation.perplexity import perplexity_of_tokens, sliding_windows
from onecomp.evaluation.texts import load_texts, tokenize_texts
from onecomp.export.load import load_quantized_model
from onecomp.models import require_known_tokens, require_positions
from onecomp.quantizer.quant_linear import dense_layers


@dataclass(frozen=True)
class PerplexityRequest:
    """Which text, in which windows."""

    text_name: str
    texts: list[str]
    max_length: int
    stride: int
    max_tokens: int | None
    """Only the text's first tokens; None for all."""

    @classmethod
    def checked(
        cls,
        text_name: str,
        max_length: int = 2048,
        stride: int | None = None,
        max_tokens: int | None = None,
    ) -> "PerplexityRequest":
        """Read the text now, so that a mistake is found before any work.

        Args:
            text_name: As ``load_texts`` understands it.
            max_length: Tokens of a window, at least 2.
            stride: Tokens between the starts of windows, 1 to ``max_length``; None means
                ``max_length``.
            max_tokens: Only the text's first tokens, at least 2; None for all.

        Raises:
            ConfigError: A setting out of range.
            InputError: The text cannot be had.
        """
        stride = max_length if stride is None else stride
        sliding_windows(2, max_length=max_length, stride=stride)
        if max_tokens is not None and max_tokens < 2:
            raise ConfigError("perplexity", [f"max_tokens={max_tokens}: must be at least 2."])
        return cls(text_name, load_texts(text_name), max_length, stride, max_tokens)

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "tokens"]:
        """The text as the model reads it.

        Raises:
            InputError: Fewer than two tokens.
        """
        tokens = tokenize_texts(tokenizer, self.texts, source=self.text_name)
        return tokens[: self.max_tokens]

    def require_fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the text against a model, before any work.

        Args:
            model: Any causal language model, with or without weights.
            tokenizer: Its tokenizer.

        Raises:
            InputError: Fewer than two tokens, tokens that the model does not know, or windows
                longer than it can compute.
        """
        tokens = self.tokens(tokenizer)
        require_known_tokens(model, tokens)
        require_positions(model, min(self.max_length, len(tokens)))


def evaluate_checkpoint(directory: object, request: PerplexityRequest) -> dict[str, object]:
    """Perplexity of a checkpoint, quantized or not, with everything that the number depends on.

    Raises:
        InputError: The checkpoint is damaged or lacks a tokenizer, or text and model do not fit.
    """
    model, tokenizer = load_quantized_model(str(directory), adapters=True)
    if tokenizer is None:
        raise InputError(
            directory,
            "has no tokenizer, and a text cannot be scored without. Put the tokenizer files of "
            "the original model (tokenizer.json, tokenizer_config.json) there.",
        )
    tokens = request.tokens(tokenizer)
    with dense_layers(model, model.dtype):
        result = perplexity_of_tokens(
            model, tokens, max_length=request.max_length, stride=request.stride
        )
    return {"text": request.text_name, **asdict(result)}
