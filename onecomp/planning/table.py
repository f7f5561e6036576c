"""A plan as tables for a terminal."""

from collections.abc import Iterable
from io import StringIO

from rich.console import Console
from rich.table import Table

from onecomp.log import format_duration
from onecomp.planning.amounts import Amount, size
from onecomp.planning.estimate import Estimate
from onecomp.planning.memory import Moment, short_name
from onecomp.planning.methods import MethodShape
from onecomp.planning.summary import Plan

WIDTH = 110


def as_text(plan: Plan) -> str:
    """The plan as tables."""
    out = Console(file=StringIO(), width=WIDTH, no_color=True, highlight=False, markup=False)
    out.print("\n".join(_headline(plan.estimate)), soft_wrap=True)
    out.print(_blocks_table(plan.estimate))
    out.print(_phases_table(plan))
    out.print(_room_table(plan.estimate))
    out.print("\n".join(_times(plan)))
    for text in plan.shortages:
        out.print(f"DOES NOT FIT: {text}.")
    if plan.shortages:
        fits = " or ".join(plan.remedies) or "a smaller model, or more memory"
        out.print(f"Use {fits}.")
    for note in plan.notes:
        out.print(f"- {note}")
    return out.file.getvalue().rstrip("\n")


def _headline(estimate: Estimate) -> Iterable[str]:
    costs = estimate.costs
    model, method, text = costs.model, costs.method, costs.text
    stored = "" if model.stored is None else f", stored as {', '.join(model.stored.dtypes)}"
    yield f"{model.name}"
    yield (
        f"{model.architecture}, {count(model.num_parameters)} parameters in {model.num_blocks} "
        f"blocks and around them, computed in {model.dtype}{stored}"
    )
    propagation = "on" if costs.qep is not None else "off"
    yield f"{method.name}, {method.wbits:g} bits{_groups(method)}, error propagation {propagation}"
    if text is not None:
        yield (
            f"{text.num_samples} samples of {text.length} tokens in {text.num_shards} shards "
            f"of {text.shard_tokens} tokens"
        )
    where = "in this process" if estimate.settings.in_process else "on Ray"
    yield f"{estimate.num_workers} worker(s) {where}, {costs.hardware.name} each"


def _groups(method: MethodShape) -> str:
    if method.rated is not None:
        return ""
    groups = "a row" if method.groupsize == -1 else f"{method.groupsize} columns"
    return f", a scale for {groups}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
    return table


def _blocks_table(estimate: Estimate) -> Table:
    costs = estimate.costs
    table = _table("\nlayers", "\nblocks", "\nin", "\nout", "\ncorrected", "\nsent per block")
    for kind in costs.model.kinds:
        for group in kind.groups:
            last = [name.rpartition(".")[2] for name in group.layer_names]
            sent = "-"
            if costs.text is not None and estimate.network_bytes(kind):
                sent = size(estimate.sums_sent_bytes(kind, group))
            table.add_row(
                ", ".join([short_name(group), *last[1:]]),
                str(kind.count),
                str(group.in_features),
                "+".join(map(str, group.out_features)),
                "yes" if costs.is_corrected(group) else "no",
                sent,
            )
        if not kind.groups:
            table.add_row("(nothing is quantized)", str(kind.count), "", "", "", "")
    return table


def _phases_table(plan: Plan) -> Table:
    estimate = plan.estimate
    table = _table("\nphase, all workers", "\noperations", "\nbytes", "\nseconds", "\nshare")
    for phase in estimate.phases:
        table.add_row(
            phase.name,
            count(phase.operations) if phase.operations else "-",
            size(phase.num_bytes),
            f"{phase.seconds:.1f}",
            f"{phase.seconds / estimate.work_s:.0%}",
        )
    return table


def _room_table(estimate: Estimate) -> Table:
    memory = estimate.memory
    table = _table("\nroom", "\nat most", "\n")
    if memory.device_bytes:
        table.add_row("GPU memory of a worker", size(memory.device_bytes), "")
    holder = "memory of this process" if estimate.settings.in_process else "memory of a worker"
    table.add_row(holder, size(memory.host_bytes), "")
    for name, part in _largest_parts(memory.worker):
        table.add_row(f"  {name}, {memory.worker.what}", size(part), "")
    if not estimate.settings.in_process:
        table.add_row("memory of the driver", size(memory.driver_bytes), "")
        table.add_row("object store of a node", size(memory.object_store_bytes), "")
    table.add_row("run directory", size(memory.run_disk_bytes), "")
    table.add_row("  checkpoint, then moved to its place", size(memory.checkpoint_bytes), "")
    for kind in estimate.costs.model.kinds:
        for name, sent in estimate.network_bytes(kind).items():
            label = f"network, {name}, each of {kind.count} blocks"
            table.add_row(label, size(sent), "")
    return table


def _largest_parts(moment: Moment) -> list[tuple[str, Amount]]:
    return sorted(moment.parts.items(), key=lambda part: -part[1])[:3]


def _times(plan: Plan) -> Iterable[str]:
    estimate, survey = plan.estimate, plan.survey
    yield (
        f"\nwork of all workers {format_duration(estimate.work_s)}, longest chain "
        f"{format_duration(estimate.chain_s)}"
    )
    yield (
        f"time: about {format_duration(estimate.wall_s)} "
        f"(start {format_duration(estimate.settings.startup_s)})"
    )
    if survey is not None:
        yield (
            f"before it, candidates are compared: about {format_duration(survey.wall_s)} more, "
            f"{format_duration(survey.curvature_s)} of them for gradients, for which a worker "
            f"holds {size(survey.hidden_bytes)} of hidden states"
        )
    if plan.cost is not None:
        yield f"cost: {plan.cost:.2f}"


def count(number: Amount) -> str:
    """A large number with a prefix.

    >>> count(405_853_388_800), count(7.5e12)
    ('406 G', '7.5 T')
    """
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "
