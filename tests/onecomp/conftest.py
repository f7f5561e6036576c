"""What several modules' tests read."""

from pathlib import Path

import pytest
from tiny_models import sample_text


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A file of words to calibrate and evaluate on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(1500))
    return path
