"""From a checkpoint directory to a better one: where things are, and what goes on after a stop."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecomp.errors import InputError, UserError
from onecomp.events import open_event_log
from onecomp.export.checkpoint import ADAPTER_FOLDER, CONFIG, write_json
from onecomp.export.install import (
    install_checkpoint,
    require_apart,
    require_directory,
    require_no_checkpoint,
)
from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model, read_json
from onecomp.export.quant_config import check_quant_config
from onecomp.lease import hold, require_free
from onecomp.models import ModelConfig, ModelSource
from onecomp.places import run_directory_of
from onecomp.post_process.base import (
    CheckpointProcess,
    Outcome,
    PostQuantizationProcess,
    entry_of,
    run_and_record,
    settings_of,
)
from onecomp.post_process.patching import patch_checkpoint
from onecomp.storage import remove_tree
from onecomp.store import RUN_FILE

logger = logging.getLogger(__name__)

JOB_FILE = "postprocess.json"
"""What is being made in a run directory of a post-process."""
STAGING = "checkpoint"
SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
"""Entries of a configuration that quantizing does not change."""


@dataclass(frozen=True)
class PostProcessJob:
    """A checkpoint, a process, and a place for the result."""

    checkpoint: Path
    output: Path
    process: PostQuantizationProcess
    model_config: ModelConfig
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """Directory of what must survive an interruption."""
        return Path(str(run_directory_of(self.output)))

    def check(self) -> None:
        """Check what can be checked before any work.

        Raises:
            InputError: A place that cannot be used, a checkpoint that is not quantized, or a work
                directory of another job.
        """
        self._check_checkpoint()
        source = self.model_config.source.directory
        for place in (self.checkpoint, source):
            require_apart(self.output, self.work, place)
        require_directory(self.output)
        if self.overwrite:
            return
        if (self.work / RUN_FILE).exists():
            raise InputError(
                self.work,
                "belongs to a run of `onecomp quantize`. Give another --output, or --overwrite to "
                "begin anew.",
            )
        found = self.work / JOB_FILE
        if found.exists() and read_json(found) != self.record():
            raise InputError(
                self.work,
                "belongs to another post-process, of other settings or another checkpoint. Give "
                "another --output, or --overwrite to begin anew.",
            )
        if not self._was_cut_off:
            require_no_checkpoint(self.output)

    def _check_checkpoint(self) -> None:
        config = require_quantized(self.checkpoint)
        check_quant_config(config["quantization_config"], self.checkpoint)
        if (self.checkpoint / ADAPTER_FOLDER).exists():
            raise InputError(
                self.checkpoint,
                "has LoRA adapters, which this process would not see and its result would lack. "
                "Train the checkpoint first, and adapters last.",
            )
        source = self.model_config.source.directory
        original = read_json(source / CONFIG)
        differ = [key for key in SHAPE if original.get(key) != config.get(key)]
        if differ:
            what = ", ".join(f"{key} {original.get(key)} / {config.get(key)}" for key in differ)
            raise InputError(
                source,
                f"is not the model that {self.checkpoint} was made of ({what}). Name that one with "
                "--model.",
            )

    @property
    def _was_cut_off(self) -> bool:
        """Whether this job ended while it moved the checkpoint to its place."""
        return (
            not (self.output / CONFIG).exists()
            and (self.work / JOB_FILE).exists()
            and (self.work / STAGING).is_dir()
        )

    def record(self) -> dict[str, Any]:
        """What fixes the result, as plain JSON values."""
        source, checkpoint = self.model_config.source, str(self.checkpoint.resolve())
        quantized = ModelSource(checkpoint, self.checkpoint, source.trust_remote_code)
        return {
            "model": {
                "id": str(source.directory.resolve()),
                "hash": source.content_hash,
                "dtype": self.model_config.dtype,
                "trust_remote_code": source.trust_remote_code,
            },
            "checkpoint": {"path": checkpoint, "hash": quantized.content_hash},
            "process": {
                "class": type(self.process).__name__,
                **{
                    name: value
                    for name, value in settings_of(self.process).items()
                    if name not in self.process.places
                },
            },
        }

    def run(self) -> dict[str, Any]:
        """Do it; the new checkpoint appears complete or not at all.

        Returns:
            What the new checkpoint says of the process.
        """
        self.check()
        require_free(self.work)
        if self.overwrite:
            remove_tree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            with hold(self.work):
                return self._run()
        except UserError:  # the corrected job is another, and would be refused
            if {path.name for path in self.work.iterdir()} <= {JOB_FILE}:
                remove_tree(self.work)
            raise

    def _run(self) -> dict[str, Any]:
        write_json(self.work / JOB_FILE, self.record())
        entry = self._improve()
        log = open_event_log(self.work)
        log.append("post_process", entry)
        log.flush()
        install_checkpoint(self.work / STAGING, self.output)
        return entry

    def _improve(self) -> dict[str, Any]:
        staging = self.work / STAGING
        remove_tree(staging)
        if not isinstance(self.process, CheckpointProcess):
            return self._improve_live(staging)
        outcome = self.process.improve(self.checkpoint, self.work, self.model_config)
        entry = entry_of(self.process, outcome)
        self._write(staging, entry, outcome)
        return entry

    def _write(self, staging: Path, entry: Mapping[str, Any], outcome: Outcome) -> None:
        changed = self.work if outcome.executed else self.work / "nothing"
        patch_checkpoint(self.checkpoint, changed, staging, entry)

    def _improve_live(self, staging: Path) -> dict[str, Any]:
        model, _ = load_quantized_model(
            self.checkpoint,
            device_map="cpu",
            trust_remote_code=self.model_config.trust_remote_code,
        )
        entry = run_and_record(self.process, model, self.model_config)
        save_live_model(model, staging, source_dir=self.checkpoint)
        return entry


def require_quantized(checkpoint: Path) -> dict[str, Any]:
    """The configuration of a checkpoint.

    Raises:
        InputError: It is none, or not quantized.
    """
    if not (checkpoint / CONFIG).exists():
        raise InputError(checkpoint, f"holds no {CONFIG}: it is no checkpoint.")
    config = read_json(checkpoint / CONFIG)
    if not config.get("quantization_config"):
        raise InputError(
            checkpoint,
            "is not quantized: it has no layers that a post-process could train. Give the "
            "directory that `onecomp quantize` wrote.",
        )
    return config


def original_model(
    checkpoint: Path, model: str | None, dtype: str, *, trust_remote_code: bool
) -> ModelConfig:
    """The model that a checkpoint was quantized from.

    Args:
        checkpoint: Directory of the quantized model.
        model: Directory or Hub id; None for what the run directory beside the checkpoint says.
        dtype: As in ``ModelConfig``.
        trust_remote_code: As in ``ModelConfig``.

    Raises:
        InputError: The checkpoint is not quantized, or the model is not given and no run directory
            tells.
    """
    require_quantized(checkpoint)
    if model is None:
        work = Path(str(run_directory_of(checkpoint.resolve())))
        files = [work / name for name in (RUN_FILE, JOB_FILE) if (work / name).exists()]
        if not files:
            raise InputError(
                checkpoint,
                f"the original model is not known: there is no run directory {work}. Name it with "
                "--model.",
            )
        model = read_json(files[0])["model"]["id"]
    return ModelConfig(model, dtype=dtype, trust_remote_code=trust_remote_code)
