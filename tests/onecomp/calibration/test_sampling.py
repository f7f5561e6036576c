import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from onecomp.calibration.sampling import GREEDY_TOKENS, SAMPLES_PER_BATCH, sample_from_model
from onecomp.errors import InputError

VOCABULARY = 1010  # six rows more than the tokenizer has tokens
SPECIAL = [1001, 1002, 1003]
SIZES = {"num_samples": 5, "length": 24}


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def test_the_seed_decides_and_the_global_random_state_is_untouched(model, words):
    before = torch.get_rng_state()
    hashes = [
        sample_from_model(model, words, **SIZES, seed=seed).content_hash() for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("num_samples", [1, SAMPLES_PER_BATCH, SAMPLES_PER_BATCH + 1])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_every_row_has_exactly_the_length(model, words_with_bos, num_samples, length):
    samples = sample_from_model(
        model, words_with_bos, num_samples=num_samples, length=length, seed=0
    )
    assert samples.input_ids.shape == (num_samples, length)
    assert samples.input_ids.dtype == samples.attention_mask.dtype == torch.int64
    assert samples.attention_mask.all()
    assert not samples.input_ids.is_inference()


def test_special_and_unknown_tokens_are_never_drawn(model, words_with_bos):
    with torch.no_grad():  # the model wants nothing but these
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    samples = sample_from_model(model, words_with_bos, num_samples=40, length=60, seed=0)
    drawn = samples.input_ids[:, 1:]
    assert not torch.isin(drawn, torch.tensor(SPECIAL)).any()
    assert drawn.max() < len(words_with_bos)
    assert len(drawn.unique()) > 500  # zero logits: uniform over 1001 ordinary tokens


def test_added_special_tokens_are_never_drawn(model, words: PreTrainedTokenizerFast):
    marked = type(words)(tokenizer_object=words.backend_tokenizer, unk_token="<unk>")
    marked.add_tokens(["<turn>"], special_tokens=True)
    turn = marked.convert_tokens_to_ids("<turn>")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids = sample_from_model(model, marked, num_samples=40, length=60, seed=0).input_ids
    assert turn < len(marked)
    assert turn not in ids


def test_samples_start_with_bos_and_differ_from_the_next_token_on(model, words, words_with_bos):
    with_bos = sample_from_model(model, words_with_bos, **SIZES, seed=0).input_ids
    without = sample_from_model(model, words, **SIZES, seed=0).input_ids
    assert (with_bos[:, 0] == words_with_bos.bos_token_id).all()
    assert with_bos[:, 1].unique().numel() > 1
    assert not torch.isin(without, torch.tensor(SPECIAL)).any()


def test_the_cache_gives_what_whole_forwards_give(model, words):
    """Slow reference without a cache: the greedy tokens are the best guess of the prefix."""
    model.eval()
    ids = sample_from_model(model, words, **SIZES, seed=0).input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :GREEDY_TOKENS]
    logits[..., SPECIAL] = -torch.inf
    logits[..., len(words) :] = -torch.inf
    assert torch.equal(ids[:, 1 : 1 + GREEDY_TOKENS], logits.argmax(-1))


def test_later_tokens_follow_the_models_distribution(model, words):
    """A model that is sure of one token is followed to the end."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
        model.lm_head.bias[7] = 100.0
    ids = sample_from_model(model, words, **SIZES, seed=0).input_ids
    assert (ids[:, 1:] == 7).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_and_dropout_is_off(model, words, training):
    model.eval()
    expected = sample_from_model(model, words, **SIZES, seed=0)
    model.train(training)
    samples = sample_from_model(model, words, **SIZES, seed=0)
    assert model.training is training
    assert samples.content_hash() == expected.content_hash()


def test_a_length_beyond_the_models_positions_is_refused(model, words):
    message = r"max_length=65 is beyond the model's 64 positions\. Use a max_length of at most 64\."
    with pytest.raises(InputError, match=message):
        sample_from_model(model, words, num_samples=1, length=65, seed=0)


def test_a_model_that_gives_no_numbers_is_refused(model, words):
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match=r"logits after 1 sampled tokens are not finite in torch"):
        sample_from_model(model, words, **SIZES, seed=0)
