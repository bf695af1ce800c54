"""widehead/sampling.py -- the bookkeeping of sampled softmax, shared by the NumPy and the PyTorch heads.

A step draws n classes with replacement from a proposal q, shared by the whole batch, and works on the distinct classes
A of the draws and of the batch's targets. A class drawn m_c times gets log(m_c / (n q_c)) added to its logit, a class
that is there as a target only gets -infinity; neither is added where the class is the example's own target. Then

    Z_i = sum_{c in own targets} exp z_c + sum_{c drawn, not own} m_c / (n q_c) exp z_c

has the full softmax's normaliser as its expectation: own targets are counted exactly, and draws of them are left out.
(Bengio & Senecal 2008; the log-q correction of Jean et al., arXiv 1412.2007.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._core import ShapeError
from .labels import check_range

NAMES = ("uniform", "log_uniform", "alias")

# The position of a label that does not count: the head's own ignore_index, which is often 0, could be one of a class.
IGNORED = -100


class Proposal:
    """The distribution over classes that negatives are drawn from.

    Args:
        proposal: "uniform"; "log_uniform", Zipf's law over classes sorted by falling frequency; or `[n_classes]`
            positive weights (for example the classes' frequencies, raised to 0.75), drawn from in O(1) by Walker's
            alias method.
        n_classes: number of classes.

    Raises:
        ShapeError: an unknown name, or weights of another shape, not finite, or not positive. A class of weight 0 would
            never be drawn, and the estimate of the normaliser would miss it.
    """

    def __init__(self, proposal: str | ArrayLike, n_classes: int) -> None:
        self.n_classes = n_classes
        self.weight: NDArray[np.float64] | None = None
        self.table: dict[str, NDArray] = {}  # Walker's, as the core takes it
        if isinstance(proposal, str):
            if proposal not in NAMES[:2]:
                raise ShapeError(
                    f"proposal: expected 'uniform', 'log_uniform' or an array of weights [n_classes], got {proposal!r}"
                )
            self.name = proposal
            return
        self.name = "alias"
        self.weight = np.ascontiguousarray(proposal, dtype=np.float64)
        if self.weight.shape != (n_classes,):
            raise ShapeError(f"proposal: expected shape [n_classes] = [{n_classes}], got {list(self.weight.shape)}")
        threshold, alias = np.empty(n_classes, np.float32), np.empty(n_classes, np.int64)
        _core.alias_table(weight=self.weight, threshold=threshold, alias=alias)
        self.table = {"threshold": threshold, "alias": alias}
        self.log_total = float(np.log(self.weight.sum()))

    def log_probability(self, classes: NDArray[np.int64]) -> NDArray[np.float64]:
        """log q_c of the given classes, float64."""
        if self.weight is not None:
            return np.log(self.weight[classes]) - self.log_total
        if self.name == "uniform":
            return np.full(classes.shape, -np.log(self.n_classes))
        # log((c + 2) / (c + 1)) without the cancellation that large c would bring.
        return np.log(np.log1p(1.0 / (classes + 1.0))) - np.log(np.log1p(self.n_classes))

    def draw(self, n: int, *, seed: int, step: int) -> NDArray[np.int64]:
        """`[n]` classes with replacement, a function of (seed, step) alone."""
        draws = np.empty(n, np.int64)
        threshold, alias = self.table.get("threshold"), self.table.get("alias")
        _core.sample_classes(
            draws=draws, n_classes=self.n_classes, proposal=self.name, threshold=threshold, alias=alias, seed=seed,
            step=step,
        )  # fmt: skip
        return draws


@dataclass(frozen=True)
class SampledClasses:
    """The classes that one step works on.

    Attributes:
        rows: `[A]` int64, distinct and ascending: rows of the weight.
        offset: `[A]` float32, added to the logits except at an example's own targets.
        indices: the batch's labels as positions in `rows`; IGNORED where the label is ignore_index.
    """

    rows: NDArray[np.int64]
    offset: NDArray[np.float32]
    indices: NDArray[np.int64]


def sample_classes(
    proposal: Proposal,
    n: int,
    indices: NDArray[np.int64],
    *,
    seed: int,
    step: int,
    ignore_index: int | None = None,
) -> SampledClasses:
    """Draws a step's negatives and joins them with the batch's labels.

    Args:
        proposal: where negatives come from.
        n: number of draws, at least 1.
        indices: `[batch]` or `[nnz]` int64 labels of the batch.
        seed, step: the draws are a function of them.
        ignore_index: a label to pass over (single-label targets only).

    Raises:
        LabelError: a label out of range.
    """
    check_range(indices, proposal.n_classes, "target", ignore_index)
    kept = indices if ignore_index is None else indices[indices != ignore_index]
    drawn, count = np.unique(proposal.draw(n, seed=seed, step=step), return_counts=True)
    rows = np.union1d(drawn, kept)
    offset = np.full(len(rows), -np.inf, np.float32)
    offset[np.searchsorted(rows, drawn)] = np.log(count / n) - proposal.log_probability(drawn)
    position = np.searchsorted(rows, indices)
    if ignore_index is not None:
        position[indices == ignore_index] = IGNORED
    return SampledClasses(rows, offset, position)
