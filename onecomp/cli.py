"""The command line: options and help. What the commands do is in ``commands``."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from onecomp.console import command, print_result, quick_command, read_options
from onecomp.log import setup_logger
from onecomp.status import read_status
from onecomp.status_lines import status_lines

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Post-training quantization of large language models, in one process or on a Ray cluster.",
)


Model = Annotated[str, typer.Argument(help="Directory of the model, or its Hub id.")]
Method = Annotated[
    Literal["gptq", "rtn", "jointq", "autobit", "dbf", "quip", "qbb", "onebit", "arb", "cq"],
    typer.Option(help="Method, see docs/quantizers.md."),
]
Bits = Annotated[int | None, typer.Option(help="Bits per weight, 1 to 8. Default: 4.")]
TargetBits = Annotated[
    float | None, typer.Option(help="Mean bits per weight, for dbf and autobit.")
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Columns per scale, -1 for a row. Default: largest of 128, 64, 32 that fits."
    ),
]
Symmetric = Annotated[
    bool | None, typer.Option("--sym/--asym", help="Symmetric grids. Default: on.")
]
Search = Annotated[
    bool | None, typer.Option("--mse/--no-mse", help="Search the range of each group. Default: on.")
]
ActivationOrder = Annotated[
    bool | None,
    typer.Option(
        "--actorder/--no-actorder",
        help="Solve columns in order of activation. Default: on for gptq and autobit.",
    ),
]
StaticGroups = Annotated[
    bool | None,
    typer.Option(
        "--static-groups/--no-static-groups", help="Groups of the original columns. Default: on."
    ),
]
Propagation = Annotated[bool, typer.Option(help="Propagate errors to later layers.")]
Dataset = Annotated[
    str, typer.Option(help="c4, wikitext2, self (sampled from the model), a file, or a Hub id.")
]
TextKey = Annotated[str, typer.Option(help="Column that holds the text.")]
Samples = Annotated[int, typer.Option(help="Samples.")]
Length = Annotated[int, typer.Option(help="Tokens per sample.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
RemoteCode = Annotated[bool, typer.Option(help="Run code from the model.")]
OptionsFile = Annotated[
    Path | None,
    typer.Option(help="YAML file of option: value.", callback=read_options, is_eager=True),
]
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="N|MIN:MAX",
        help="Ray workers, or as many as come between two limits; 0 works in this process. "
        "Default: one per GPU, else this process.",
    ),
]
UnitTimeout = Annotated[
    float,
    typer.Option(
        min=1,
        help="Seconds after which a worker that does not answer is replaced; calls known to take "
        "long get 20 times the longest so far.",
    ),
]
Retries = Annotated[
    int,
    typer.Option(
        min=0, help="Losses of workers, without a block finished between them, that a run survives."
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
    model: Model,
    output: Annotated[str, typer.Option(help="New directory for the checkpoint, or its URL.")],
    run_dir: Annotated[str | None, typer.Option(help="Or its URL. Default: OUTPUT.run")] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew; replace the checkpoint.")] = False,
    quantizer: Method = "gptq",
    wbits: Bits = None,
    target_bits: TargetBits = None,
    groupsize: GroupSize = None,
    sym: Symmetric = None,
    mse: Search = None,
    actorder: ActivationOrder = None,
    static_groups: StaticGroups = None,
    qep: Propagation = True,
    calibration_dataset: Dataset = "c4",
    text_key: TextKey = "text",
    num_calibration_samples: Samples = 128,
    max_length: Length = 2048,
    seed: Seed = 0,
    num_workers: Workers = None,
    gpus_per_worker: Gpus = 1,
    address: Address = None,
    unit_timeout: UnitTimeout = 600,
    retries: Retries = 5,
    dtype: Dtype = "auto",
    eval_text: Annotated[
        str | None, typer.Option("--eval", help="Text whose perplexity is compared afterwards.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    config: OptionsFile = None,
) -> None:
    """Quantize a model and write a checkpoint."""


@app.command()
@command
def plan(  # noqa: PLR0913 - one parameter per option
    model: Model,
    quantizer: Method = "gptq",
    wbits: Bits = None,
    target_bits: TargetBits = None,
    groupsize: GroupSize = None,
    sym: Symmetric = None,
    mse: Search = None,
    actorder: ActivationOrder = None,
    static_groups: StaticGroups = None,
    qep: Propagation = True,
    calibration_dataset: Dataset = "c4",
    text_key: TextKey = "text",
    num_calibration_samples: Samples = 128,
    max_length: Length = 2048,
    seed: Seed = 0,
    num_workers: Workers = None,
    gpus_per_worker: Gpus = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="Kind of GPU, e.g. H100, or CPU. Default: what this machine has."),
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="YAML file that describes further kinds of GPUs.")
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.001, help="Gbit per second between nodes.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU, or of a CPU worker, per hour.")
    ] = None,
    with_probe: Annotated[
        bool, typer.Option("--probe", help="Measure one block on this machine first.")
    ] = False,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run would be: its disk must have room.")
    ] = None,
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
    overwrite: Annotated[bool, typer.Option(hidden=True)] = False,
    eval_text: Annotated[str | None, typer.Option("--eval", hidden=True)] = None,
    address: Annotated[str | None, typer.Option(hidden=True)] = None,
    unit_timeout: Annotated[float, typer.Option(hidden=True)] = 600,
    retries: Annotated[int, typer.Option(hidden=True)] = 5,
    config: OptionsFile = None,
) -> None:
    """Say what quantizing a model will need: memory, disk, network, time and cost.

    Options are those of quantize. No weights are read, and no cluster is needed.
    """


@app.command()
@command
def resume(
    run: Annotated[str, typer.Argument(help="Run directory, or its URL.")],
    num_workers: Workers = None,
    gpus_per_worker: Gpus = 1,
    address: Address = None,
    unit_timeout: UnitTimeout = 600,
    retries: Retries = 5,
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
def postprocess(  # noqa: PLR0913 - one parameter per option
    directory: Annotated[str, typer.Argument(help="Quantized checkpoint.")],
    process: Annotated[
        str, typer.Option(help="blockwise_ptq, global_ptq, ..., see docs/post_process.md.")
    ],
    output: Annotated[str, typer.Option(help="New directory for the improved checkpoint.")],
    model: Annotated[
        str | None,
        typer.Option(help="The original model. Default: what DIRECTORY.run says."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Setting of the process. Repeatable."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training text.")] = None,
    calibration_dataset: Annotated[
        str | None, typer.Option(help="Text, as for quantize. Default: c4; LoRA needs one.")
    ] = None,
    text_key: Annotated[str | None, typer.Option(help="Column of the text. Default: text")] = None,
    num_calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples. Default: 128; LoRA takes all.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sample. Default: 2048; LoRA: 1024")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of samples. Default: 0")] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Ray workers; 0 works in this process.")
    ] = None,
    address: Address = None,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option(help="Begin anew; replace the checkpoint.")] = False,
    trust_remote_code: RemoteCode = False,
    config: OptionsFile = None,
) -> None:
    """Improve a quantized checkpoint by training what it holds against the original model."""


@app.command()
@command
def verify(
    directory: Annotated[str, typer.Argument(help="Checkpoint, or its URL.")],
    run_dir: Annotated[str | None, typer.Option(help="Default: DIRECTORY.run")] = None,
    as_json: Json = False,
) -> None:
    """Reload a checkpoint and compare it with what its run recorded."""


@app.command()
@command
def report(run: Annotated[str, typer.Argument(help="Run directory, or its URL.")]) -> None:
    """Write report.html from the journal of a finished, running or dead run."""


@app.command(context_settings={"allow_interspersed_args": False})
@quick_command
def submit(
    words: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND", help="What the job runs: quantize MODEL ..."),
    ],
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS",
            help="URL of the cluster's dashboard, http://127.0.0.1:8265",
        ),
    ],
    working_dir: Annotated[
        Path, typer.Option(help="Checkout of this project that the job runs.")
    ] = Path(),
    installed: Annotated[
        bool, typer.Option("--installed", help="Run what the cluster has installed instead.")
    ] = False,
    wait: Annotated[
        bool, typer.Option(help="Follow the job, end with its status, stop it on Ctrl-C.")
    ] = True,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE]", help="Variable of the job, by default as it is here. Repeatable."
        ),
    ] = None,
) -> None:
    """Run a command on a Ray cluster, as a Ray job."""
    from actors.submission import Submission, run_submission  # noqa: PLC0415 - a door to Ray

    submission = Submission.checked(address, words, None if installed else working_dir, env or ())
    if status := run_submission(submission, wait=wait):
        raise typer.Exit(status)


@app.command()
@quick_command
def status(
    run: Annotated[str, typer.Argument(help="Run directory.")], as_json: Json = False
) -> None:
    """Say where a run is, from its directory alone, while it runs and after it died."""
    found = read_status(run)
    print_result(json.dumps(asdict(found)) if as_json else status_lines(found))


if __name__ == "__main__":
    main()
