"""What the commands of the command line do, given their options."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
import typer

from onecomp.calibration import CalibrationConfig
from onecomp.console import FAILED, print_result
from onecomp.errors import InputError
from onecomp.evaluation.scores import PerplexityRequest, evaluate_checkpoint
from onecomp.executor import default_executor
from onecomp.export.verify import verify_checkpoint
from onecomp.job import QuantizationJob, default_groupsize
from onecomp.models import ModelConfig, ModelSource, Skeleton, max_positions
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN, Quantizer
from onecomp.report import write_report
from onecomp.session import Session
from onecomp.store import RunDirectory

logger = logging.getLogger(__name__)

EVALUATION_LENGTH = 2048
"""Tokens of a window, as published perplexities have them."""


def quiet_libraries() -> None:
    """Keep what the libraries would say of every model and tokenizer they load off the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The options of ``onecomp quantize`` that say what is made."""

    model: str
    dtype: str
    trust_remote_code: bool
    quantizer: str
    wbits: int
    groupsize: int | None
    sym: bool
    mse: bool
    actorder: bool
    static_groups: bool
    qep: bool
    calibration_dataset: str
    text_key: str
    max_length: int
    num_calibration_samples: int
    seed: int

    def job(self) -> QuantizationJob:
        """The job that they describe."""
        model_config = ModelConfig(
            self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        method = self._method(-1 if self.groupsize is None else self.groupsize)
        if self.groupsize is None:
            skeleton = Skeleton.build(model_config.source, model_config.torch_dtype)
            groupsize = default_groupsize(method, skeleton)
            logger.info(
                "groupsize %d: the largest of 128, 64, 32 that divides every layer", groupsize
            )
            method = self._method(groupsize)
        calibration = CalibrationConfig(
            self.calibration_dataset,
            self.max_length,
            self.num_calibration_samples,
            strategy="drop_rand" if self.calibration_dataset == "c4" else "concat_chunk",
            seed=self.seed,
            text_key=self.text_key,
        )
        qep = QEPConfig() if self.qep and method.flag_hessian else None
        return QuantizationJob(model_config, method, calibration, qep)

    def _method(self, groupsize: int) -> Quantizer:
        if self.quantizer == "rtn":
            return RTN(wbits=self.wbits, groupsize=groupsize, sym=self.sym, mse=self.mse)
        return GPTQ(
            wbits=self.wbits,
            groupsize=groupsize,
            sym=self.sym,
            mse=self.mse,
            actorder=self.actorder,
            static_groups=self.static_groups,
            weighted_mse=self.mse,
        )


def quantize(
    output: Path,
    run_dir: Path | None,
    overwrite: bool,
    eval_text: str | None,
    num_workers: int | None,
    gpus_per_worker: float,
    address: str | None,
    **job_options: Any,
) -> None:
    """Quantize a model; options as in the command line, ``job_options`` as in ``JobOptions``."""
    session = Session.open(
        JobOptions(**job_options).job(),
        run_dir or output.with_name(output.name + ".run"),
        output=output,
        overwrite=overwrite,
        evaluation_text=eval_text,
    )
    _complete(session, num_workers, gpus_per_worker, address)


def resume(run: Path, num_workers: int | None, gpus_per_worker: float, address: str | None) -> None:
    """Do what an interrupted run has left to do."""
    _complete(Session.reopen(run), num_workers, gpus_per_worker, address)


def _complete(
    session: Session, num_workers: int | None, gpus_per_worker: float, address: str | None
) -> None:
    """Quantize, evaluate and report, as far as it is not done yet; print the checkpoint's place."""
    evaluations = _missing_evaluations(session)
    request = _evaluation_request(session) if evaluations else None
    is_finished = session.is_finished
    if not is_finished:
        _log_settings(session)
        executor = default_executor(num_workers, address=address, gpus_per_worker=gpus_per_worker)
        logger.info("workers: %s", executor.describe())
        try:
            session.quantize(executor)
        finally:
            executor.stop()
    for what, directory in evaluations.items():
        scores = evaluate_checkpoint(directory, request)
        session.run.append("evaluation", what=what, tokens=scores["num_tokens"], **scores)
        logger.info("perplexity of the %s model: %.4f", what, scores["perplexity"])
    if is_finished and not evaluations:
        logger.info("nothing is left to do")
    else:
        logger.info("report: %s", write_report(session.run.path))
    if session.output is not None:
        print_result(str(session.output))
        logger.info("load it with onecomp.load_quantized_model(%r)", str(session.output))


def _evaluation_request(session: Session) -> PerplexityRequest:
    """Windows of 2048 tokens, or as many as the model can read."""
    model = session.skeleton.model
    max_length = min(EVALUATION_LENGTH, max_positions(model) or EVALUATION_LENGTH)
    request = PerplexityRequest.checked(session.evaluation_text, max_length)
    request.require_fit(model, session.job.model_config.load_tokenizer())
    return request


def _missing_evaluations(session: Session) -> Mapping[str, object]:
    """Directories of the models that are to be evaluated and were not yet, by what they are."""
    if session.evaluation_text is None:
        return {}
    wanted: dict[str, object] = {
        "original": session.job.model_config.source.directory,
        "quantized": session.output,
    }
    if session.begin_anew:
        return wanted
    done = {
        event["what"]
        for event in session.run.events("evaluation")
        if event["text"] == session.evaluation_text
    }
    return {what: directory for what, directory in wanted.items() if what not in done}


def _log_settings(session: Session) -> None:
    versions = session.job.record(session.samples)["versions"]
    logger.info("versions: %s", "  ".join(f"{name} {v}" for name, v in versions.items()))
    logger.info(
        "method: %s, error propagation %s", session.job.quantizer.name, session.job.qep or "off"
    )
    logger.info("checkpoint: %s, run directory: %s", session.output, session.run.path)


def evaluate(
    directory: str,
    ppl: str,
    max_length: int,
    stride: int | None,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Print the perplexity of a checkpoint."""
    request = PerplexityRequest.checked(ppl, max_length, stride, max_tokens)
    scores = evaluate_checkpoint(directory, request)
    if as_json:
        print_result(json.dumps({"model": directory, **scores}))
    else:
        print_result(
            f"perplexity {scores['perplexity']:.4f}  {directory}  text {ppl}  "
            f"tokens {scores['num_tokens']}  context {scores['max_length']}  "
            f"stride {scores['stride']}  bos {'yes' if scores['bos'] else 'no'}"
        )


def verify(directory: Path, run_dir: Path | None, as_json: bool) -> None:
    """Compare a checkpoint with what its run recorded; exit status 1 if anything differs."""
    run = RunDirectory(run_dir or directory.with_name(directory.name + ".run"))
    found = verify_checkpoint(directory, run, _original(run))
    if as_json:
        print_result(json.dumps(asdict(found) | {"ok": not found.problems}))
    else:
        for problem in found.problems:
            print_result(problem)
        print_result(
            f"{found.num_layers} quantized layers and {found.num_other_tensors} other tensors "
            f"compared, {len(found.problems)} differ"
        )
        if found.num_not_compared:
            print_result(f"{found.num_not_compared} tensors were not compared: no original model")
    if found.problems:
        raise typer.Exit(FAILED)


def _original(run: RunDirectory) -> ModelSource | None:
    """The model that the run quantized; None, with a warning, where it cannot be read any more.

    Its own code runs only if the user allowed it for the run.

    Raises:
        InputError: Another model is in its place.
    """
    model = run.record()["model"]
    try:
        source = ModelSource.open(model["id"], trust_remote_code=model["trust_remote_code"])
    except InputError as error:
        logger.warning(
            "only quantized layers are compared: the original model cannot be read (%s)", error
        )
        return None
    if source.content_hash != model["hash"]:
        raise InputError(
            source.directory,
            "is not the model that the run quantized: its content hash changed from "
            f"{model['hash'][:12]} to {source.content_hash[:12]}. Put that model back, or move "
            "this one away to compare the quantized layers only.",
        )
    return source


def report(run: Path) -> None:
    """Write the report of a run and print where it is."""
    RunDirectory(run).record()
    print_result(str(write_report(run)))
