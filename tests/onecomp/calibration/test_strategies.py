import logging
from typing import Any

import pytest
import torch

from onecomp.calibration.config import STRATEGIES, CalibrationConfig
from onecomp.calibration.strategies import make_samples
from onecomp.errors import InputError

LENGTH, NUM_SAMPLES = 4, 3
BLANK_LINE, BOS = 1000, 1002
LONG = [" ".join(f"w{10 * i + j}" for j in range(6)) for i in range(40)]
"""Document i has the six tokens 10 i .. 10 i + 5."""


def config(strategy: str, dataset: str = "texts.txt", **settings: Any) -> CalibrationConfig:
    sizes: dict[str, Any] = {"max_length": LENGTH, "num_calibration_samples": NUM_SAMPLES}
    sizes.update(settings)
    return CalibrationConfig(dataset, strategy=strategy, **sizes)


def joined_ids(texts: list[str]) -> list[int]:
    """Slow reference: what the joined text is in tokens of the test's tokenizer."""
    ids: list[int] = []
    for text in texts:
        ids += [BLANK_LINE] if ids else []
        ids += [int(word[1:]) for word in text.split()]
    return ids


def counted(texts: list[str], taken: list[str]):
    for text in texts:
        taken.append(text)
        yield text


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dataset", ["texts.txt", "c4", "wikitext2"])
def test_every_strategy_gives_full_rows_of_int64_and_keeps_to_the_number(words, strategy, dataset):
    samples = make_samples(LONG, words, config(strategy, dataset))
    assert samples.input_ids.shape == (NUM_SAMPLES, LENGTH)
    assert samples.input_ids.dtype == samples.attention_mask.dtype == torch.int64
    assert samples.attention_mask.all()
    assert samples.input_ids.untyped_storage().nbytes() == NUM_SAMPLES * LENGTH * 8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_seed_decides_and_the_global_random_state_is_untouched(words, strategy):
    before = torch.get_rng_state()
    hashes = [
        make_samples(LONG, words, config(strategy, seed=seed)).content_hash()
        for seed in (0, 0, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == (3 if strategy.endswith("rand") else 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_global_seed_changes_nothing(words, strategy):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = make_samples(LONG, words, config(strategy)).content_hash()
        torch.manual_seed(2)
        assert make_samples(LONG, words, config(strategy)).content_hash() == first


def test_drop_head_takes_the_start_of_the_first_long_documents(words):
    texts = ["w1 w2 w3", LONG[0], "w4", "w5 w6 w7 w8", LONG[1], LONG[2]]
    samples = make_samples(texts, words, config("drop_head"))
    assert samples.input_ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]


def test_drop_rand_takes_windows_of_different_documents_at_different_places(words):
    documents, offsets = set(), set()
    for seed in range(20):
        ids = make_samples(LONG, words, config("drop_rand", seed=seed)).input_ids
        assert torch.equal(ids, ids[:, :1] + torch.arange(LENGTH))
        chosen = (ids[:, 0] // 10).tolist()
        assert len(set(chosen)) == NUM_SAMPLES
        documents.update(chosen)
        offsets.update((ids[:, 0] % 10).tolist())
    assert documents == set(range(4 * NUM_SAMPLES))  # not always the first three
    assert offsets == {0, 1, 2}


@pytest.mark.parametrize("strategy", ["drop_head", "drop_rand"])
def test_drop_reads_no_further_than_it_must(words, strategy):
    taken: list[str] = []
    make_samples(counted(LONG * 50, taken), words, config(strategy))
    assert len(taken) <= 128


def test_drop_adds_special_tokens_to_each_document_as_the_tokenizer_does(words_with_bos):
    samples = make_samples(LONG, words_with_bos, config("drop_head"))
    assert samples.input_ids.tolist() == [[BOS, 10 * i, 10 * i + 1, 10 * i + 2] for i in range(3)]


@pytest.mark.parametrize("strategy", ["concat_chunk", "concat_chunk_align"])
def test_chunks_are_consecutive_pieces_of_the_joined_text(words, strategy):
    samples = make_samples([f"  {text}\n" for text in LONG], words, config(strategy))
    assert samples.input_ids.flatten().tolist() == joined_ids(LONG)[: NUM_SAMPLES * LENGTH]


@pytest.mark.parametrize("strategy", ["concat_chunk", "concat_chunk_align"])
def test_chunks_are_as_many_as_the_text_has_and_say_so(words, strategy, caplog):
    with caplog.at_level(logging.WARNING, "onecomp"):
        samples = make_samples(LONG[:2], words, config(strategy, num_calibration_samples=100))
    assert samples.input_ids.shape == (3, LENGTH)  # 13 tokens
    assert "the text yields 3 samples of max_length=4 tokens" in caplog.text


def test_concat_chunk_of_c4_joins_the_first_documents_only(words):
    settings = {"num_calibration_samples": 2, "max_length": 7}
    chunk = make_samples(LONG, words, config("concat_chunk", "c4", **settings))
    align = make_samples(LONG, words, config("concat_chunk_align", "c4", **settings))
    assert chunk.input_ids.tolist() == [joined_ids(LONG)[:7]]
    assert align.input_ids.flatten().tolist() == joined_ids(LONG)[:14]


@pytest.mark.parametrize(
    ("strategy", "dataset", "reads_all"),
    [
        ("concat_chunk_align", "c4", False),
        ("concat_chunk_align", "texts.txt", False),
        ("concat_chunk", "texts.txt", False),
        ("concat_rand", "c4", False),
        ("concat_rand", "texts.txt", True),
    ],
)
def test_joining_reads_documents_until_the_tokens_suffice(words, strategy, dataset, reads_all):
    taken: list[str] = []
    make_samples(counted(LONG, taken), words, config(strategy, dataset))
    assert (len(taken) == len(LONG)) == reads_all


def test_reading_goes_on_where_tokens_are_longer_than_expected(words_with_bos):
    # One token of 60 characters a document: the first portion of text is far from enough.
    texts = ["x" * 60] * 500
    settings = config("concat_chunk", num_calibration_samples=200)
    ids = make_samples(texts, words_with_bos, settings).input_ids.flatten().tolist()
    unknown = 1001
    assert ids == [BOS, *[unknown, BLANK_LINE] * 400][:800]  # BOS once, blank lines throughout


def test_concat_rand_takes_windows_of_the_joined_text_and_reaches_both_ends(words):
    text = LONG[:2]  # 13 tokens: starts 0 to 9
    joined = joined_ids(text)
    starts = set()
    for row in make_samples(
        text, words, config("concat_rand", num_calibration_samples=200)
    ).input_ids:
        start = joined.index(int(row[0]))
        assert row.tolist() == joined[start : start + LENGTH]
        starts.add(start)
    assert starts == set(range(10))


@pytest.mark.parametrize("strategy", ["concat_chunk", "concat_chunk_align", "concat_rand"])
def test_a_text_of_exactly_one_sample_will_do(words, strategy):
    samples = make_samples(["w1 w2 w3 w4"], words, config(strategy, num_calibration_samples=1))
    assert samples.input_ids.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("strategy", ["concat_chunk", "concat_chunk_align", "concat_rand"])
def test_joined_text_gets_special_tokens_once(words_with_bos, strategy):
    settings = config(strategy, num_calibration_samples=1, max_length=28)
    ids = make_samples(LONG[:4], words_with_bos, settings).input_ids.flatten().tolist()
    assert ids == [BOS, *joined_ids(LONG[:4])]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_text_shorter_than_a_sample_is_refused_with_the_numbers(words, strategy):
    message = (
        r"texts\.txt: the text has 3 tokens, fewer than one sample of max_length=4\. "
        r"Use a max_length of at most 3, or more text\."
    )
    with pytest.raises(InputError, match=message):
        make_samples(["w1 w2 w3"], words, config(strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_text_is_refused(words, strategy):
    with pytest.raises(InputError, match="the text has 0 tokens"):
        make_samples([], words, config(strategy))


@pytest.mark.parametrize("strategy", ["drop_head", "drop_rand"])
def test_documents_are_joined_where_too_few_are_long(words, strategy, caplog):
    texts = [f"w{i} w{i + 1}" for i in range(0, 100, 2)]
    with caplog.at_level(logging.WARNING, "onecomp"):
        ids = make_samples(texts, words, config(strategy)).input_ids
    assert torch.equal(ids, ids[:, :1] + torch.arange(LENGTH))
    stands_for = {"drop_head": "concat_chunk", "drop_rand": "concat_rand"}[strategy]
    assert (
        "0 of 50 documents have max_length=4 tokens, fewer than num_calibration_samples=3: "
        f"the documents are joined, as strategy={stands_for} does"
    ) in caplog.text


def test_documents_joined_instead_of_dropped_still_follow_the_seed(words):
    texts = [f"w{i} w{i + 1}" for i in range(0, 100, 2)]
    hashes = {
        make_samples(texts, words, config("drop_rand", seed=seed)).content_hash()
        for seed in range(3)
    }
    assert len(hashes) > 1


@pytest.mark.parametrize("strategy", ["drop_head", "drop_rand"])
def test_too_little_text_to_join_is_refused_with_what_it_yields(words, strategy):
    message = (
        r"the text has 10 tokens and yields 2 samples of max_length=4, fewer than "
        r"num_calibration_samples=3\. Use at most 2 samples, a smaller max_length, or more text\."
    )
    with pytest.raises(InputError, match=message):
        make_samples(["w1 w2"] * 5, words, config(strategy))


@pytest.mark.parametrize("strategy", ["drop_head", "drop_rand"])
def test_wikitext2_is_joined_instead_of_dropped(words, strategy, caplog):
    with caplog.at_level(logging.WARNING, "onecomp"):
        dropped = make_samples(LONG, words, config(strategy, "wikitext2"))
    joined = make_samples(LONG, words, config("concat_rand", "wikitext2"))
    assert dropped.content_hash() == joined.content_hash()
    assert f"strategy={strategy} needs long documents" in caplog.text


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_texts_beyond_the_tokenizers_limit_raise_no_warning(words, strategy, caplog):
    words.deprecation_warnings.clear()  # it warns only once
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        make_samples([" ".join(LONG)] * 20, words, config(strategy))
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert "sequence length" not in caplog.text
