"""widehead/labels.py -- targets: one class an example, or a sparse row of classes with weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._core import DtypeError, LabelError, ShapeError

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Labels:
    """Sparse multi-label targets of a batch in CSR form.

    Row r has the classes `indices[indptr[r]:indptr[r + 1]]`, distinct and in any order.

    Args:
        indptr: `[batch + 1]` int64, from 0 to the number of labels, never decreasing.
        indices: `[nnz]` int64 classes in `[0, n_classes)`.
        values: `[nnz]` float32 weights of the labels, or None for 1.
        n_classes: number of classes.

    The arrays are kept as they come, so that the same type carries arrays of other libraries; a head checks them when
    it uses them, and `check()` does so at once.
    """

    indptr: Any
    indices: Any
    values: Any
    n_classes: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @classmethod
    def from_csr(cls, matrix: Any) -> Labels:
        """The rows of a `scipy.sparse` CSR array or matrix; stored numbers are the weights (a bool matrix: weight
        1)."""
        if getattr(matrix, "format", None) != "csr":
            got = getattr(matrix, "format", type(matrix).__name__)
            raise DtypeError(f"matrix: expected a scipy.sparse matrix in CSR format, got {got}; call .tocsr()")
        values = None if matrix.dtype == np.bool_ else matrix.data.astype(np.float32, copy=False)
        indptr, indices = (a.astype(np.int64, copy=False) for a in (matrix.indptr, matrix.indices))
        return cls(indptr, indices, values, int(matrix.shape[1])).check()

    @classmethod
    def from_lists(
        cls, rows: Iterable[Sequence[int]], n_classes: int, values: Iterable[Sequence[float]] | None = None
    ) -> Labels:
        """From one sequence of classes a row, and one of weights a row where they are not all 1."""
        classes = [_int64(row, "rows", 1) for row in rows]
        indptr = np.zeros(len(classes) + 1, np.int64)
        np.cumsum([len(row) for row in classes], out=indptr[1:])
        indices = np.concatenate(classes) if classes else np.zeros(0, np.int64)
        flat = None
        if values is not None:
            parts = [np.asarray(row, dtype=np.float32).reshape(-1) for row in values]
            if [len(part) for part in parts] != [len(row) for row in classes]:
                raise ShapeError("values: expected as many weights as classes in every row")
            flat = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return cls(indptr, indices, flat, n_classes).check()

    def check(self) -> Labels:
        """Returns the same labels as contiguous NumPy arrays of the right types.

        Raises:
            DtypeError, ShapeError: an array of another type or shape.
            LabelError: row pointers that decrease, a class out of range, a weight that is not finite.
        """
        indptr = _int64(self.indptr, "indptr", 1)
        indices = _int64(self.indices, "indices", 1)
        if len(indptr) < 1 or indptr[0] != 0 or indptr[-1] != len(indices):
            ends = f"{indptr[0]} to {indptr[-1]}" if len(indptr) else "nothing"
            raise LabelError(f"indptr: expected row pointers from 0 to the number of labels {len(indices)}, got {ends}")
        falls = np.flatnonzero(np.diff(indptr) < 0)
        if len(falls):
            raise LabelError(f"indptr: expected row pointers that never decrease, got a fall at row {falls[0]}")
        check_range(indices, self.n_classes, "indices")
        values = self.values
        if values is not None:
            values = np.ascontiguousarray(values, dtype=np.float32)
            if values.shape != indices.shape:
                raise ShapeError(f"values: expected shape [nnz] = [{len(indices)}], got {list(values.shape)}")
            if not np.isfinite(values).all():
                at = int(np.flatnonzero(~np.isfinite(values))[0])
                raise LabelError(f"values: expected finite weights, got {values[at]} at position {at}")
        if values is self.values and indptr is self.indptr and indices is self.indices:
            return self
        return Labels(indptr, indices, values, self.n_classes)


def check_range(labels: Int64, n_classes: int, name: str, ignore_index: int | None = None) -> None:
    """Raises LabelError naming the first label outside [0, n_classes), its position and the range."""
    bad = (labels < 0) | (labels >= n_classes)
    if ignore_index is not None:
        bad &= labels != ignore_index
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise LabelError(f"{name}: expected classes in [0, {n_classes}), got {labels[at]} at position {at}")


def _int64(array: Any, name: str, ndim: int) -> Int64:
    array = np.asarray(array)
    if array.ndim != ndim:
        raise ShapeError(f"{name}: expected {ndim} dimension, got {array.ndim} {list(array.shape)}")
    if array.dtype.kind not in "iu" and array.size:
        raise DtypeError(f"{name}: expected integers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


@dataclass(frozen=True)
class Target:
    """A batch's targets as the core takes them: `indptr` None means one class a row."""

    indptr: Int64 | None
    indices: Int64
    values: Float32 | None

    def arguments(self) -> dict[str, Any]:
        return {"indptr": self.indptr, "indices": self.indices, "values": self.values}


def as_target(target: ArrayLike | Labels | Any, shape: tuple[int, ...], n_classes: int) -> Target:
    """Targets of a batch of the given shape (the axes before the last one of hidden).

    Takes integers of that shape (0-D for one example), or `Labels` or a `scipy.sparse` CSR matrix with one row an
    example.
    """
    rows = int(np.prod(shape, dtype=np.int64))
    if not isinstance(target, Labels) and hasattr(target, "tocsr"):
        target = Labels.from_csr(target)
    if isinstance(target, Labels):
        labels = target.check()
        if len(labels) != rows or labels.n_classes != n_classes:
            raise ShapeError(
                f"target: expected labels of shape [batch, n_classes] = [{rows}, {n_classes}], "
                f"got [{len(labels)}, {labels.n_classes}]"
            )
        return Target(labels.indptr, labels.indices, labels.values)
    array = np.asarray(target)
    # An empty list is an array of float64: there is no label in it that could be wrong.
    if array.dtype.kind not in "iu" and array.size:
        raise DtypeError(f"target: expected integer classes, Labels or a scipy.sparse CSR matrix, got {array.dtype}")
    if array.shape != shape:
        raise ShapeError(
            f"target: expected shape {list(shape)} as hidden without its last axis, got {list(array.shape)}"
        )
    return Target(None, np.ascontiguousarray(array.reshape(-1), dtype=np.int64), None)
