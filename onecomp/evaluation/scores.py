"""Scores of a checkpoint directory, as the command line reports them."""

from dataclasses import asdict, dataclass

from onecomp.evaluation.perplexity import perplexity_of_tokens
from onecomp.evaluation.texts import load_texts, tokenize_texts
from onecomp.export.load import load_quantized_model
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
        stride: int = 2048,
        max_tokens: int | None = None,
    ) -> "PerplexityRequest":
        """Read the text now, so that a mistake is found before any work.

        Raises:
            InputError: The text cannot be had.
        """
        return cls(text_name, load_texts(text_name), max_length, stride, max_tokens)


def evaluate_checkpoint(directory: object, request: PerplexityRequest) -> dict[str, object]:
    """Perplexity of a checkpoint, quantized or not, with everything that the number depends on."""
    model, tokenizer = load_quantized_model(str(directory))
    tokens = tokenize_texts(tokenizer, request.texts, source=request.text_name)
    tokens = tokens[: request.max_tokens]
    with dense_layers(model, model.dtype):
        result = perplexity_of_tokens(
            model, tokens, max_length=request.max_length, stride=request.stride
        )
    return {"text": request.text_name, **asdict(result)}
