"""widehead/commands/demo.py -- `widehead demo`: trains the place resolver, measures it, and answers questions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from ..demo.options import Options
from ..errors import DataError
from . import common

if TYPE_CHECKING:
    from ..demo.resolver import Resolver

EXAMPLES = ("Muenchn", "los angelos", "Лондн", "tokio-to", "addis abbeba", "القاهره", "london, canada", "paris, us")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Options()
    parser.description = (
        "Trains a model that finds any of 234,908 places on earth by any of their names, in any script or "
        "(mis)spelling, measures it on names that it has never seen, and asks it a few questions. Data and model are "
        "kept: another call only shows the results."
    )
    ask = parser.add_argument_group("questions")
    ask.add_argument(
        "--ask",
        nargs="?",
        const="",
        metavar="NAME",
        help='ask the saved model, as in --ask Muenchn or --ask "paris, us"; without a name, a prompt',
    )
    ask.add_argument("--interactive", action="store_true", help="a prompt for many questions")
    ask.add_argument("--top", type=common.count, default=5, metavar="K", help="number of answers (default: 5)")

    model = parser.add_argument_group("model")
    model.add_argument("--retrain", action="store_true", help="train even where a saved model fits")
    for name, text in (
        ("dim", "length of the hidden vectors"),
        ("negatives", "classes drawn for a batch"),
        ("epochs", "passes over the names"),
        ("batch_size", "names a step"),
    ):
        _add(model, name, common.count, getattr(default, name), text)
    _add(model, "lr", common.number(float, 1e-9, "a positive number"), default.lr, "highest learning rate")
    _add(model, "scale", common.number(float, 1e-9, "a positive number"), default.scale, "length of a hidden vector")
    rate = common.number(float, 0.0, "a share from 0 to 1", 1.0)
    _add(model, "typos", rate, default.typos, "share of the training names that get a typing error", "RATE")
    _add(model, "seed", common.number(int, 0, "a whole number"), default.seed, "of weights, order and negatives")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help=f"of the weights (default: {default.dtype})")

    general = parser.add_argument_group("general")
    general.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder of data and model (default: the user's cache)"
    )
    general.add_argument("--results", type=Path, metavar="FILE", help="write the results there, too, as JSON")
    common.add_general(parser)


def _add(group: Any, name: str, kind: Any, default: Any, text: str, metavar: str | None = None) -> None:
    # No default in the parser: --ask takes the saved model as it is unless an option was given.
    flag = "--" + name.replace("_", "-")
    group.add_argument(flag, type=kind, metavar=metavar or "N", help=f"{text} (default: {default})")


def run(arguments: argparse.Namespace) -> int:
    from ..demo.places import ATTRIBUTION, default_folder, fold
    from ..demo.report import quality_tables
    from ..demo.store import Store, write_json

    common.prepare(arguments)
    console, log = Console(), Console(stderr=True)

    def say(text: str) -> None:
        if not arguments.quiet:
            log.print(text, highlight=False, markup=False)

    def follow(items: Iterable[int], text: str) -> Iterable[int]:
        return track(items, text, console=log, transient=True, disable=arguments.quiet)  # type: ignore[arg-type]

    store = Store(arguments.cache or default_folder(), say, not arguments.quiet, follow)
    given = {
        field.name: getattr(arguments, field.name)
        for field in fields(Options)
        if getattr(arguments, field.name, None) is not None
    }
    asking = arguments.ask is not None or arguments.interactive
    options = None if asking and not given else Options(**given)
    resolver, results = store.resolver(options, arguments.retrain)
    if arguments.results is not None:
        write_json(arguments.results, results)

    if asking:
        if arguments.ask:
            _answer(resolver, arguments.ask, arguments, console)
        if arguments.interactive or not arguments.ask:
            _prompt(resolver, arguments, console)
        return 0
    if arguments.json:
        print(json.dumps(results))
        return 0
    for table in quality_tables(results):
        console.print(table)
    console.print("A few questions:", highlight=False)
    known = set(resolver.places.train.names)
    for text in EXAMPLES:
        seen = fold(resolver.parse(text).name) in known
        _answer(resolver, text, arguments, console, 3, "" if seen else " (a spelling that is not in the training data)")
    console.print('Your turn: `widehead demo --ask "Muenchn"`, or `widehead demo --ask` for a prompt.', highlight=False)
    console.print(ATTRIBUTION, highlight=False)
    return 0


def _answer(
    resolver: Resolver,
    text: str,
    arguments: argparse.Namespace,
    console: Console,
    k: int | None = None,
    note: str = "",
) -> None:
    from ..demo.report import answer_table

    query, candidates = resolver.ask(text, k or arguments.top)
    country = None if query.country is None else resolver.places.countries[query.country].name
    if arguments.json:
        found = [
            {
                "name": c.name,
                "region": c.region,
                "country": c.country.code,
                "population": c.population,
                "latitude": c.latitude,
                "longitude": c.longitude,
                "probability": c.probability,
            }
            for c in candidates
        ]
        common.print_json({"query": query.name, "country": country, "candidates": found})
    else:
        console.print(answer_table(query, candidates, country, note))


def _prompt(resolver: Resolver, arguments: argparse.Namespace, console: Console) -> None:
    """Answers questions until an empty line or the end of the input."""
    if not (arguments.json or arguments.quiet):
        console.print(
            'A place by any of its names, perhaps with a country ("paris, us"); an empty line ends.', highlight=False
        )
    while True:
        try:
            text = input("" if arguments.json else "place> ").strip()
        except EOFError:
            return
        if not text:
            return
        try:
            _answer(resolver, text, arguments, console)
        except DataError as error:
            console.print(str(error), markup=False, highlight=False)
