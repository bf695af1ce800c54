"""widehead/options.py -- the loss options of the dense head, checked once for the NumPy and the PyTorch face."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._core import ShapeError

LOSSES = ("softmax", "sampled_softmax", "bce", "squared_hinge")
REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class DenseOptions:
    """Options of `DenseHead` that are plain numbers and names; None means off.

    Raises:
        ShapeError: an unknown name, a number out of its range, or an option that the loss has no place for.
    """

    loss: str = "softmax"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    lse_penalty: float = 0.0
    softcap: float | None = None
    filter_eps: float | None = None
    negatives: int | None = None
    reduction: str = "mean"

    def __post_init__(self) -> None:
        choose(self.loss, LOSSES, "loss")
        choose(self.reduction, REDUCTIONS, "reduction")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ShapeError(f"label_smoothing: expected a number in [0, 1], got {self.label_smoothing}")
        between(self.lse_penalty, 0.0, math.inf, "lse_penalty")
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ShapeError(f"softcap: expected None or a positive number, got {self.softcap}")
        if self.filter_eps is not None:
            between(self.filter_eps, 0.0, 1.0, "filter_eps")
        softmax = self.loss in ("softmax", "sampled_softmax")
        given = {"lse_penalty": self.lse_penalty, "softcap": self.softcap, "filter_eps": self.filter_eps}
        for name, value in given.items():
            if value and not softmax:
                raise ShapeError(
                    f"{name}: expected nothing with loss={self.loss!r}, got {value}: it belongs to softmax"
                )
        if self.label_smoothing and self.loss != "softmax":
            raise ShapeError(f"label_smoothing: expected 0 with loss={self.loss!r}, got {self.label_smoothing}")
        if (self.negatives is not None) != (self.loss == "sampled_softmax"):
            wanted = "an integer of at least 1" if self.loss == "sampled_softmax" else "None"
            raise ShapeError(f"negatives: expected {wanted} with loss={self.loss!r}, got {self.negatives}")
        if self.negatives is not None and self.negatives < 1:
            raise ShapeError(f"negatives: expected an integer of at least 1, got {self.negatives}")

    @property
    def core_loss(self) -> str:
        """The loss's name in the core, where sampled softmax is softmax over the sampled classes."""
        return "softmax" if self.loss == "sampled_softmax" else self.loss


def choose(value: str, names: tuple[str, ...], argument: str) -> str:
    if value not in names:
        raise ShapeError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {value!r}")
    return value


def between(value: float, low: float, high: float, argument: str) -> None:
    """Raises ShapeError unless low <= value < high."""
    if not low <= value < high:
        raise ShapeError(f"{argument}: expected a number in [{low}, {high}), got {value}")
