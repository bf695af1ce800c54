"""widehead/metrics.py -- ranking metrics of top-k lists: P, nDCG, PSP, PSnDCG, hit, recall and coverage at k."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse

from ._core import DtypeError, LabelError, ShapeError

Int64Array: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]

# Rows times classes must fit an int64 key; blocks of rows and this bound on class numbers keep it far from overflow.
_MAX_CLASS = 1 << 40
_BLOCK_ROWS = 1 << 18


class _Truth(NamedTuple):
    """The true classes of a batch: indptr [n + 1], classes [nnz] ascending and distinct within a row."""

    indptr: Int64Array
    classes: Int64Array


def _as_truth(truth: Any) -> _Truth:
    """CSR form of `truth`: scipy sparse, an object with indptr and indices, a 1-D class array, or a list of lists."""
    if scipy.sparse.issparse(truth):
        indptr, classes = _nonzero_csr(truth)
    elif hasattr(truth, "indptr") and hasattr(truth, "indices"):
        indptr, classes = np.asarray(truth.indptr), np.asarray(truth.indices)
    elif isinstance(truth, np.ndarray):
        indptr, classes = _csr_of_vector(truth)
    elif hasattr(truth, "__len__") and len(truth) and not hasattr(truth[0], "__len__"):
        indptr, classes = _csr_of_vector(np.asarray(truth))
    else:
        rows = list(truth)
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=indptr[1:])
        flat = np.array(list(chain.from_iterable(rows)))
        classes = flat if flat.size else flat.astype(np.int64)
    if classes.dtype.kind not in "iu":
        raise DtypeError(f"truth: expected integer classes, got {classes.dtype}")
    return _sorted_distinct(indptr.astype(np.int64, copy=False), classes.astype(np.int64, copy=False))


def _nonzero_csr(matrix: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """indptr and indices of a sparse matrix without its stored zeros."""
    csr = scipy.sparse.csr_array(matrix)
    if csr.nnz and not np.all(csr.data):
        csr = csr.copy()
        csr.eliminate_zeros()
    return csr.indptr, csr.indices


def _csr_of_vector(truth: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    if truth.ndim != 1:
        expected = "a sparse matrix, a list of lists or a 1-D class array"
        raise ShapeError(f"truth: expected {expected}, got an array of shape {truth.shape}")
    if truth.dtype.kind not in "iu":
        raise DtypeError(f"truth: expected integer classes, got {truth.dtype}")
    known = truth != -1
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(known)]), truth[known]


def _sorted_distinct(indptr: Int64Array, classes: Int64Array) -> _Truth:
    if classes.size and (int(classes.min()) < 0 or int(classes.max()) >= _MAX_CLASS):
        position = int(np.flatnonzero((classes < 0) | (classes >= _MAX_CLASS))[0])
        row = int(np.searchsorted(indptr, position, side="right")) - 1
        raise LabelError(f"truth: class {classes[position]} of row {row} is outside 0..{_MAX_CLASS - 1}")
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    same_row = rows[1:] == rows[:-1]
    if np.any(same_row & (classes[1:] <= classes[:-1])):
        order = np.lexsort((classes, rows))
        classes = classes[order]
        keep = np.ones(len(classes), bool)
        keep[1:] = (classes[1:] != classes[:-1]) | (rows[1:] != rows[:-1])
        classes, rows = classes[keep], rows[keep]
        indptr = np.searchsorted(rows, np.arange(len(indptr))).astype(np.int64)
    return _Truth(indptr, classes)


def _as_topk(topk: Any) -> Int64Array:
    array = np.asarray(topk)
    if array.ndim != 2:
        raise ShapeError(f"topk: expected an array [n, k], got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise DtypeError(f"topk: expected integer classes, got {array.dtype}")
    return array.astype(np.int64, copy=False)


def _check_topk(topk: Int64Array) -> None:
    if topk.size and int(topk.min()) < -1:
        row = int(np.flatnonzero((topk < -1).any(axis=1))[0])
        raise LabelError(f"topk: row {row} holds {topk[row].min()}; classes are >= 0 and -1 stands for none")
    ordered = np.sort(topk, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise LabelError(f"topk: row {int(np.flatnonzero(twice)[0])} names a class twice")


def inverse_propensity(labels: Any, a: float = 0.55, b: float = 1.5, *, n_points: int | None = None) -> FloatArray:
    """Inverse propensity of every class, from the labels of the training data.

    Jain, Prabhu, Varma, "Extreme Multi-label Loss Functions for Recommendation, Tagging, Ranking & Other Missing Label
    Applications" (KDD 2016): `q_l = 1 + C (N_l + b)^-a` with `C = (log N - 1)(b + 1)^a`.

    Args:
        labels: sparse matrix [n, n_classes] of the training labels (stored zeros do not count), or the counts
            [n_classes] of points that carry each class, with `n_points`.
        a, b: the data set's constants. Customary values: 0.5, 0.4 for Wikipedia sets; 0.6, 2.6 for Amazon sets;
            0.55, 1.5 otherwise.
        n_points: number of training points, where `labels` is an array of counts.

    Returns:
        float64 [n_classes].

    Raises:
        ShapeError: counts that are not 1-D. ValueError: counts without `n_points`, or no training points at all.
    """
    if scipy.sparse.issparse(labels):
        n_points = labels.shape[0] if n_points is None else n_points
        counts = np.bincount(_as_truth(labels).classes, minlength=labels.shape[1]).astype(np.float64)
    else:
        counts = np.asarray(labels, np.float64)
        if counts.ndim != 1:
            raise ShapeError(f"labels: expected a sparse matrix or counts [n_classes], got shape {counts.shape}")
    if n_points is None:
        raise ValueError("n_points: needed where labels are given as counts")
    if n_points < 1:
        raise ValueError(f"n_points: expected at least 1, got {n_points}")
    c = (np.log(n_points) - 1.0) * (b + 1.0) ** a
    return 1.0 + c * (counts + b) ** -a


class MetricAccumulator:
    """Metrics of top-k lists, gathered batch by batch.

    Args:
        ks: the places at which `result` reports.
        inverse_propensity: float [n_classes], see `inverse_propensity`; adds the propensity-scored metrics.

    A row without true classes counts as an example that nothing can get right.
    """

    def __init__(self, ks: Sequence[int] = (1, 3, 5), inverse_propensity: Any | None = None) -> None:
        self.ks = tuple(sorted({int(k) for k in ks}))
        if not self.ks or self.ks[0] < 1:
            raise ValueError(f"ks: expected places of at least 1, got {tuple(ks)}")
        self.k = self.ks[-1]
        self.count = 0
        self._weights: FloatArray | None = None
        names = ["P", "nDCG", "hit", "recall"]
        if inverse_propensity is not None:
            self._weights = np.asarray(inverse_propensity, np.float64)
            if self._weights.ndim != 1:
                raise ShapeError(f"inverse_propensity: expected [n_classes], got shape {self._weights.shape}")
            names += ["PSP", "PSP_best", "PSnDCG", "PSnDCG_best"]
        self._sums = {name: np.zeros(self.k) for name in names}
        self._first_place = np.zeros(0, np.int64)  # best place at which a class was ever hit, self.k where it never was
        self._seen = np.zeros(0, bool)
        self._places = np.arange(1, self.k + 1)
        self._discount = 1.0 / np.log2(self._places + 1.0)
        self._ideal = np.concatenate([[0.0], np.cumsum(self._discount)])

    def update(self, topk: Any, truth: Any) -> None:
        """Adds a batch.

        Args:
            topk: integer classes [n, k], best first; -1 stands for none. Columns beyond the largest place are ignored,
                missing ones count as misses.
            truth: the true classes: a scipy sparse matrix [n, n_classes] (stored zeros do not count), an object with
                `indptr` and `indices`, a 1-D class array [n] (-1: none), or a list of n lists.

        Raises:
            ShapeError, DtypeError, LabelError: wrong shape or dtype; a class below -1, named twice in a row of `topk`,
            or beyond `inverse_propensity`. Nothing is added then.
        """
        lists = _as_topk(topk)
        _check_topk(lists)
        true = _as_truth(truth)
        if len(true.indptr) - 1 != len(lists):
            raise ShapeError(f"truth: expected {len(lists)} rows, as topk has, got {len(true.indptr) - 1}")
        if self._weights is not None and true.classes.size and int(true.classes.max()) >= len(self._weights):
            raise LabelError(
                f"truth: class {int(true.classes.max())} is outside inverse_propensity of {len(self._weights)} classes"
            )
        padded = np.full((len(lists), self.k), -1, np.int64)
        width = min(self.k, lists.shape[1])
        padded[:, :width] = lists[:, :width]
        for start in range(0, len(padded), _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, len(padded))
            indptr = true.indptr[start : stop + 1]
            block = _Truth(indptr - indptr[0], true.classes[indptr[0] : indptr[-1]])
            self._add(padded[start:stop], block)
        self.count += len(padded)

    def _add(self, lists: Int64Array, true: _Truth) -> None:
        n = len(lists)
        lengths = np.diff(true.indptr)
        rows = np.repeat(np.arange(n), lengths)
        hit = self._hits(lists, true, rows)
        hits = np.cumsum(hit, axis=1)
        some = np.maximum(lengths, 1)[:, None]
        ideal = self._ideal[np.minimum(self._places, some)]  # [n, k]
        self._sums["P"] += hits.sum(axis=0) / self._places
        self._sums["hit"] += (hits > 0).sum(axis=0)
        self._sums["recall"] += (hits / some).sum(axis=0)
        self._sums["nDCG"] += (np.cumsum(hit * self._discount, axis=1) / ideal).sum(axis=0)
        self._cover(lists, hit, true.classes)
        if self._weights is not None:
            gain = np.zeros(hit.shape)
            gain[hit] = self._weights[lists[hit]]
            self._propensity("", gain, ideal)
            self._propensity("_best", self._best_gain(true, rows, n), ideal)

    def _hits(self, lists: Int64Array, true: _Truth, rows: Int64Array) -> npt.NDArray[np.bool_]:
        """hit[i, j]: is lists[i, j] one of row i's true classes? By a search in the sorted keys row * span + class."""
        if not true.classes.size:
            return np.zeros(lists.shape, bool)
        span = int(true.classes.max()) + 2
        keys = rows * span + true.classes
        inside = (lists >= 0) & (lists < span)
        wanted = np.arange(len(lists))[:, None] * span + np.where(inside, lists, span - 1)
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return inside & (keys[place] == wanted)

    def _cover(self, lists: Int64Array, hit: npt.NDArray[np.bool_], classes: Int64Array) -> None:
        if not classes.size:
            return
        missing = int(classes.max()) + 1 - len(self._seen)
        if missing > 0:
            grow = max(missing, len(self._seen))  # doubling keeps many small updates linear
            self._seen = np.concatenate([self._seen, np.zeros(grow, bool)])
            self._first_place = np.concatenate([self._first_place, np.full(grow, self.k)])
        self._seen[classes] = True
        _, places = np.nonzero(hit)
        np.minimum.at(self._first_place, lists[hit], places)

    def _propensity(self, suffix: str, gain: FloatArray, ideal: FloatArray) -> None:
        self._sums["PSP" + suffix] += np.cumsum(gain, axis=1).sum(axis=0) / self._places
        self._sums["PSnDCG" + suffix] += (np.cumsum(gain * self._discount, axis=1) / ideal).sum(axis=0)

    def _best_gain(self, true: _Truth, rows: Int64Array, n: int) -> FloatArray:
        """The k largest weights of each row's true classes, descending: what a perfect list would gain."""
        assert self._weights is not None
        weights = self._weights[true.classes]
        order = np.lexsort((-weights, rows))
        place = np.arange(len(rows)) - true.indptr[rows]
        best = np.zeros((n, self.k))
        kept = place < self.k
        best[rows[kept], place[kept]] = weights[order][kept]
        return best

    def at_each_place(self) -> dict[str, FloatArray]:
        """The metrics at every place 1..max(ks): name -> float64 [max(ks)]. Raises ValueError before any example."""
        if not self.count:
            raise ValueError("no examples: call update before asking for results")
        out = {name: self._sums[name] / self.count for name in ("P", "nDCG")}
        if self._weights is not None:
            for name in ("PSP", "PSnDCG"):
                best = self._sums[name + "_best"]
                out[name] = np.divide(self._sums[name], best, out=np.zeros(self.k), where=best > 0)
        out["hit"] = self._sums["hit"] / self.count
        out["recall"] = self._sums["recall"] / self.count
        covered = np.bincount(self._first_place[self._seen], minlength=self.k + 1)[: self.k]
        out["coverage"] = np.cumsum(covered) / max(1, int(self._seen.sum()))
        return out

    def result(self) -> dict[str, float]:
        """The metrics at the places `ks`, as fractions in [0, 1]: {"P@1": ..., "nDCG@1": ..., ...}.

        P: precision; nDCG: normalised discounted cumulative gain; PSP, PSnDCG: the same weighted by inverse propensity
        and divided by the best value that could be had; hit: rows with at least one true class in the list; recall:
        share of a row's true classes in the list; coverage: share of the classes seen as true that were ever found.

        Raises:
            ValueError: no example was added yet.
        """
        return {f"{name}@{k}": float(values[k - 1]) for name, values in self.at_each_place().items() for k in self.ks}


def _single(name: str, topk: Any, truth: Any, k: int | None, weights: Any | None = None) -> FloatArray:
    lists = _as_topk(topk)
    accumulator = MetricAccumulator((k if k is not None else lists.shape[1],), weights)
    accumulator.update(lists, truth)
    return accumulator.at_each_place()[name]


def precision_at_k(topk: Any, truth: Any, k: int | None = None) -> FloatArray:
    """Precision at places 1..k, float64 [k] (k: the width of `topk`). Arguments as `MetricAccumulator.update`."""
    return _single("P", topk, truth, k)


def ndcg_at_k(topk: Any, truth: Any, k: int | None = None) -> FloatArray:
    """Normalised discounted cumulative gain at places 1..k, float64 [k]: sum of 1/log2(place + 1) over hits, divided
    by what min(place, number of true classes) hits would give. Arguments as `MetricAccumulator.update`."""
    return _single("nDCG", topk, truth, k)


def hit_at_k(topk: Any, truth: Any, k: int | None = None) -> FloatArray:
    """Share of rows with a true class among the first 1..k, float64 [k]. Arguments as `MetricAccumulator.update`."""
    return _single("hit", topk, truth, k)


def recall_at_k(topk: Any, truth: Any, k: int | None = None) -> FloatArray:
    """Mean share of a row's true classes among the first 1..k, float64 [k]; a row without true classes counts 0.
    Arguments as `MetricAccumulator.update`."""
    return _single("recall", topk, truth, k)


def coverage_at_k(topk: Any, truth: Any, k: int | None = None) -> FloatArray:
    """Share of the true classes that some row finds among its first 1..k, float64 [k].
    Arguments as `MetricAccumulator.update`."""
    return _single("coverage", topk, truth, k)


def psp_at_k(topk: Any, truth: Any, weights: Iterable[float], k: int | None = None) -> FloatArray:
    """Propensity-scored precision at places 1..k, float64 [k], divided by the best that could be had.
    `weights`: inverse propensities [n_classes]. Other arguments as `MetricAccumulator.update`."""
    return _single("PSP", topk, truth, k, weights)


def psndcg_at_k(topk: Any, truth: Any, weights: Iterable[float], k: int | None = None) -> FloatArray:
    """Propensity-scored nDCG at places 1..k, float64 [k], divided by the best that could be had.
    `weights`: inverse propensities [n_classes]. Other arguments as `MetricAccumulator.update`."""
    return _single("PSnDCG", topk, truth, k, weights)
