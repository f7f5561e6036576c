"""English text that every CPython carries: topics of its reference manual."""

import sys
from pathlib import Path
from pydoc_data.topics import topics


def write_demo_texts(directory: Path) -> tuple[Path, Path]:
    """Write the topics of the manual, in alphabetical order, half to each of two files.

    Args:
        directory: Where ``calibration.txt`` (about 200 kB) and ``evaluation.txt`` (260 kB) go.

    Returns:
        The paths of the calibration text and the evaluation text; they share no topic.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(topics)
    middle = len(names) // 2
    calibration, evaluation = directory / "calibration.txt", directory / "evaluation.txt"
    calibration.write_text(join_topics(names[:middle]), encoding="utf-8")
    evaluation.write_text(join_topics(names[middle:]), encoding="utf-8")
    return calibration, evaluation


def join_topics(names: list[str]) -> str:
    """The named topics, a blank line between each two of them."""
    return "\n\n".join(topics[name].strip() for name in names) + "\n"


if __name__ == "__main__":
    write_demo_texts(Path(sys.argv[1]))
