"""Settings every test runs under. Ray reads its variables on import, so they come first."""

import os

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # on Linux: every port on the loopback device only
    RAY_ENABLE_ZERO_COPY_TORCH_TENSORS="1",
    RAY_AUTH_MODE="disabled",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_worker_niceness="0",  # at Ray's 15 anything else on the machine starves the workers
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices, and processes side by side

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from cluster.connect import ZERO_COPY_WARNING

pytest_plugins = ["ray_head", "s3_server", "shared_cluster"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what needs a cluster last, and skip what needs a GPU where there is none."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{ZERO_COPY_WARNING}"))
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model_dir(family, **options)``: a directory as `save_tiny_model` writes it.

    The directory is shared by all tests of the session that ask for the same: do not write to it.
    """
    root = tmp_path_factory.mktemp("tiny_models")
    written: dict[str, Path] = {}

    def directory(family: str = "llama", **options: object) -> Path:
        key = f"{family} {sorted(options.items(), key=str)}"
        if key not in written:
            written[key] = save_tiny_model(family, root / f"{family}-{len(written)}", **options)
        return written[key]

    return directory
