"""What DeepSpeed builds its kernels with at first use; it has none of its own for CPUs."""

import os
import shutil
import socket
import sys
from pathlib import Path

from onecomp.errors import InputError


def require_compiler() -> None:
    """Check that a C++ compiler and ninja are found.

    Raises:
        InputError: They are not; names the node and what to install.
    """
    compiler = os.environ.get("CXX", "g++")
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([os.environ.get("PATH", ""), beside])
    missing = [tool for tool in (compiler, "ninja") if shutil.which(tool, path=path) is None]
    if missing:
        raise InputError(
            f"node {socket.gethostname()}",
            f"has no {' and no '.join(missing)} on its PATH. DeepSpeed builds a kernel with them "
            "when it first runs on a CPU. Install g++ and ninja (apt-get install g++ ninja-build).",
        )
