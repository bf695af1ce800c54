"""_validation.py -- a held-out part of the training data: judges epochs, keeps the best model, ends the training."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._checkpoint import pack, unpack
from ._training import Examples, Source, Targets, order_of
from .files import HeadFile
from .metrics import MetricAccumulator

if TYPE_CHECKING:
    from .estimator import Classifier

_METRIC = re.compile(r"(P|nDCG|hit|recall)@([1-9][0-9]{0,5})")
_SPLIT = 2**63  # in place of an epoch's number, so that the split is no epoch's order
_SERVE = 1024  # examples at a time in predictions


def place_of(metric: str) -> int:
    """The k of `P@k`, or 0 where this is no metric."""
    match = _METRIC.fullmatch(metric) if isinstance(metric, str) else None
    return int(match[2]) if match else 0


class Validation:
    """Splits the examples of a fit by the seed, and follows the validation figure from epoch to epoch.

    Without early stopping and without the schedule "plateau" nothing is held out, and all this does nothing.

    Attributes:
        training: numbers of the examples to train on, ascending.
        best: the layers as they were after the best epoch so far.
        best_epoch: that epoch, -1 at first.
        stop: whether training is to end.
        factor: of the learning rate, by the schedule "plateau".
    """

    def __init__(self, model: Classifier, examples: Examples, targets: Targets) -> None:
        self.model, self.targets = model, targets
        self.active = bool(model.early_stopping) or model.schedule == "plateau"
        self.training: NDArray[np.int64] = np.arange(len(examples))
        self.held = self.training[:0]
        self.best: HeadFile | None = None
        self._forget()
        if not self.active:
            return
        count = round(len(examples) * float(model.validation_fraction or 0))
        if not 0 < count < len(examples):
            part = "none to validate with" if count < 1 else "none to train on"
            raise _core.ShapeError(
                f"validation_fraction: {model.validation_fraction} of {len(examples)} examples leaves {part}"
            )
        order = order_of(len(examples), model.seed, _SPLIT)
        self.held, self.training = np.sort(order[:count]), np.sort(order[count:])
        self.source: Source = examples.epoch(0, None)

    def _forget(self) -> None:
        self.best_epoch, self.best_score = -1, -np.inf
        self.stop, self.factor, self._waited = False, 1.0, 0

    @property
    def training_targets(self) -> Targets:
        if not self.active:
            return self.targets
        return Targets(self.targets.take(self.training), self.targets.n_classes)

    def judge(self, entry: dict[str, float]) -> None:
        """Measures the model after an epoch, and notes the figure in that epoch's entry of the history."""
        if not self.active:
            return
        entry["validation"] = self._measure()
        if self._follow(entry):
            self.best = pack(self.model, optimizer=False)
            self.best.tensors = {name: array.copy() for name, array in self.best.tensors.items()}

    def replay(self, history: list[dict[str, float]]) -> None:
        """Comes to the state after the epochs of a history, of which it is a function; `best` comes from elsewhere."""
        self._forget()
        for entry in history if self.active else []:
            self._follow(entry)

    def finish(self) -> None:
        """Gives the model the layers of its best epoch."""
        model = self.model
        if self.best is not None and self.best_epoch != len(model.history_) - 1:
            unpack(self.best, model)
        model.best_epoch_ = self.best_epoch if self.active else None
        model.best_validation_score_ = self.best_score if self.active else None

    def _measure(self) -> float:
        model, name = self.model, self.model.validation_metric
        k = place_of(name)
        found = MetricAccumulator((k,))
        for first in range(0, len(self.held), _SERVE):
            rows = self.held[first : first + _SERVE]
            hidden = model._represent(self.source.rows(rows))
            found.update(model.head_.topk(hidden, min(k, model.n_classes_))[1], self.targets.take(rows))
        return found.result()[name]

    def _follow(self, entry: dict[str, float]) -> bool:
        """Whether the epoch is the best so far."""
        epoch, score = int(entry["epoch"]), entry["validation"]
        if score > self.best_score:
            self.best_epoch, self.best_score, self._waited = epoch, score, 0
            return True
        self._waited += 1
        if self.model.schedule == "plateau" and self._waited >= self.model.patience:
            self.factor, self._waited = 0.5 * self.factor, 0
        self.stop = bool(self.model.early_stopping) and epoch - self.best_epoch >= self.model.n_iter_no_change
        return False
