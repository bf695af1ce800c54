"""widehead/commands/common.py -- what the commands share: arguments, data files, metrics of a model, tables."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import data as datafiles
from .._core import set_num_threads
from ..metrics import MetricAccumulator

if TYPE_CHECKING:
    from ..estimator import Classifier

_SERVE = 4096  # points at a time in predictions


def number(kind: Callable[[str], Any], least: float, what: str, most: float | None = None) -> Callable[[str], Any]:
    """A type for argparse: a number with bounds, and a message that says so."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None
        if not (value >= least and (most is None or value <= most)):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


count = number(int, 1, "a whole number of at least 1")


def add_data(parser: argparse._ActionsContainer, help: str = "data file, or X.npz and Y.npz") -> None:
    """The positional argument `data` and its options."""
    parser.add_argument("data", nargs="+", metavar="FILE", help=help)
    parser.add_argument("--format", choices=datafiles.FORMATS, help="of the data file; found out where not given")


def add_general(parser: argparse._ActionsContainer) -> None:
    """Options that every command with work to do has."""
    parser.add_argument("--threads", type=count, help="number of threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def prepare(arguments: argparse.Namespace) -> None:
    """Acts on the options of `add_general`."""
    if arguments.threads is not None:
        set_num_threads(arguments.threads)


def load(arguments: argparse.Namespace, files: list[str] | None = None, **sizes: int | None) -> datafiles.Dataset:
    """The data set that `add_data` names."""
    files = arguments.data if files is None else files
    if len(files) > 2:
        raise datafiles.DataError(f"expected a data file, or a pair of .npz files, got {len(files)} files")
    return datafiles.load(
        files[0],
        files[1] if len(files) == 2 else None,
        format=arguments.format if len(files) == 1 else None,
        progress=not arguments.quiet,
        **sizes,
    )


def same_kind(dataset: datafiles.Dataset, texts: bool) -> None:
    """Raises DataError where a data set holds features but texts are wanted, or the other way round."""
    if (dataset.texts is not None) != texts:
        wanted, found = ("texts", "features") if texts else ("features", "texts")
        raise datafiles.DataError(f"expected data with {wanted}, as the model was trained on, got {found}")


def measure(
    model: Classifier,
    dataset: datafiles.Dataset,
    ks: Iterable[int],
    weights: Any | None = None,
    progress: str | None = None,
) -> dict[str, float]:
    """Metrics of a model on a data set, batch by batch."""
    accumulator = MetricAccumulator(tuple(ks), weights)
    starts: Iterable[int] = range(0, len(dataset), _SERVE)
    if progress is not None:
        starts = track(starts, progress, console=Console(stderr=True), transient=True)  # type: ignore[arg-type]
    for start in starts:
        part = dataset.points[start : start + _SERVE]
        _, classes = model.predict_topk(part, accumulator.k)
        accumulator.update(classes, dataset.labels[start : start + _SERVE])
    return accumulator.result()


def single_labels(dataset: datafiles.Dataset) -> Any | None:
    """int64 [n] where every point has exactly one label, else None."""
    labels = dataset.labels
    alone = labels.nnz == len(dataset) and bool(np.all(np.diff(labels.indptr) == 1))
    return labels.indices.astype(np.int64) if alone else None


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, default=float))


def metric_table(title: str, metrics: Mapping[str, float]) -> Table:
    """A table with a row a metric and a column a place, in per cent."""
    places = sorted({int(name.partition("@")[2]) for name in metrics})
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", min_width=len(title) + 2)
    table.add_column("%")
    for place in places:
        table.add_column(f"@{place}", justify="right")
    for name in dict.fromkeys(name.partition("@")[0] for name in metrics):
        table.add_row(name, *(f"{100 * metrics[f'{name}@{place}']:.2f}" for place in places))
    return table


def value_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values."""
    width = len(title) + 2
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_header=False, min_width=width)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return table


def list_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and texts."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def show(*tables: Table) -> None:
    console = Console()
    for table in tables:
        console.print(table)
