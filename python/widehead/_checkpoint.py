"""_checkpoint.py -- a classifier in a file: the finished model, and all the state of a fit that may be interrupted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._core import Error
from ._linear import LinearLayer
from ._training import Examples, Targets, checksum
from .bag import EmbeddingBag
from .files import FileError, HeadFile, load_head, save_head
from .numpy import DenseHead, SparseHead
from .text import NGramHasher, PackedStrings

if TYPE_CHECKING:
    from ._validation import Validation
    from .estimator import Classifier

    C = TypeVar("C", bound=Classifier)

# Kinds of each layer, in the order of the model; the dictionary need not be there.
_LAYERS: dict[str, dict[str, Any]] = {
    "bag": {"EmbeddingBag": EmbeddingBag},
    "dictionary": {"LinearLayer": LinearLayer},
    "head": {"DenseHead": DenseHead, "SparseHead": SparseHead},
}
# Parameters that do not change what a fit computes, or that are no data.
_ASIDE = ("features", "transform", "checkpoint", "checkpoint_every", "resume", "callback", "verbose")


def pack(model: Classifier, optimizer: bool) -> HeadFile:
    """The layers in one file, tensors as `<layer>.<name>`."""
    file = HeadFile("Classifier", {"params": parameters(model)})
    for part in _LAYERS:
        if (layer := getattr(model, part + "_")) is None:
            continue
        inner = layer._to_file(optimizer)
        file.config[part] = {"kind": inner.kind, "config": inner.config}
        file.state[part] = inner.state
        file.tensors |= {f"{part}.{name}": array for name, array in inner.tensors.items()}
        file.integers |= {f"{part}.{name}" for name in inner.integers}
    return file


def unpack(file: HeadFile, model: Classifier) -> None:
    """Gives a model the layers of a file that `pack` made."""
    layers: dict[str, Any] = dict.fromkeys(_LAYERS)
    for part, kinds in _LAYERS.items():
        if part not in file.config:
            continue
        kind, config = file.config[part]["kind"], file.config[part]["config"]
        dot = part + "."
        tensors = {n.removeprefix(dot): array for n, array in file.tensors.items() if n.startswith(dot)}
        integers = {n.removeprefix(dot) for n in file.integers if n.startswith(dot)}
        layers[part] = kinds[kind]._from_file(HeadFile(kind, config, tensors, file.state[part], integers))
    for part, layer in layers.items():
        setattr(model, part + "_", layer)


def parameters(model: Classifier) -> dict[str, Any]:
    """The parameters that JSON can hold; arrays among the head's options, which the head keeps, by their checksums."""
    params = {name: _plain(value) for name, value in model.get_params(deep=False).items() if name not in _ASIDE}
    options = {name: _plain(value) for name, value in (model.head_options or {}).items()}
    return {**params, "head_options": options or None}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"checksum": checksum(value)}
    return value.item() if isinstance(value, np.generic) else value


def _with_arrays(params: dict[str, Any], file: HeadFile) -> dict[str, Any]:
    """What `parameters` made, with the arrays again."""
    options = params["head_options"]
    if options is not None:
        options = {n: file.tensors[f"head.{n}"] if isinstance(value, dict) else value for n, value in options.items()}
    return {**params, "head_options": options}


def save_model(model: Classifier, path: Any) -> None:
    """See `Classifier.save`."""
    file = pack(model, optimizer=False)
    features = model.features
    if isinstance(features, NGramHasher):
        if callable(features.romanise):
            raise Error(
                "features: a file cannot hold a callable romanise; set features=None, and give it to load() again"
            )
        file.config["features"] = features.get_params()
    if model._names is not None:
        file.config["classes"] = model._names.dtype.kind
        file.tensors |= _names_to_tensors(model._names)
    save_head(path, file)


def load_model(cls: type[C], path: Path, features: Any | None) -> C:
    """See `Classifier.load`."""
    file = load_head(path, "Classifier")
    try:
        if features is None and "features" in file.config:
            options = dict(file.config["features"])
            features = NGramHasher(**{**options, "ngram_range": tuple(options["ngram_range"])})
        model = cls(**_with_arrays(file.config["params"], file), features=features)
        unpack(file, model)
        model._names = _names_from_tensors(file) if "classes" in file.config else None
        model.n_features_in_, model.n_classes_ = model.bag_.n_features, model.head_.n_classes
        model.history_ = []
        return model
    except FileError:
        raise
    except (Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: a saved Classifier that this version cannot build: {error}") from error


def _names_to_tensors(names: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if names.dtype.kind in "iu":
        return {"classes": names.astype(np.int64)}
    if names.dtype.kind == "f":
        return {"classes": names.astype(np.float64)}
    packed = PackedStrings(str(name) for name in names)
    return {"classes.text": packed.text, "classes.offsets": packed.offsets}


def _names_from_tensors(file: HeadFile) -> NDArray[Any]:
    if "classes" in file.tensors:
        return file.tensors["classes"]
    return np.array(list(PackedStrings.from_arrays(file.tensors["classes.text"], file.tensors["classes.offsets"])))


def _add_best(file: HeadFile, best: HeadFile) -> None:
    file.config["best"], file.state["best"] = best.config, best.state
    file.tensors |= {f"best.{name}": array for name, array in best.tensors.items()}
    file.integers |= {f"best.{name}" for name in best.integers}


def _best_of(file: HeadFile) -> HeadFile | None:
    """What `_add_best` added."""
    if "best" not in file.config:
        return None
    tensors = {n.removeprefix("best."): array for n, array in file.tensors.items() if n.startswith("best.")}
    integers = {n.removeprefix("best.") for n in file.integers if n.startswith("best.")}
    return HeadFile("Classifier", file.config["best"], tensors, file.state["best"], integers)


class Keeper:
    """Writes the state of a fit now and then, and takes it up again; keeps the mean loss of the epoch, part of it.

    Everything random is a function of seed, epoch and step, so these numbers are all there is to a generator's state.
    """

    def __init__(
        self,
        model: Classifier,
        examples: Examples,
        targets: Targets,
        weight: NDArray[np.float64] | None,
        validation: Validation,
    ) -> None:
        self.model, self.validation = model, validation
        self.path = None if model.checkpoint is None else Path(model.checkpoint)
        self.reset()
        self.written = time.monotonic()
        if self.path is not None:
            self.identity = {
                "params": json.loads(json.dumps(parameters(model))),  # as it will come back: tuples are lists
                "examples": len(examples),
                "X": examples.checksum(),
                "Y": targets.checksum(),
                "weight": 0.0 if weight is None else float(weight.sum()),
            }

    def reset(self) -> None:
        """Starts an epoch."""
        self.total, self.count = 0.0, 0

    def add(self, loss: float, examples: int) -> None:
        """Counts a batch."""
        self.total += loss * examples
        self.count += examples

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    def tick(self, step: int, last: bool = False) -> None:
        """Writes the state after `step` steps, if it is time to or training ends."""
        if self.path is None or not (last or time.monotonic() - self.written >= self.model.checkpoint_every):
            return
        file = pack(self.model, optimizer=True)
        file.kind = "ClassifierCheckpoint"
        file.config["identity"] = self.identity
        file.state |= {"step": step, "total": self.total, "count": self.count, "history": self.model.history_}
        if self.validation.best is not None:
            _add_best(file, self.validation.best)
        save_head(self.path, file)
        self.written = time.monotonic()

    def restore(self) -> int:
        """Takes the state over, if there is any, and returns the number of steps that were taken.

        Raises:
            FileError: the file is damaged, or of a fit of other data or parameters; the message says which.
        """
        if self.path is None or not self.path.exists():
            return 0
        file = load_head(self.path, "ClassifierCheckpoint")
        identity = file.config["identity"]
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise FileError(
                    f"{self.path}: a checkpoint of another fit: {name} was {identity.get(name)}, is {value}; delete "
                    "the file or fit with resume=False"
                )
        unpack(file, self.model)
        self.total, self.count = file.state["total"], file.state["count"]
        self.model.history_ = file.state["history"]
        self.validation.best = _best_of(file)
        self.validation.replay(self.model.history_)
        return int(file.state["step"])
