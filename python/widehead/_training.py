"""_training.py -- what fitting a classifier needs beside its layers: labels, batches, order, schedule, progress."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from . import _core
from .labels import Labels
from .text import NGramHasher, PackedStrings

SCHEDULES = ("linear", "cosine", "constant", "plateau")
Transform = Callable[[Any, int], Any]


def rate_at(schedule: str, warmup: float, step: int, total: int) -> float:
    """The factor of the learning rate at 0 <= step < total: up over the share `warmup` of the steps, then down to 0.

    "plateau" stays up: what lowers it depends on more than the step.
    """
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(1.0, total - rise)
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


def order_of(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of n examples, a pure function of (n, seed, epoch): the order of Philox's raw numbers."""
    return np.argsort(np.random.Philox(key=[seed % 2**64, epoch]).random_raw(n), kind="stable")


def drop_features(X: sp.csr_array, share: float, seed: int, step: int) -> sp.csr_array:
    """X without a share of its entries, the others larger by 1 / (1 - share): a function of (seed, step) alone."""
    if share == 0:
        return X
    keep = np.random.Philox(key=[seed % 2**64, 2**32 + step]).random_raw(X.nnz) >= np.uint64(share * 2.0**64)
    kept = sp.csr_array((np.where(keep, X.data / (1.0 - share), 0.0), X.indices.copy(), X.indptr.copy()), X.shape)
    kept.eliminate_zeros()
    return kept


class Targets:
    """Labels of all examples as class numbers: one an example, or rows of them."""

    def __init__(self, rows: NDArray[np.int64] | Labels, n_classes: int) -> None:
        self.rows, self.n_classes = rows, n_classes
        if isinstance(rows, Labels):
            values = np.ones(len(rows.indices), np.float32) if rows.values is None else rows.values
            self._matrix = sp.csr_array((values, rows.indices, rows.indptr), shape=(len(rows), n_classes), copy=True)
            self._matrix.sort_indices()
            row = np.repeat(np.arange(len(rows)), np.diff(rows.indptr))
            again = np.flatnonzero((np.diff(self._matrix.indices) == 0) & (np.diff(row) == 0))
            if len(again):
                at = again[0]
                raise _core.LabelError(f"Y: class {self._matrix.indices[at]} is there twice in row {row[at]}")

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, order: NDArray[np.int64]) -> NDArray[np.int64] | Labels:
        """The targets of some examples, as a head takes them."""
        if not isinstance(self.rows, Labels):
            return self.rows[order]
        part = self._matrix[order]
        return Labels(part.indptr.astype(np.int64), part.indices.astype(np.int64), part.data, self.n_classes)

    def hits(self, best: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which examples have their class of `best` `[n]` among their targets."""
        if not isinstance(self.rows, Labels):
            return self.rows == best
        counts = np.diff(self.rows.indptr)
        found = self.rows.indices == np.repeat(best, counts)
        hits = np.zeros(len(best), bool)
        hits[np.repeat(np.arange(len(best)), counts)[found]] = True
        return hits

    def checksum(self) -> int:
        if not isinstance(self.rows, Labels):
            return checksum(self.rows)
        return checksum(self._matrix.indptr, self._matrix.indices, self._matrix.data)


def encode(
    Y: Any, n_classes: int | None, known: NDArray[Any] | None, strict: bool = True
) -> tuple[Targets, NDArray[Any] | None]:
    """Targets from what users have, and the names of the classes where these are not 0 .. n_classes - 1.

    Args:
        Y: class ids or any sortable names `[n]`; a CSR matrix or `Labels`; or a list of lists of ids.
        n_classes: number of classes; makes ids of `[n]` labels.
        known: names from an earlier call, to which Y is then matched.
        strict: refuse classes that are not among them; else they become -1, which no prediction hits.
    """
    if isinstance(Y, Labels):
        return Targets(Y.check(), Y.n_classes), None
    if sp.issparse(Y):
        labels = Labels.from_csr(sp.csr_array(Y))
        return Targets(labels, labels.n_classes), None
    if isinstance(Y, np.ndarray) and Y.ndim == 2:
        return encode(sp.csr_array(Y), n_classes, known, strict)
    Y = list(Y) if not isinstance(Y, np.ndarray) else Y
    if isinstance(Y, list) and len(Y) and isinstance(Y[0], (list, tuple, set, frozenset, np.ndarray)):
        rows = [sorted(row) for row in Y]
        count = n_classes or 1 + max((max(row) for row in rows if row), default=0)
        labels = Labels.from_lists(rows, count)
        return Targets(labels, count), None
    names = np.asarray(Y)
    if names.ndim != 1:
        raise _core.ShapeError(
            f"Y: expected one class an example [n], or rows of classes, got shape {list(names.shape)}"
        )
    if n_classes is not None:
        if names.dtype.kind not in "iu":
            raise _core.DtypeError(f"Y: expected integer classes below n_classes, got {names.dtype}")
        bad = np.flatnonzero((names < 0) | (names >= n_classes))
        if len(bad) and strict:
            raise _core.LabelError(f"Y: class {names[bad[0]]} at position {bad[0]} is not in [0, {n_classes})")
        return Targets(names.astype(np.int64), n_classes), None
    if names.dtype.kind == "f" and not np.isfinite(names).all():
        raise _core.LabelError("Y: Input y contains NaN or infinity; classes are integers or names")
    if known is None:
        known, ids = np.unique(names, return_inverse=True)
        return Targets(ids.astype(np.int64), len(known)), known
    ids = np.minimum(np.searchsorted(known, names), len(known) - 1)
    strange = np.flatnonzero(known[ids] != names)
    ids[strange] = -1
    if len(strange) and strict:
        raise _core.LabelError(
            f"Y: class {names[strange[0]]!r} at position {strange[0]} was not among the first classes"
        )
    return Targets(ids.astype(np.int64), len(known)), known


def log_odds(targets: Targets) -> NDArray[np.float32]:
    """The log-odds of each class among the examples, `[n_classes]`; a tenth of an example is added to each count.

    With a bias of 0 every class begins at a probability of a half, and the first epochs go into unlearning that for
    very many classes (Lin et al., "Focal Loss", arXiv 1708.02002, section 4.1).
    """
    labels = targets.rows.indices if isinstance(targets.rows, Labels) else targets.rows
    share = (np.bincount(labels, minlength=targets.n_classes) + 0.1) / (len(targets) + 0.2)
    share = np.minimum(share, 0.99)  # one label an example may stand in the list several times
    return np.log(share / (1.0 - share)).astype(np.float32)


class Source(Protocol):
    """Examples of one epoch."""

    def rows(self, order: NDArray[np.int64] | slice) -> sp.csr_array: ...


class _MatrixSource:
    def __init__(self, X: sp.csr_array) -> None:
        self.X = X

    def rows(self, order: NDArray[np.int64] | slice) -> sp.csr_array:
        return self.X[order]


class _StringSource:
    """Strings, hashed batch by batch: the features of a million names would need half a gigabyte."""

    def __init__(self, hasher: NGramHasher, strings: PackedStrings) -> None:
        self.hasher, self.strings = hasher, strings

    def rows(self, order: NDArray[np.int64] | slice) -> sp.csr_array:
        return self.hasher.hash(self.strings[order])


class Examples:
    """X of a fit or a prediction: features, or what a transformer makes features of."""

    def __init__(self, X: Any, features: Any | None) -> None:
        self.features = features
        if isinstance(features, NGramHasher):
            X = features.prepare(X)
        elif features is None and not callable(getattr(X, "rows", None)):
            X = as_csr(X)
        self.X = X

    def __len__(self) -> int:
        return self.X.shape[0] if hasattr(self.X, "shape") else len(self.X)

    def epoch(self, epoch: int, transform: Transform | None) -> Source:
        """The examples of an epoch, after the user's transform."""
        X = self.X if transform is None else transform(self.X, epoch)
        source: _StringSource | _MatrixSource
        if isinstance(self.features, NGramHasher):
            strings = X if isinstance(X, PackedStrings) else PackedStrings(X)
            source, n = _StringSource(self.features, strings), len(strings)
        else:
            matrix = as_csr(X if self.features is None else self.features.transform(X))
            source, n = _MatrixSource(matrix), matrix.shape[0]
        if n != len(self):
            raise _core.ShapeError(f"transform: expected {len(self)} examples back, got {n}")
        return source

    def checksum(self) -> int:
        if sp.issparse(self.X):
            return checksum(self.X.indptr, self.X.indices, self.X.data)
        return checksum(*getattr(self.X, "arrays", ()))


def as_csr(X: Any) -> sp.csr_array:
    """X as a CSR array of float32."""
    if not sp.issparse(X):
        X = np.asarray(X)
        if X.dtype.kind not in "fiub":
            raise _core.DtypeError(
                f"X: expected numbers [n, n_features], got {X.dtype}; for text give features=NGramHasher()"
            )
        if X.ndim != 2:
            raise _core.ShapeError(f"X: expected two dimensions [n, n_features], got {list(X.shape)}")
    csr = sp.csr_array(X)
    csr = csr.astype(np.float32) if csr.dtype != np.float32 else csr
    if not np.isfinite(csr.data).all():
        raise _core.NonFiniteError("X: Input X contains NaN or infinity")
    return csr


def checksum(*arrays: NDArray[Any]) -> int:
    """CRC-32 of the arrays' bytes."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return value


@contextmanager
def progress(show: bool, total: int, done: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over steps; yields what advances it by one and sets its text."""
    if not show:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Results may go to standard output.
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=total, completed=done)
        yield lambda text: bar.update(task, advance=1, description=text)
