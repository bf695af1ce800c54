"""widehead/demo/store.py -- the demo's folder: data, model and results, each made once and found again."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._core import __version__, current_isa, get_num_threads
from ..estimator import Classifier
from ..files import FileError
from . import places as data
from .evaluate import Track, evaluate
from .places import Places
from .resolver import Resolver
from .train import Options, train

Say = Callable[[str], None]


class Store:
    """What lies in the folder, made where it is missing.

    Args:
        folder: of the cache; it is created.
        say: takes a line on what is going on.
        progress: whether training shows a bar.
        track: puts a bar around an iterable.
    """

    def __init__(self, folder: Path, say: Say, progress: bool = False, track: Track | None = None) -> None:
        self.folder, self.say, self.progress, self.track = folder, say, progress, track
        self.model_file, self.results_file = folder / "model.safetensors", folder / "results.json"
        self._places: Places | None = None

    def places(self) -> Places:
        """The data set: from the cache, else built from the package and put there."""
        if self._places is None:
            self._places = data.load(self.folder)
            if self._places is not None:
                self.say(f"data: {_sizes(self._places)}, from {data.cache_file(self.folder)}")
            else:
                self.say(f"data: reading {data.installed()}, folding a million names (about 10 s, once)")
                self._places = data.from_package()
                path = data.save(self._places, self.folder)
                self.say(f"data: {_sizes(self._places)}, kept in {path}")
                if self._places.source != f"{data.PACKAGE} {data.PACKAGE_VERSION}":
                    self.say(
                        f"data: the peers' figures are for {data.PACKAGE} {data.PACKAGE_VERSION}: not the same data"
                    )
        return self._places

    def saved(self) -> tuple[Resolver, dict[str, Any]] | None:
        """The saved model and its results, or None: there are none, or they are damaged or of other data."""
        try:
            results = json.loads(self.results_file.read_text(encoding="utf-8"))
            if results["data_checksum"] != self.places().checksum():
                self.say("model: the saved one was trained on other data")
                return None
            return Resolver(Classifier.load(self.model_file), self.places()), results
        except FileNotFoundError:
            return None
        except (FileError, ValueError, KeyError) as error:
            self.say(f"model: the saved one cannot be used: {error}")
            return None

    def resolver(self, options: Options | None, retrain: bool = False) -> tuple[Resolver, dict[str, Any]]:
        """A trained and measured resolver: the saved one where it has these options (any, for None), else a new one."""
        found = None if retrain else self.saved()
        if found is not None:
            if options is None or found[1]["options"] == options.as_dict():
                self.say(f"model: from {self.model_file} (train anew with --retrain)")
                return found
            self.say("model: the saved one was trained with other options")
        return self._train(options or Options())

    def _train(self, options: Options) -> tuple[Resolver, dict[str, Any]]:
        places = self.places()
        threads = get_num_threads()
        self.say(
            f"training: {options.epochs} epochs on {len(places.train):,} names, {len(places):,} classes, "
            f"{threads} thread{'s' * (threads != 1)}, {current_isa()}"
        )
        model, cost = train(places, options, progress=self.progress)
        self.say(f"training: done in {cost.wall_seconds:.0f} s, {cost.cpu_seconds:.0f} s of processor time")
        # A model without its results would be found again with those of another one.
        self.results_file.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        model.save(self.model_file)
        resolver = Resolver(model, places)
        self.say(f"evaluating: {len(places.test):,} held-out names, as they are, with country, with typing errors")
        results = {
            "version": __version__,
            "options": options.as_dict(),
            "source": places.source,
            "data_checksum": places.checksum(),
            "places": len(places),
            "train_names": len(places.train),
            "test_names": len(places.test),
            "threads": threads,
            "isa": current_isa(),
            "training": asdict(cost),
            "loss": [epoch["loss"] for epoch in model.history_],
            "model_bytes": self.model_file.stat().st_size,
            "quality": evaluate(resolver, self.track),
        }
        write_json(self.results_file, results)
        self.say(f"model: saved in {self.model_file}, results in {self.results_file}")
        return resolver, results


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, which appears only when it is complete."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sizes(places: Places) -> str:
    return f"{len(places.train):,} names to train on and {len(places.test):,} held out, of {len(places):,} places"
