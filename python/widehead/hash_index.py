"""hash_index.py -- hash tables over the rows of a matrix: candidates for maximum-inner-product search."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import as_batch
from ._core import DtypeError, ShapeError
from ._results import TopKResult
from .options import HASH_FAMILIES, choose, whole

__all__ = ["Candidates", "HashIndex"]


class Candidates(NamedTuple):
    """Rows `[..., n]` int64, most collisions first, then by number; -1 where there are no more; and their numbers of
    collisions int32 `[..., n]`.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int32]


class HashIndex:
    """Locality-sensitive hash tables over the rows of a matrix, for queries with large inner products.

    Each of `tables` tables sends a row to one of its buckets, by a key of `hashes` codes. Rows that share more buckets
    with a query come first (arXiv 1412.7479). The tables are cheap to build and to change, and weak at finding: for
    rows that stay as they are a graph or an inverted file finds more.

    Args:
        features: columns d of the matrix.
        bias: whether rows have a bias too: one more coordinate, 1 in a query.
        family: "wta": a code is the place of the largest of `window` coordinates; "dwta": of those that are not zero,
            for sparse rows; "simhash": the sign of a random projection.
        tables: L, at most 255. hashes: codes a key. window: coordinates a code, 2 to 256. A key has hashes *
            log2(window) bits (simhash: hashes), at most 24; 64 to 256 rows a bucket are a good aim.
        max_bucket: queries pass over buckets with more rows; None: they do not.
        seed: the tables are a function of it and the rows, on any number of threads.

    Raises:
        ShapeError: an option out of its range.

    Rows with a NaN are in no table, nor, for "dwta", rows of zeros. Results of queries may be used from several
    threads at a time, changes may not.
    """

    def __init__(
        self,
        features: int,
        *,
        bias: bool = False,
        family: str = "wta",
        tables: int = 50,
        hashes: int = 4,
        window: int = 8,
        max_bucket: int | None = None,
        seed: int = 0,
    ) -> None:
        choose(family, HASH_FAMILIES, "family")
        for name, value in (("features", features), ("tables", tables), ("hashes", hashes), ("window", window)):
            whole(value, 1, name)
        self.features, self.bias, self.family = int(features), bool(bias), family
        self.tables, self.hashes, self.window = int(tables), int(hashes), int(window)
        self._core = _core.HashIndex(
            self.features,
            bias=self.bias,
            family=family,
            tables=self.tables,
            hashes=self.hashes,
            window=self.window,
            max_bucket=max_bucket or 0,
            seed=int(seed),
        )

    def __len__(self) -> int:
        return self._core.rows

    def __repr__(self) -> str:
        return (
            f"HashIndex({self.features}, family={self.family!r}, tables={self.tables}, hashes={self.hashes}, "
            f"rows={len(self)})"
        )

    def build(self, weight: NDArray, bias: NDArray | None = None) -> None:
        """Hashes all the rows of `weight` `[n, features]` (`bias` `[n]`): float32, float16, bfloat16 or float64."""
        self._core.build(weight, bias)

    def update(self, ids: ArrayLike, weight: NDArray, bias: NDArray | None = None) -> int:
        """Hashes the rows `ids` of `weight` anew, as all the rows are now; returns how many entries have moved. The
        tables are then those that `build` would make.

        Raises:
            LabelError: a row out of range. Nothing has changed.
        """
        rows = np.asarray(ids)
        if rows.dtype.kind not in "iu" and rows.size:
            raise DtypeError(f"ids: expected integers, got {rows.dtype}")
        return self._core.update(np.ascontiguousarray(rows, np.int64).reshape(-1), weight, bias)

    def query(self, hidden: NDArray, candidates: int, *, probes: int = 0) -> Candidates:
        """The rows that share most buckets with each query.

        Args:
            hidden: `[..., features]`.
            candidates: how many at most.
            probes: further buckets a table, at most `hashes`: those of the keys with the code changed that was decided
                most narrowly.
        """
        rows, shape = as_batch(hidden, self.features)
        whole(candidates, 1, "candidates")
        ids = np.full((len(rows), candidates), -1, np.int64)
        counts = np.zeros((len(rows), candidates), np.int32)
        if len(rows):
            self._core.query(rows, ids=ids, counts=counts, probes=probes)
        return Candidates(ids.reshape(*shape, candidates), counts.reshape(*shape, candidates))

    def search(
        self,
        hidden: NDArray,
        k: int,
        weight: NDArray,
        bias: NDArray | None = None,
        *,
        candidates: int = 1000,
        probes: int = 0,
    ) -> TopKResult:
        """The k rows with the largest inner products among the candidates, whose products are computed exactly.

        Args:
            weight, bias: the rows that are in the index.
            hidden, candidates, probes: see `query`.

        Returns:
            scores and int64 rows `[..., k]`, best first; -infinity and -1 where fewer were found.
        """
        whole(k, 1, "k")
        if len(weight) != len(self):
            raise ShapeError(f"weight: expected the {len(self)} rows of the index, got {len(weight)}")
        ids = self.query(hidden, max(k, candidates), probes=probes).ids
        rows, shape = as_batch(hidden, self.features)
        return best_of(rows, weight, bias, ids.reshape(len(rows), -1), k).reshaped(shape)

    def statistics(self) -> dict[str, int]:
        """Numbers of rows in the tables and absent, buckets, those in use, the largest one, entries that wait for room,
        bytes, and rebuilds of single tables for want of room.
        """
        return self._core.statistics()


class _Best(NamedTuple):
    scores: NDArray
    classes: NDArray[np.int64]

    def reshaped(self, shape: tuple[int, ...]) -> TopKResult:
        k = self.scores.shape[-1]
        return TopKResult(self.scores.reshape(*shape, k), self.classes.reshape(*shape, k))


def best_of(rows: NDArray, weight: NDArray, bias: NDArray | None, ids: NDArray[np.int64], k: int) -> _Best:
    """The k best of the rows `ids` `[B, n]` of each example, -1 for none; of equals the lowest first."""
    kind = np.float64 if weight.dtype == np.float64 else np.float32
    scores: NDArray = np.full(ids.shape, -np.inf, kind)
    if scores.size and len(weight):
        _core.dense_scores(hidden=rows, weight=weight, bias=bias, classes=np.maximum(ids, 0), scores=scores)
        scores[ids < 0] = -np.inf
    if scores.shape[1] < k:
        missing = ((0, 0), (0, k - scores.shape[1]))
        scores = np.pad(scores, missing, constant_values=-np.inf)
        ids = np.pad(ids, missing, constant_values=-1)
    if scores.shape[1] > k:
        among = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        scores, ids = np.take_along_axis(scores, among, 1), np.take_along_axis(ids, among, 1)
    order = np.lexsort((ids, -scores))
    return _Best(np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1))
