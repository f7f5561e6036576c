"""The command line: options and help. What the commands do is in ``commands``."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from onecomp.console import command, read_options
from onecomp.log import setup_logger

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Post-training quantization of large language models, in one process or on a Ray cluster.",
)


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
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


@app.command()
@command
def quantize(  # noqa: PLR0913 - one parameter per option
    model: Annotated[str, typer.Argument(help="Directory of the model, or its Hub id.")],
    output: Annotated[Path, typer.Option(help="New directory for the checkpoint.")],
    run_dir: Annotated[Path | None, typer.Option(help="Default: OUTPUT.run")] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew; replace the checkpoint.")] = False,
    quantizer: Annotated[Literal["gptq", "rtn"], typer.Option(help="Method.")] = "gptq",
    wbits: Annotated[int, typer.Option(help="Bits per weight, 1 to 8.")] = 4,
    groupsize: Annotated[
        int | None,
        typer.Option(
            help="Columns per scale, -1 for a row. Default: largest of 128, 64, 32 that fits."
        ),
    ] = None,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric grids.")] = True,
    mse: Annotated[bool, typer.Option(help="Search the range of each group.")] = True,
    actorder: Annotated[bool, typer.Option(help="Solve columns in order of activation.")] = True,
    static_groups: Annotated[bool, typer.Option(help="Groups of the original columns.")] = True,
    qep: Annotated[bool, typer.Option(help="Propagate errors to later layers.")] = True,
    calibration_dataset: Annotated[
        str, typer.Option(help="c4, wikitext2, self (sampled from the model), a file, or a Hub id.")
    ] = "c4",
    text_key: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
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


@app.command()
@command
def resume(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    num_workers: Workers = None,
    gpus_per_worker: Gpus = 1,
    address: Address = None,
) -> None:
    """Continue an interrupted run, on whatever machines there are."""


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


@app.command()
@command
def verify(
    directory: Annotated[Path, typer.Argument(help="Checkpoint.")],
    run_dir: Annotated[Path | None, typer.Option(help="Default: DIRECTORY.run")] = None,
    as_json: Json = False,
) -> None:
    """Reload a checkpoint and compare it with what its run recorded."""


@app.command()
@command
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write report.html from the journal of a finished, running or dead run."""


if __name__ == "__main__":
    main()
