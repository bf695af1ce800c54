"""widehead/commands/plan.py -- `widehead plan`: memory and time of each head for given sizes, and which to take."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from .. import plan as planning
from ..machine import DEVICES, Machine, machine
from . import common


def _bytes(text: str) -> float:
    """ "24G", "512M", "1.5T" or plain bytes; powers of 1024."""
    units = {"K": 1, "M": 2, "G": 3, "T": 4}
    text = text.strip().upper().removesuffix("IB").removesuffix("B")
    if text[-1:] in units:
        return float(text[:-1]) * 1024.0 ** units[text[-1]]
    return float(text)


def _whole(text: str) -> int:
    """ "250000", "1M" or "1.5G"; powers of 1000."""
    units = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
    value = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    if value != int(value):
        raise ValueError
    return int(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = common.number(_whole, 1, "a whole number such as 250000 or 1M")
    parser.add_argument("-D", "--classes", type=size, required=True, help="number of classes, such as 670091 or 1M")
    parser.add_argument("-d", "--dim", type=size, default=256, help="length of the hidden vectors (default: 256)")
    parser.add_argument("-b", "--batch-size", type=size, default=128, help="examples a step (default: 128)")
    parser.add_argument("--dtype", choices=tuple(planning.DTYPES), default="float32", help="of the weights")
    parser.add_argument("--loss", choices=planning.LOSSES, default="softmax", help="(default: softmax)")
    parser.add_argument("--optimizer", choices=tuple(planning.OPTIMIZERS), default="adagrad", help="(default: adagrad)")
    parser.add_argument("--negatives", type=size, default=512, help="of sampled softmax (default: 512)")
    parser.add_argument("--labels", type=common.number(float, 0, "a number"), default=1.0, help="labels an example")
    parser.add_argument("--intermediate", type=size, default=16384, help="layer below a sparse head (default: 16384)")
    parser.add_argument("--fan-in", type=size, default=32, help="inputs a class of a sparse head (default: 32)")
    parser.add_argument("--group-size", type=size, default=1, help="classes that share their inputs (default: 1)")
    parser.add_argument("--examples", type=size, help="examples of an epoch: adds its time")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cpu is measured; GPUs by their datasheets")
    parser.add_argument("--memory", type=common.number(_bytes, 1, "bytes such as 24G"), help="instead of what is free")
    parser.add_argument("--brief", action="store_true", help="leave out the arithmetic")
    common.add_general(parser)


def run(arguments: argparse.Namespace) -> int:
    common.prepare(arguments)
    job = planning.Job(
        n_classes=arguments.classes,
        in_features=arguments.dim,
        batch=arguments.batch_size,
        dtype=arguments.dtype,
        loss=arguments.loss,
        optimizer=arguments.optimizer,
        negatives=arguments.negatives,
        labels=arguments.labels,
        intermediate=arguments.intermediate,
        fan_in=arguments.fan_in,
        group_size=arguments.group_size,
    )
    place = machine(arguments.device).with_memory(arguments.memory)
    plans = planning.plans(job)
    advice = planning.recommend(plans, place)
    if arguments.json:
        common.print_json(
            {
                "job": asdict(job),
                "machine": asdict(place),
                "plans": [plan.as_dict(place, job.batch) for plan in plans],
                "recommendation": {
                    "head": advice.plan.head if advice.plan else None,
                    "loss": advice.plan.loss if advice.plan else None,
                    "reason": advice.reason,
                },
            }
        )
        return 0
    console = Console()
    console.print(_table(job, plans, place, arguments.examples))
    console.print(_machine_line(place, job.dtype))
    if not arguments.brief:
        for plan in plans:
            console.print(_arithmetic(plan))
    if advice.plan is None:
        console.print(f"[bold]Nothing to take[/]: {advice.reason}")
    else:
        console.print(f"[bold]Take {advice.plan.head} with {advice.plan.loss}[/]: {advice.reason}.")
    return 0


def _table(job: planning.Job, plans: list[planning.Plan], place: Machine, examples: int | None) -> Table:
    title = f"D = {job.n_classes:,} classes, d = {job.in_features:,}, B = {job.batch:,}, {job.dtype}, {job.optimizer}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("head", "loss"):
        table.add_column(name, no_wrap=True)
    last = "an epoch" if examples else "examples/s"
    for name in ("peak", "FLOP", "traffic", "a step", last):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        seconds = plan.seconds(place)
        table.add_row(
            plan.head,
            plan.loss,
            planning.human_bytes(plan.peak),
            planning.human_count(sum(term.value for term in plan.flops)),
            planning.human_bytes(sum(term.value for term in plan.traffic)),
            planning.human_seconds(seconds),
            _long_time(examples / job.batch * seconds) if examples else f"{job.batch / seconds:,.0f}",
            style="dim" if not plan.ours else "red" if plan.peak > place.memory else "",
        )
    return table


def _machine_line(place: Machine, dtype: str) -> str:
    how = "measured now" if place.measured else "60 % of the datasheet, not measured"
    return (
        f"{place.name} ({how}): {planning.human_count(place.flops[dtype])}FLOP/s in {dtype} products, "
        f"{planning.human_count(place.exponentials)}/s exponentials, {planning.human_count(place.bandwidth)}B/s, "
        f"{planning.human_bytes(place.memory)} free\n"
    )


def _arithmetic(plan: planning.Plan) -> Table:
    title = f"{plan.head}, {plan.loss}" + (f" ({plan.note})" if plan.note else "")
    table = Table(title=title, box=None, title_justify="left", show_header=False, padding=(0, 2))
    for _ in range(3):
        table.add_column()
    table.add_column(justify="right")
    for kind, terms, unit in (
        ("memory", plan.memory, planning.human_bytes),
        ("arithmetic", plan.flops, lambda value: planning.human_count(value) + "FLOP"),
        ("traffic", plan.traffic, planning.human_bytes),
    ):
        for place, term in enumerate(terms):
            table.add_row("" if place else kind, term.what, f"[dim]{term.formula}[/]", unit(term.value))
    table.add_row("", "exponentials", "", planning.human_count(plan.exponentials))
    if plan.gathers:
        table.add_row("", "rows of hidden", "[dim]4 x 4 B D K / G[/]", planning.human_bytes(plan.gathers))
    return table


def _long_time(seconds: float) -> str:
    if seconds < 120:
        return planning.human_seconds(seconds)
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
