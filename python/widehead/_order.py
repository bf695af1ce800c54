"""widehead/_order.py -- classes held in another order than they are numbered."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._core import DtypeError, LabelError, ShapeError


def checked_order(order: ArrayLike, n_classes: int, name: str = "class_order") -> NDArray[np.int64]:
    """order as a new int64 array, if it is a permutation of 0 .. n_classes - 1."""
    array = np.asarray(order)
    if array.dtype.kind not in "iu":
        raise DtypeError(f"{name}: expected integers, got {array.dtype}")
    if array.shape != (n_classes,):
        raise ShapeError(f"{name}: expected shape [n_classes] = [{n_classes}], got {list(array.shape)}")
    bad = np.flatnonzero((array < 0) | (array >= n_classes))
    if len(bad):
        raise ShapeError(
            f"{name}: expected a permutation of 0 .. {n_classes - 1}, got {array[bad[0]]} at position {bad[0]}"
        )
    counts = np.bincount(array, minlength=n_classes)
    if (counts > 1).any():
        again = int(np.argmax(counts > 1))
        raise ShapeError(f"{name}: expected a permutation of 0 .. {n_classes - 1}, got {again} {counts[again]} times")
    return array.astype(np.int64)


def inverse(order: NDArray[np.int64]) -> NDArray[np.int32]:
    """The place of every class in the order."""
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank


class ClassOrder:
    """Row i of a head is class `order[i]`, and class c is row `rank[c]`; both `[n_classes]`."""

    # What a target that does not count becomes: no class of the user's can be taken for it.
    IGNORED = -(2**63)

    def __init__(self, order: ArrayLike, n_classes: int) -> None:
        self.order = checked_order(order, n_classes)
        self.rank = inverse(self.order)
        self._weights: tuple[Any, Any] = (None, None)

    def rows(self, classes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of classes that have been checked."""
        return self.rank[classes].astype(np.int64)

    def targets(self, classes: NDArray[np.int64], ignore_index: int) -> NDArray[np.int64]:
        """The rows of single labels; IGNORED for the ignore_index, which need not be a class."""
        ignored = classes == ignore_index
        return np.where(ignored, np.int64(self.IGNORED), self.rows(np.where(ignored, 0, classes)))

    def weights(self, weight: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """Numbers of the classes as numbers of the rows; kept until others come."""
        if weight is not self._weights[0]:
            self._weights = (weight, None if weight is None else weight[self.order])
        return self._weights[1]

    def grown(self, n_classes: int) -> ClassOrder:
        """With new classes, in order, at the end."""
        fresh = np.arange(len(self.order), n_classes)
        return ClassOrder(np.concatenate([self.order, fresh]), n_classes)


def refuse_repeated(indptr: NDArray[np.int64] | None, indices: NDArray[np.int64]) -> None:
    """Raises LabelError for the first class that stands twice in a row of labels, by its own number."""
    for row in range(0 if indptr is None else len(indptr) - 1):
        assert indptr is not None
        labels = indices[indptr[row] : indptr[row + 1]]
        kinds, counts = np.unique(labels, return_counts=True)
        if (counts > 1).any():
            raise LabelError(
                f"target: label {kinds[counts > 1][0]} is in row {row} more than once: the labels of a row must be "
                "distinct"
            )
