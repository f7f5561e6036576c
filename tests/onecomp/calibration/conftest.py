"""A tokenizer of whole words: word ``w7`` is token 7, so a test can count tokens by eye."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NUM_WORDS = 1000


def word_tokenizer(*, has_bos: bool = False, model_max_length: int = 8) -> PreTrainedTokenizerFast:
    """Ids 0..999 are the words, 1000 a blank line, 1001 unknown, 1002 BOS, 1003 EOS."""
    vocabulary = [f"w{i}" for i in range(NUM_WORDS)] + ["\n\n", "<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n\n"), "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    if has_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", NUM_WORDS + 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        bos_token="<s>" if has_bos else None,
        model_max_length=model_max_length,
    )


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """Adds no special token; its limit of 8 tokens is exceeded by most texts of the tests."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def words_with_bos() -> PreTrainedTokenizerFast:
    return word_tokenizer(has_bos=True)
