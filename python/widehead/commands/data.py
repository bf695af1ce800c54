"""widehead/commands/data.py -- `widehead data`: statistics, conversion, splitting, sets to begin with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import data
from ..data.recipes import RECIPES
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    stats = actions.add_parser("stats", help="sizes of a data set and the shape of its tail")
    common.add_data(stats)
    common.add_general(stats)

    convert = actions.add_parser("convert", help="write a data set in another format")
    common.add_data(convert)
    convert.add_argument("--to", nargs="+", required=True, metavar="FILE", help=_TARGET)
    common.add_general(convert)

    split = actions.add_parser("split", help="divide a data set into a part to train on and a part to test on")
    common.add_data(split)
    split.add_argument("--share", type=float, default=0.1, help="of the points in the second part (default: 0.1)")
    split.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    split.add_argument("--train", nargs="+", required=True, metavar="FILE", help=_TARGET)
    split.add_argument("--test", nargs="+", required=True, metavar="FILE", help="likewise, for the second part")
    common.add_general(split)

    fetch = actions.add_parser("fetch", help="build a data set from what is installed; without a name, list them")
    fetch.add_argument("name", nargs="?", choices=sorted(RECIPES), help="which one")
    fetch.add_argument("-o", "--output", metavar="DIR", help="folder for its files (default: its name)")
    common.add_general(fetch)
    for action in actions.choices.values():
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


_TARGET = "X.npz and Y.npz, or one file of XMC text (.txt) or text<TAB>labels (.tsv); .gz, .xz, .bz2 compress"


def run(arguments: argparse.Namespace) -> int:
    common.prepare(arguments)
    actions = {"stats": _stats, "convert": _convert, "split": _split, "fetch": _fetch}
    actions[arguments.action](arguments)
    return 0


def _stats(arguments: argparse.Namespace) -> None:
    values = data.statistics(common.load(arguments))
    if arguments.json:
        common.print_json(values)
    else:
        shown = [(name, f"{value:,.0f}" if value == int(value) else f"{value:,.3f}") for name, value in values.items()]
        common.show(common.value_table(" ".join(arguments.data), shown))


def _convert(arguments: argparse.Namespace) -> None:
    dataset = common.load(arguments)
    _write(dataset, arguments.to)
    _done(arguments, {"points": len(dataset), "files": arguments.to})


def _split(arguments: argparse.Namespace) -> None:
    parts = common.load(arguments).split(arguments.share, arguments.seed)
    for part, files in zip(parts, (arguments.train, arguments.test), strict=True):
        _write(part, files)
    _done(arguments, {"points": [len(part) for part in parts], "files": [*arguments.train, *arguments.test]})


def _write(dataset: data.Dataset, files: list[str]) -> None:
    if len(files) > 2 or (len(files) == 2) != (Path(files[0]).suffix == ".npz"):
        raise data.DataError(f"expected a text file to write, or X.npz and Y.npz, got {' '.join(files)}")
    if dataset.features is None:
        if len(files) == 2:
            raise data.DataError("texts have no feature matrix: convert them to a list text<TAB>labels")
        data.save_text(files[0], dataset.texts or [], dataset.labels)
    elif len(files) == 2:
        data.save_matrix(files[0], dataset.features)
        data.save_matrix(files[1], dataset.labels)
    else:
        data.save_xmc(files[0], dataset.features, dataset.labels)


def _done(arguments: argparse.Namespace, result: dict[str, object]) -> None:
    if arguments.json:
        common.print_json(result)
    elif not arguments.quiet:
        files = result["files"]
        assert isinstance(files, list)
        print("wrote " + ", ".join(files), file=sys.stderr)


def _fetch(arguments: argparse.Namespace) -> None:
    if arguments.name is None:
        if arguments.json:
            common.print_json({name: recipe.summary for name, recipe in RECIPES.items()})
        else:
            rows = [(name, recipe.summary) for name, recipe in sorted(RECIPES.items())]
            common.show(common.list_table("Data sets that `widehead data fetch NAME` can build", rows))
        return
    folder = Path(arguments.output or arguments.name)
    folder.mkdir(parents=True, exist_ok=True)
    files = RECIPES[arguments.name].build(folder)
    _done(arguments, {"files": [str(path) for path in files]})
