"""A filter that keeps clean prose and drops web-page debris."""

import re
from itertools import groupby

MIN_CHARACTERS = 100
MIN_WORDS = 20
MIN_SENTENCE_ENDS = 2
MAX_REPEATS = 4
MAX_URLS = 5
MIN_ASCII_RATIO = 0.8
MAX_SYMBOL_RATIO = 0.05
MAX_DIGIT_RATIO = 0.3
WORD_LENGTHS = (2.0, 15.0)

_SYMBOLS = frozenset("{}[]<>|\\^~`")
_URL = re.compile(r"https?://|www\.", re.IGNORECASE)
_TAG = re.compile(
    r"<(?:!doctype|html|head|body|div|span|p|a|br|img|ul|ol|li|table|tr|td|h[1-6]|form|input|"
    r"meta|link|script|style|iframe)\b",
    re.IGNORECASE,
)


def is_clean_prose(text: str) -> bool:
    r"""Whether a C4 document reads like prose: every rule below holds.

    At least 100 characters, 80 % of them ASCII; at least 20 words of 2 to 15 characters on
    average; at least two of ``.!?``; no word five times in a row; no opening HTML or script
    tag; at most 5 % of ``{}[]<>|\^~```, 30 % digits and five URLs.
    """
    return (
        len(text) >= MIN_CHARACTERS
        and _has_prose_characters(text)
        and _has_prose_words(text.split())
        and _TAG.search(text) is None
        and len(_URL.findall(text)) <= MAX_URLS
    )


def _has_prose_characters(text: str) -> bool:
    def ratio(count: int) -> float:
        return count / len(text)

    return (
        ratio(sum(c.isascii() for c in text)) >= MIN_ASCII_RATIO
        and ratio(sum(c in _SYMBOLS for c in text)) <= MAX_SYMBOL_RATIO
        and ratio(sum(c.isdigit() for c in text)) <= MAX_DIGIT_RATIO
        and sum(c in ".!?" for c in text) >= MIN_SENTENCE_ENDS
    )


def _has_prose_words(words: list[str]) -> bool:
    if len(words) < MIN_WORDS:
        return False
    shortest, longest = WORD_LENGTHS
    mean_length = sum(map(len, words)) / len(words)
    longest_run = max(len(list(run)) for _, run in groupby(words))
    return shortest <= mean_length <= longest and longest_run <= MAX_REPEATS
