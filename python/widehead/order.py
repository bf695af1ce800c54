"""widehead/order.py -- an order of the classes: the frequent ones first, then groups of classes that occur together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from ._core import DtypeError, LabelError, NonFiniteError, ShapeError
from .labels import Labels
from .options import check_dense_head, choose, whole

if TYPE_CHECKING:
    from ._training import Examples, Targets

_STEPS = 30  # of the walk that begins a level
_ROUNDS = 8  # of two-means after it, at most

Int64 = NDArray[np.int64]


def order_classes(
    targets: ArrayLike | Labels | Any,
    *,
    features: Any | None = None,
    n_classes: int | None = None,
    group_size: int = 1,
    dense_head: int = 0,
    seed: int = 0,
) -> Int64:
    """An order for `SparseHead(class_order=...)`, from training data: the `dense_head` most frequent classes, then the
    others so that like ones are neighbours, then those without an example.

    Classes are alike when they stand in the same examples or, with `features`, when the mean features of their examples
    are alike: that is for one class an example, where no two stand together. The others are halved again and again by
    balanced spherical two-means on these vectors (as in Parabel, WWW 2018), begun by a random walk from class to like
    class, until parts have at most `group_size` classes; parts begin where the head's groups do. Time and memory go
    with the number of labels (with features, of the features of all classes). The same data, arguments and seed give
    the same order.

    Args:
        targets: of the training examples: `Labels`, a `scipy.sparse` matrix `[n, n_classes]`, or classes `[n]`, where
            numbers below 0 are none. The labels' weights do not count.
        features: `[n, m]`, sparse or dense, of the same examples.
        n_classes: of classes `[n]`; None: up to the largest.
        group_size: of the head.
        dense_head: of the head.
        seed: decides between equals.

    Returns:
        int64 `[n_classes]`, a permutation: position i holds class order[i].

    Raises:
        ShapeError, DtypeError, LabelError, NonFiniteError: an argument that does not fit, by its name.
    """
    whole(group_size, 1, "group_size")
    whole(dense_head, 0, "dense_head")
    whole(seed, 0, "seed")
    labels = _label_matrix(targets, n_classes)
    classes = labels.shape[1]
    check_dense_head(dense_head, classes)
    X = None if features is None else _feature_matrix(features, labels.shape[0])
    counts = np.diff(labels.tocsc().indptr)
    by_count = np.lexsort((np.arange(classes), -counts))
    first, others = by_count[:dense_head], by_count[dense_head:]
    seen, unseen = others[counts[others] > 0], np.sort(others[counts[others] == 0])
    if len(seen) <= 1:
        return np.concatenate([first, seen, unseen]).astype(np.int64)
    by_class = sp.csr_array(labels.T)[seen]
    vectors = _unit_rows(by_class if X is None else by_class @ _unit_rows(X))
    found = _halve(vectors, int(group_size), np.random.default_rng(seed).permutation(len(seen)))
    return np.concatenate([first, seen[found], unseen]).astype(np.int64)


def named_order(options: dict[str, Any], examples: Examples, targets: Targets, seed: int) -> dict[str, Any]:
    """Options of a head as `Classifier` takes them, with the array of a class order that is given by its name."""
    order = options.get("class_order")
    if not isinstance(order, str):
        return dict(options)
    choose(order, ("cooccurrence", "frequency"), "class_order")
    dense_head, group_size = options.get("dense_head", 0), options.get("group_size", 1)
    features = None
    if order == "frequency":
        group_size = targets.n_classes
    elif not isinstance(targets.rows, Labels) or np.diff(targets.rows.indptr).max(initial=0) < 2:
        features = examples.epoch(0, None).rows(slice(0, len(examples)))
    found = order_classes(
        targets.rows,
        features=features,
        n_classes=targets.n_classes,
        group_size=group_size,
        dense_head=dense_head,
        seed=seed % 2**32,
    )
    return {**options, "class_order": found}


def _label_matrix(targets: Any, n_classes: int | None) -> sp.csr_array:
    """Ones where an example has a class, `[n, n_classes]`."""
    if isinstance(targets, Labels):
        labels = targets.check()
        indptr, indices, width = labels.indptr, labels.indices, labels.n_classes
    elif sp.issparse(targets):
        matrix = sp.csr_array(targets)
        indptr, indices, width = matrix.indptr, matrix.indices, matrix.shape[1]
    else:
        array = np.asarray(targets)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise DtypeError(
                f"targets: expected Labels, a scipy.sparse matrix or integer classes [n], got {array.dtype} "
                f"{list(array.shape)}"
            )
        array = array.astype(np.int64)
        width = int(array.max(initial=-1)) + 1 if n_classes is None else n_classes
        if array.max(initial=-1) >= width:
            raise LabelError(f"targets: expected classes below n_classes = {width}, got {array.max()}")
        indptr, indices = np.concatenate([[0], np.cumsum(array >= 0)]), array[array >= 0]
    if n_classes is not None and n_classes != width:
        raise ShapeError(f"n_classes: expected {width} as in targets, or None, got {n_classes}")
    whole(width, 1, "n_classes")
    ones = np.ones(len(indices), np.float32)
    matrix = sp.csr_array((ones, indices, indptr), shape=(len(indptr) - 1, width))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _feature_matrix(features: Any, examples: int) -> sp.csr_array:
    X = sp.csr_array(features, dtype=np.float32)
    if X.shape[0] != examples:
        raise ShapeError(f"features: expected {examples} rows as targets, got {X.shape[0]}")
    if not np.isfinite(X.data).all():
        raise NonFiniteError("features: expected finite numbers")
    return X


def _unit_rows(matrix: sp.csr_array) -> sp.csr_array:
    matrix = sp.csr_array(matrix, dtype=np.float32, copy=True)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    length = np.sqrt(np.bincount(rows, weights=np.square(matrix.data, dtype=np.float64), minlength=matrix.shape[0]))
    matrix.data /= np.where(length > 0, length, 1.0)[rows].astype(np.float32)
    return matrix


def _halve(vectors: sp.csr_array, leaf: int, tie: Int64) -> Int64:
    """The rows of the matrix, halved level by level down to parts of at most `leaf`; all parts of a level at once.

    tie: a random permutation: where the walks begin, and what decides between equals.
    """
    n, width = vectors.shape
    order, bounds = np.arange(n), np.array([0, n])
    rows = np.repeat(np.arange(n), np.diff(vectors.indptr))
    entries = _Entries(
        rows, vectors.data.astype(np.float64), vectors.indices.astype(np.int64), np.zeros(width, np.int64)
    )
    while (sizes := np.diff(bounds)).max() > leaf:
        part = _part_of(order, bounds)
        # Whole groups to the left, so that every part begins with one.
        left = np.where(sizes > leaf, (sizes + 2 * leaf - 1) // (2 * leaf) * leaf, sizes)
        entries = entries.keep((sizes > leaf)[part[entries.rows]])
        order = _Level(part, bounds, left, entries, tie).split()
        bounds = np.unique(np.concatenate([bounds, bounds[:-1] + left]))
        entries = entries.split(_part_of(order, bounds))
    # In a leaf the rows stay in the order in which they came.
    return np.lexsort((np.arange(n), _part_of(order, bounds)))


def _part_of(order: Int64, bounds: Int64) -> Int64:
    """The part of each row."""
    part = np.empty(len(order), np.int64)
    part[order] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return part


@dataclass(frozen=True)
class _Entries:
    """Entries of the vectors. Those of one column in one part have one slot; a slot's part is `slot_part`."""

    rows: Int64
    values: NDArray[np.float64]
    slots: Int64
    slot_part: Int64

    def keep(self, which: NDArray[np.bool_]) -> _Entries:
        if which.all():
            return self
        return _Entries(self.rows[which], self.values[which], self.slots[which], self.slot_part)

    def split(self, part: Int64) -> _Entries:
        """With the slots of finer parts, of which an old one has at most two, side by side."""
        parts = part[self.rows]
        least = np.full(len(self.slot_part), np.iinfo(np.int64).max)
        np.minimum.at(least, self.slots, parts)
        slots = 2 * self.slots + (parts > least[self.slots])
        there = np.zeros(2 * len(self.slot_part), bool)
        there[slots] = True
        slots = (np.cumsum(there) - 1)[slots]
        slot_part = np.empty(int(there.sum()), np.int64)
        slot_part[slots] = parts
        return _Entries(self.rows, self.values, slots, slot_part)


class _Level:
    """Parts of a level, each to be halved: of `left` rows, and the others."""

    def __init__(self, part: Int64, bounds: Int64, left: Int64, entries: _Entries, tie: Int64) -> None:
        self.part, self.bounds, self.left, self.tie = part, bounds, left, tie
        self.slot_part = entries.slot_part
        starts = np.concatenate([[0], np.cumsum(np.bincount(entries.rows, minlength=len(part)))])
        shape = (len(part), len(self.slot_part))
        self.vectors = sp.csr_array((entries.values, entries.slots, starts), shape=shape)

    def split(self) -> Int64:
        """The rows, part by part, in each those that go left first."""
        scores, side = self._walk(), None
        for _ in range(_ROUNDS):
            order = np.lexsort((self.tie, -scores, self.part))
            place = np.empty(len(order), np.int64)
            place[order] = np.arange(len(order))
            before, side = side, place - self.bounds[self.part] < self.left[self.part]
            if before is not None and np.array_equal(before, side):
                break
            scores = self._scores(side)
        return order

    def _walk(self) -> NDArray[np.float64]:
        """A number for each row: noise, smoothed over like rows of the part by power iteration.

        Rows that are alike come to like numbers, so that a cut keeps them together; two-means from any two rows would
        part them.
        """
        parts = len(self.left)
        reach = self._smooth(np.ones(len(self.part)))
        reach = np.where(reach > 0, reach, 1.0)
        mass = np.bincount(self.part, weights=reach, minlength=parts)
        place = np.asarray(self.tie / len(self.tie) - 0.5, np.float64)
        for _ in range(_STEPS):
            place = self._smooth(place) / reach
            place -= (np.bincount(self.part, weights=reach * place, minlength=parts) / mass)[self.part]
            top = np.zeros(parts)
            np.maximum.at(top, self.part, np.abs(place))
            place /= np.where(top > 0, top, 1.0)[self.part]
        return np.round(place, 9)

    def _smooth(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """V V' x, part by part."""
        return np.asarray(self.vectors @ (self.vectors.T @ x), np.float64)

    def _scores(self, side: NDArray[np.bool_]) -> NDArray[np.float64]:
        """How much more each row is like the others on one side of its part than like those on the other.

        Itself left out: very sparse vectors would all stay where they are. Rounded, so that the order of a sum does not
        decide.
        """
        difference, itself = np.zeros(len(self.slot_part)), np.zeros(len(self.part))
        for chosen, sign in ((side, 1.0), (~side, -1.0)):
            sums = self.vectors.T @ chosen.astype(np.float64)
            squares = np.bincount(self.slot_part, weights=sums * sums, minlength=len(self.left))
            length = np.sqrt(np.where(squares > 0, squares, 1.0))
            difference += sign * sums / length[self.slot_part]
            itself += sign * chosen / length[self.part]
        return np.round(self.vectors @ difference - itself, 9)
