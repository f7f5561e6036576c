"""What the commands of the command line do, given their options."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import transformers
import typer

from onecomp.console import FAILED, print_result
from onecomp.errors import InputError
from onecomp.evaluation.scores import PerplexityRequest, evaluate_checkpoint
from onecomp.executor import Executor, WorkerCount, default_executor
from onecomp.export.install import require_directory
from onecomp.export.load import checkpoint_directory
from onecomp.export.save import has_format
from onecomp.export.verify import verify_checkpoint
from onecomp.job_options import JobOptions
from onecomp.losses import Patience
from onecomp.models import ModelSource, max_positions
from onecomp.places import run_directory_of
from onecomp.planning.hardware import load_table
from onecomp.planning.model import PlannedModel
from onecomp.planning.request import Place, Request
from onecomp.planning.shapes import TextShape
from onecomp.planning.summary import as_json_values, make_plan
from onecomp.planning.table import as_text
from onecomp.post_process.checkpoint_job import PostProcessJob, original_model
from onecomp.post_process.options import TextOptions, make_process
from onecomp.report import write_report
from onecomp.session import Session
from onecomp.storage import AnyPath, local_directory, open_path
from onecomp.store import RunDirectory

logger = logging.getLogger(__name__)

EVALUATION_LENGTH = 2048
"""Tokens of a window, as published perplexities have them."""


def quiet_libraries() -> None:
    """Keep what the libraries would say of every model and tokenizer they load off the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """The options that say where work runs and what it puts up with."""

    num_workers: str | None
    gpus_per_worker: float
    address: str | None
    unit_timeout: float
    retries: int

    def executor(self) -> Executor:
        """The executor that they ask for."""
        count = None if self.num_workers is None else WorkerCount.parse(self.num_workers)
        return default_executor(
            0 if count and not count.most else count,
            address=self.address,
            gpus_per_worker=self.gpus_per_worker,
        )

    def patience(self) -> Patience:
        """When to give up."""
        return Patience(self.unit_timeout, self.retries)


Options = TypeVar("Options")


def _given(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """The options of one kind, out of all."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def quantize(
    output: str,
    run_dir: str | None,
    overwrite: bool,
    eval_text: str | None,
    **options: Any,
) -> None:
    """Quantize a model; ``options`` as in ``JobOptions`` and ``WorkerOptions``."""
    session = Session.open(
        _given(JobOptions, options).job(),
        run_dir or run_directory_of(open_path(output)),
        output=output,
        overwrite=overwrite,
        evaluation_text=eval_text,
    )
    _complete(session, _given(WorkerOptions, options))


def plan(
    hardware: Path | None, with_probe: bool, as_json: bool, run_dir: Path | None, **options: Any
) -> None:
    """Print what a run would need; options as in the command line."""
    job = _given(JobOptions, options)
    model = PlannedModel.open(job.model, job.dtype, trust_remote_code=job.trust_remote_code)
    method, calibration = job.method(lambda: model.skeleton), job.calibration()
    text = TextShape(calibration.num_calibration_samples, calibration.max_length)
    request = Request(
        model, method, text if method.flag_calibration else None, job.propagation(method)
    )
    place = Place(
        num_workers=_planned_workers(options["num_workers"]),
        gpus_per_worker=options["gpus_per_worker"],
        gpu=options["gpu"],
        table=load_table(hardware),
        network_gbit=options["network"],
        price_per_hour=options["price"],
    )
    found = make_plan(request, place, with_probe=with_probe, run_dir=run_dir)
    print_result(json.dumps(as_json_values(found)) if as_json else as_text(found))


def _planned_workers(num_workers: str | None) -> int | None:
    """Workers to plan for: with MIN:MAX, the least, with which the run has to do at worst."""
    return None if num_workers is None else WorkerCount.parse(num_workers).least


def resume(run: str, **options: Any) -> None:
    """Do what an interrupted run has left to do; ``options`` as in ``WorkerOptions``."""
    _complete(Session.reopen(run), WorkerOptions(**options))


def _complete(session: Session, workers: WorkerOptions) -> None:
    """Quantize, evaluate and report, as far as it is not done yet; print the checkpoint's place."""
    evaluations = _missing_evaluations(session)
    request = _evaluation_request(session) if evaluations else None
    is_finished = session.is_finished
    if not is_finished:
        _log_settings(session)
        executor = workers.executor()
        logger.info("workers: %s", executor.describe())
        try:
            session.quantize(executor, patience=workers.patience())
        finally:
            executor.stop()
    for what, directory in evaluations.items():
        with local_directory(directory) as place:
            scores = evaluate_checkpoint(place, request)
        session.run.append("evaluation", what=what, tokens=scores["num_tokens"], **scores)
        logger.info("perplexity of the %s model: %.4f", what, scores["perplexity"])
    if is_finished and not evaluations:
        logger.info("nothing is left to do")
    else:
        logger.info("report: %s", write_report(session.run.path))
    if session.output is not None:
        print_result(str(session.output))
        where = "" if isinstance(session.output, Path) else "download it and "
        loader = "onecomp.load_quantized_model"
        if not has_format(session.job.quantizer):
            loader = "transformers.AutoModelForCausalLM.from_pretrained"
        logger.info("%sload it with %s(%r)", where, loader, str(session.output))


def _evaluation_request(session: Session) -> PerplexityRequest:
    """Windows of 2048 tokens, or as many as the model can read."""
    model = session.skeleton.model
    max_length = min(EVALUATION_LENGTH, max_positions(model) or EVALUATION_LENGTH)
    request = PerplexityRequest.checked(session.evaluation_text, max_length)
    request.require_fit(model, session.job.model_config.load_tokenizer())
    return request


def _missing_evaluations(session: Session) -> Mapping[str, AnyPath]:
    """Directories of the models that are to be evaluated and were not yet, by what they are."""
    if session.evaluation_text is None:
        return {}
    wanted: dict[str, AnyPath] = {
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


def postprocess(
    directory: str,
    process: str,
    output: str,
    model: str | None,
    settings: list[str] | None,
    dtype: str,
    overwrite: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Improve a quantized checkpoint; ``options`` are fields of the process and of its text."""
    text = TextOptions(**{field.name: options.pop(field.name) for field in fields(TextOptions)})
    improvement = make_process(process, settings or (), options, text)
    checkpoint = checkpoint_directory(directory, local_files_only=False)
    original = original_model(checkpoint, model, dtype, trust_remote_code=trust_remote_code)
    job = PostProcessJob(checkpoint, Path(output), improvement, original, overwrite)
    entry = job.run()
    if not entry["executed"]:
        logger.warning("%s: %s", improvement.name, entry["reason"])
    logger.info(
        "held-out loss %.4f -> %.4f in %.0f s",
        entry["held_out_before"], entry["held_out_after"], entry["seconds"],
    )  # fmt: skip
    print_result(output)


def verify(directory: str, run_dir: str | None, as_json: bool) -> None:
    """Compare a checkpoint with what its run recorded; exit status 1 if anything differs."""
    checkpoint = open_path(directory)
    run = RunDirectory(open_path(run_dir) if run_dir else run_directory_of(checkpoint))
    with local_directory(checkpoint) as place:
        found = verify_checkpoint(place, run, _original(run))
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


def report(run: str) -> None:
    """Write the report of a run and print where it is."""
    path = open_path(run)
    require_directory(path)
    RunDirectory(path).record()
    print_result(str(write_report(path)))
