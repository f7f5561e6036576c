"""The command line: ``onecomp quantize``, ``resume``, ``eval``, ``verify``, ``report``."""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import transformers
import typer

from onecomp.calibration import CalibrationConfig
from onecomp.console import FAILED, command, print_result, read_options
from onecomp.errors import ConfigError, InputError
from onecomp.evaluation.scores import PerplexityRequest, evaluate_checkpoint
from onecomp.executor import default_executor
from onecomp.export.verify import verify_checkpoint
from onecomp.job import QuantizationJob, default_groupsize
from onecomp.log import setup_logger
from onecomp.models import ModelConfig, ModelSource, Skeleton
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN, Quantizer
from onecomp.report import write_report
from onecomp.session import Session
from onecomp.store import RunDirectory

logger = logging.getLogger("onecomp.cli")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Post-training quantization of large language models, in one process or on a Ray cluster.",
)

METHODS = ("gptq", "rtn")
"""Methods that the command line offers."""

Workers = Annotated[
    int | None,
    typer.Option(
        help="Ray workers; 0 works in this process. Default: one per GPU, else this process."
    ),
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster.")]
Gpus = Annotated[float, typer.Option(help="GPUs of each worker, where the cluster has GPUs.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]


def main() -> None:
    """Run the command line: 0 success, 1 a run that failed, 2 bad input."""
    setup_logger()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


@app.command()
@command
def quantize(  # noqa: PLR0913 - one parameter per option
    model: Annotated[str, typer.Argument(help="Directory of the model, or its Hub id.")],
    output: Annotated[Path, typer.Option(help="New directory for the checkpoint.")],
    run_dir: Annotated[Path | None, typer.Option(help="Default: OUTPUT.run")] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew; replace the checkpoint.")] = False,
    quantizer: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "gptq",
    wbits: Annotated[int, typer.Option(help="Bits per weight, 1 to 8.")] = 4,
    groupsize: Annotated[
        int | None,
        typer.Option(
            help="Columns per scale, -1 for a row. Default: largest of 128, 64, 32 that fits."
        ),
    ] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Symmetric grids.")] = True,
    mse: Annotated[bool, typer.Option(help="Search the range of each group.")] = True,
    actorder: Annotated[bool, typer.Option(help="Solve columns in order of activation.")] = True,
    static_groups: Annotated[bool, typer.Option(help="Groups of the original columns.")] = True,
    qep: Annotated[bool, typer.Option(help="Propagate errors to later layers.")] = True,
    calibration_dataset: Annotated[
        str, typer.Option(help="c4, wikitext2, self (sampled from the model), a file, or a Hub id.")
    ] = "c4",
    num_calibration_samples: Annotated[int, typer.Option(help="Samples.")] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    num_workers: Workers = None,
    gpus_per_worker: Gpus = 1,
    address: Address = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    eval_text: Annotated[
        str | None, typer.Option("--eval", help="Text whose perplexity is compared afterwards.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code from the model.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of option: value.", callback=read_options, is_eager=True),
    ] = None,
) -> None:
    """Quantize a model and write a checkpoint."""
    del config
    model_config = ModelConfig(model, dtype=dtype, trust_remote_code=trust_remote_code)
    options = {"sym": sym, "mse": mse, "actorder": actorder, "static_groups": static_groups}
    method = _method(quantizer, wbits, groupsize=-1 if groupsize is None else groupsize, **options)
    if groupsize is None:
        skeleton = Skeleton.build(model_config.source, model_config.torch_dtype)
        groupsize = default_groupsize(method, skeleton)
        logger.info("groupsize %d: the largest of 128, 64, 32 that divides every layer", groupsize)
    job = QuantizationJob(
        model_config,
        _method(quantizer, wbits, groupsize=groupsize, **options),
        CalibrationConfig(
            calibration_dataset,
            max_length,
            num_calibration_samples,
            strategy="drop_rand" if calibration_dataset == "c4" else "concat_chunk",
            seed=seed,
        ),
        QEPConfig() if qep and method.flag_hessian else None,
    )
    session = Session.open(
        job, run_dir or output.with_name(output.name + ".run"), output=output, overwrite=overwrite
    )
    _quantize(session, num_workers, address, gpus_per_worker, eval_text)


def _method(
    name: str, wbits: int, *, actorder: bool, static_groups: bool, **shared: bool | int | None
) -> Quantizer:
    if name == "gptq":
        order = {"actorder": actorder, "static_groups": static_groups}
        return GPTQ(wbits=wbits, **order, **shared, weighted_mse=shared["mse"])
    if name == "rtn":
        return RTN(wbits=wbits, **shared)
    raise ConfigError("quantize", [f"--quantizer={name!r}: must be one of {', '.join(METHODS)}."])


def _quantize(
    session: Session,
    num_workers: int | None,
    address: str | None,
    gpus: float,
    eval_text: str | None = None,
) -> None:
    request = None if eval_text is None else PerplexityRequest.checked(eval_text)
    _log_settings(session)
    executor = default_executor(num_workers, address=address, gpus_per_worker=gpus)
    logger.info("workers: %s", executor.describe())
    try:
        session.quantize(executor)
    finally:
        executor.stop()
    if request is not None:
        for what, directory in (
            ("original", session.job.model_config.source.directory),
            ("quantized", session.output),
        ):
            scores = evaluate_checkpoint(directory, request)
            session.run.append("evaluation", what=what, tokens=scores["num_tokens"], **scores)
            logger.info("perplexity of the %s model: %.4f", what, scores["perplexity"])
    report = write_report(session.run.path)
    logger.info("report: %s", report)
    if session.output is not None:
        print_result(f"{session.output}")
        logger.info("load it with onecomp.load_quantized_model(%r)", str(session.output))


def _log_settings(session: Session) -> None:
    versions = session.job.record(session.samples)["versions"]
    logger.info("versions: %s", "  ".join(f"{name} {v}" for name, v in versions.items()))
    logger.info(
        "method: %s, error propagation %s", session.job.quantizer.name, session.job.qep or "off"
    )
    logger.info("checkpoint: %s, run directory: %s", session.output, session.run.path)


@app.command()
@command
def resume(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    num_workers: Workers = None,
    gpus_per_worker: Gpus = 1,
    address: Address = None,
) -> None:
    """Continue an interrupted run, on whatever machines there are."""
    session = Session.reopen(run)
    if session.is_finished:
        logger.info("the run is finished; its checkpoint is in %s", session.output)
        return
    _quantize(session, num_workers, address, gpus_per_worker)


@app.command("eval")
@command
def evaluate(
    directory: Annotated[str, typer.Argument(help="Checkpoint, quantized or not, or a Hub id.")],
    ppl: Annotated[str, typer.Option(help="wikitext2, c4, a file, or a Hub id.")],
    max_length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next. Default: --max-length.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Only the first tokens of the text. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a checkpoint."""
    request = PerplexityRequest.checked(ppl, max_length, stride or max_length, max_tokens)
    scores = evaluate_checkpoint(directory, request)
    if as_json:
        print_result(json.dumps({"model": directory, **scores}))
    else:
        print_result(
            f"perplexity {scores['perplexity']:.4f}  {directory}  text {ppl}  "
            f"tokens {scores['num_tokens']}  context {scores['max_length']}  "
            f"stride {scores['stride']}  bos {'yes' if scores['bos'] else 'no'}"
        )


@app.command()
@command
def verify(
    directory: Annotated[Path, typer.Argument(help="Checkpoint.")],
    run_dir: Annotated[Path | None, typer.Option(help="Default: DIRECTORY.run")] = None,
    as_json: Json = False,
) -> None:
    """Reload a checkpoint and compare it with what its run recorded."""
    run = RunDirectory(run_dir or directory.with_name(directory.name + ".run"))
    source = _original(run)
    found = verify_checkpoint(directory, run, source)
    if as_json:
        print_result(json.dumps(asdict(found) | {"ok": not found.problems}))
    else:
        for problem in found.problems:
            print_result(problem)
        print_result(
            f"{found.num_layers} quantized layers and {found.num_other_tensors} other tensors "
            f"compared, {len(found.problems)} differ"
        )
    if found.problems:
        raise typer.Exit(FAILED)


def _original(run: RunDirectory) -> ModelSource | None:
    model = run.record()["model"]
    try:
        return ModelSource.open(model["id"])
    except InputError as error:
        logger.warning("only quantized layers are compared: the original model is gone (%s)", error)
        return None


@app.command()
@command
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write report.html from the journal of a finished, running or dead run."""
    RunDirectory(run).record()
    print_result(str(write_report(run)))


if __name__ == "__main__":
    main()
