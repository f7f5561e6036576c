import pytest

from onecomp.calibration.quality import is_clean_prose

PROSE = (
    "The river rises in the hills above the town. It runs through fields of barley and past two "
    "old mills! In a dry summer you can cross it on foot, and children often do so."
)


def with_words(*words: str) -> str:
    return f"{PROSE} {' '.join(words)}"


def test_prose_is_kept():
    assert is_clean_prose(PROSE)


@pytest.mark.parametrize(
    "text",
    [
        "Short. Very short. " * 5,
        "word. another! " + "ab " * 17 + "x" * 60,
        PROSE.replace(".", "").replace("!", ""),
        with_words("no", "no", "no", "no", "no"),
        with_words("<script>alert()"),
        with_words('<A HREF="x">'),
        with_words(*["http://a.b"] * 3, "or", *["www.c.d"] * 3),
        with_words("{x}[y]<z>|\\^~`{x}"),
        with_words("é" * 60),
        with_words(*[f"{i:05}" for i in range(20)]),
        with_words(*["internationalization" * 3 + str(i) for i in range(20)]),
        " ".join(["a", "b", "c", "d"] * 20) + " ends. here. " + "e f " * 10,
    ],
    ids=[
        "too few words", "too few words but long", "no sentence ends", "five in a row", "script",
        "upper-case tag", "six urls", "symbols", "not ascii", "digits", "long words",
        "short words",
    ],
)  # fmt: skip
def test_each_rule_alone_rejects(text):
    assert not is_clean_prose(text)


@pytest.mark.parametrize(
    "text",
    [
        with_words("no", "no", "no", "no"),
        with_words(*["http://a.b"] * 3, "or", *["www.c.d"] * 2),
        with_words("5", "<", "6"),
        with_words("é" * 30),
    ],
    ids=["four in a row", "five urls", "less-than sign", "some letters beyond ascii"],
)
def test_each_limit_is_inclusive(text):
    assert is_clean_prose(text)
