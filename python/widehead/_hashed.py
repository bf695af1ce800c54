"""_hashed.py -- the NumPy face of the hashed head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import as_batch, check_finite, from_bfloat16
from ._core import ShapeError
from ._output import OutputHead
from ._results import TopKResult
from .hash_index import best_of
from .labels import Labels, Target, as_target
from .options import HashedOptions
from .sampling import IGNORED, Proposal, SampledClasses


class HashedHead(OutputHead):
    """A softmax layer that trains on the classes which hash tables over its weights find for each example.

    A step reads and writes the rows of `candidates` classes an example (those that share most buckets with its hidden
    state), of its targets, and of `negatives` classes drawn uniformly for the batch: its cost does not grow with the
    number of classes, while the buckets keep their size (Vijayanarasimhan, Shlens, Monga, Yagnik, arXiv 1412.7479).
    Rows that have moved far are hashed again after the step.

    Args:
        in_features, n_classes: d and D.
        family, tables, hashes, window, max_bucket: of the tables, see `widehead.numpy.HashIndex`. 64 to 256 rows a
            bucket, D / 2^(hashes log2(window)), are a good aim.
        candidates: retrieved classes an example.
        negatives: uniform draws a step; with 0 nothing stands for the rest, whatever the estimator.
        estimator: of the normaliser. "corrected": candidates and targets count as they are, the draws for all the rest;
            unbiased. "restricted", the paper's: a softmax over what is seen. "importance": each class by the odds that
            it is seen, as its collisions tell.
        shared: one set of candidates for the whole batch: less work for the same number of classes, and fewer that
            matter to an example.
        probes: further buckets a table, see `HashIndex.query`.
        drift: a row is hashed again when the lengths of its steps since then sum to this share of its own.
        rebuild_every: also hash all rows every so many steps, or None; `rebuild_growth`: that number is multiplied by
            it each time.
        ignore_index, bias, reduction, dtype, seed: see `DenseHead`.

    Raises:
        ShapeError: an option out of its range.

    `forward`, `lse`, `log_prob` and `scores` are exact, over all classes. `topk` and `predict` look among candidates,
    unless `exact`. Where weights are written to in place, call `rebuild()`.

    `hidden` and targets are those of `DenseHead`.
    """

    kind = "HashedHead"
    prefix = "dense"  # of the functions over all classes
    options: HashedOptions  # type: ignore[assignment]
    class_weight = None

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        family: str = "wta",
        tables: int = 50,
        hashes: int = 4,
        window: int = 8,
        candidates: int = 1000,
        negatives: int = 1000,
        estimator: str = "corrected",
        shared: bool = False,
        max_bucket: int | None = None,
        probes: int = 0,
        drift: float = 0.03,
        rebuild_every: int | None = None,
        rebuild_growth: float = 1.0,
        ignore_index: int = -100,
        bias: bool = True,
        reduction: str = "mean",
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        self._configure(
            in_features,
            n_classes,
            family=family,
            tables=tables,
            hashes=hashes,
            window=window,
            candidates=candidates,
            negatives=negatives,
            estimator=estimator,
            shared=shared,
            max_bucket=max_bucket,
            probes=probes,
            drift=drift,
            rebuild_every=rebuild_every,
            rebuild_growth=rebuild_growth,
            ignore_index=ignore_index,
            bias=bias,
            reduction=reduction,
            dtype=dtype,
            seed=seed,
        )
        self.reset_parameters()

    def _configure(
        self,
        in_features: int,
        n_classes: int,
        *,
        bias: bool = True,
        dtype: str = "float32",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.options = HashedOptions(**options)
        self._stale = True
        self._allocate(in_features, n_classes, bias, dtype, seed)
        self._index = _core.HashIndex(self.in_features, bias=bias, **self.options.index_arguments(), seed=self.seed)
        if self.options.probes > self.options.hashes:
            raise ShapeError(f"probes: expected at most hashes = {self.options.hashes}, got {self.options.probes}")
        self._draws = Proposal("uniform", self.n_classes)
        self._drift = np.zeros(self.n_classes, np.float32)
        self._moved = np.empty(0, np.int64)
        self._next_rebuild, self._interval = self._first_rebuild()
        self.rehashed = 0

    def __repr__(self) -> str:
        o = self.options
        return (
            f"HashedHead({self.in_features}, {self.n_classes}, family={o.family!r}, tables={o.tables}, "
            f"candidates={o.candidates}, negatives={o.negatives}, dtype={self.dtype!r})"
        )

    def rebuild(self) -> None:
        """Hashes all the rows anew: after weights were written to in place."""
        self._index.build(self._weight, self._bias)
        self._drift[:] = 0
        self._stale = False

    def statistics(self) -> dict[str, int]:
        """Of the tables: see `HashIndex.statistics`; `rehashed` counts rows that were hashed again after a step."""
        self._ready()
        return {**self._index.statistics(), "rehashed": self.rehashed}

    def candidates(self, hidden: NDArray, n: int | None = None) -> NDArray[np.int64]:
        """The classes `[..., n]` that share most buckets with each hidden state, most first; -1 where there are no
        more. n: the head's `candidates` if None.
        """
        rows, shape = as_batch(hidden, self.in_features)
        found = self._retrieve(rows, self.options.candidates if n is None else n)[0]
        return found.reshape(*shape, -1)

    def topk(  # type: ignore[override]
        self,
        hidden: NDArray,
        k: int,
        exclude: Labels | Iterable[Sequence[int]] | Any | None = None,
        *,
        exact: bool = False,
        candidates: int | None = None,
    ) -> TopKResult:
        """The k best classes among an example's candidates, best first.

        Args:
            hidden, k, exclude: see `DenseHead.topk`.
            exact: among all classes, in a stream.
            candidates: how many to look at, the head's own number if None.

        Returns:
            scores and int64 classes `[..., k]`; -infinity and -1 where fewer than k were found.
        """
        if exact:
            return super().topk(hidden, k, exclude)
        rows, shape = as_batch(hidden, self.in_features)
        if not isinstance(k, int | np.integer) or k < 1:
            raise ShapeError(f"k: expected an integer of at least 1, got {k!r}")
        wanted = max(k, self.options.candidates if candidates is None else candidates)
        ids = self._retrieve(rows, wanted)[0]
        if exclude is not None:
            if not isinstance(exclude, Labels) and not hasattr(exclude, "tocsr"):
                exclude = Labels.from_lists(exclude, self.n_classes)
            out = as_target(exclude, shape, self.n_classes)
            for i, own in enumerate(ids):
                indptr = out.indptr
                seen = out.indices[indptr[i] : indptr[i + 1]] if indptr is not None else out.indices[i : i + 1]
                own[np.isin(own, seen)] = -1
        return best_of(rows, self._weight, self._bias, ids, int(k)).reshaped(shape)

    def predict(self, hidden: NDArray, *, exact: bool = False) -> NDArray[np.int64]:
        """The best class of every example, int64 of the batch's shape; -1 where nothing was found."""
        return self.topk(hidden, 1, exact=exact).classes[..., 0]

    def recall(self, hidden: NDArray, k: int, *, candidates: int | None = None) -> float:
        """Which share of the k best classes `topk` finds: a pass over all classes."""
        exact = super().topk(hidden, k).classes.reshape(-1, k)
        found = self.topk(hidden, k, candidates=candidates).classes.reshape(-1, k)
        hits = sum(int(np.isin(a, b[b >= 0]).sum()) for a, b in zip(exact, found, strict=True))
        return hits / max(1, int((exact >= 0).sum()))

    def _train(
        self,
        hidden: NDArray,
        goal: Target,
        scale: NDArray,
        losses: NDArray,
        grad_hidden: NDArray,
        update: dict[str, Any],
    ) -> None:
        check_finite(hidden)
        train = self._train_shared if self.options.shared else self._train_apart
        train(hidden, goal, scale, losses, grad_hidden, update)

    def _train_apart(
        self,
        hidden: NDArray,
        goal: Target,
        scale: NDArray,
        losses: NDArray,
        grad_hidden: NDArray,
        update: dict[str, Any],
    ) -> None:
        """Each example with classes of its own."""
        o, wide = self.options, np.empty(len(hidden))
        ids, counts = self._retrieve(hidden, o.candidates, ranked=False)
        batch = _core.hashed_forward(
            **self._layer(hidden),
            **goal.arguments(),
            ignore_index=o.ignore_index,
            estimator=o.estimator,
            candidates=ids,
            counts=counts,
            tables=o.tables,
            negatives=self._drawn(),
            losses=wide,
        )
        if len(self._moved) < batch.rows:
            self._moved = np.empty(batch.rows * 2, np.int64)
        moved = _core.hashed_backward(
            batch,
            grad_losses=scale.astype(np.float64),
            weight=self._weight,
            bias=self._bias,
            grad_hidden=grad_hidden,
            update=update,
            drift=self._drift,
            drift_limit=o.drift,
            moved=self._moved,
        )
        losses[:] = wide
        self._rehash(self._moved[:moved])

    def _train_shared(
        self,
        hidden: NDArray,
        goal: Target,
        scale: NDArray,
        losses: NDArray,
        grad_hidden: NDArray,
        update: dict[str, Any],
    ) -> None:
        """All examples with the same classes: a dense product over a few rows."""
        o = self.options
        own = goal.indices if goal.indptr is not None else goal.indices[goal.indices != o.ignore_index]
        sampled = shared_classes(
            self._retrieve(hidden, o.candidates, ranked=False),
            own,
            self._drawn(),
            self.n_classes,
            o.candidates,
            o.estimator,
        )
        indices = np.searchsorted(sampled.rows, goal.indices)
        if goal.indptr is None:
            indices[goal.indices == o.ignore_index] = IGNORED
        sampled = SampledClasses(sampled.rows, sampled.offset, indices)
        before = self._numbers(sampled.rows)
        self._train_rows(sampled, hidden, goal, scale, losses, grad_hidden, update)
        after = self._numbers(sampled.rows)
        length = np.linalg.norm(after, axis=1)
        self._drift[sampled.rows] += np.linalg.norm(after - before, axis=1) / np.where(length > 0, length, 1.0)
        self._rehash(sampled.rows[self._drift[sampled.rows] > o.drift])

    def _numbers(self, rows: NDArray[np.int64]) -> NDArray:
        """Weights of some rows as float32 (float64)."""
        return from_bfloat16(self._weight[rows]) if self.dtype == "bfloat16" else self._weight[rows]

    def _rehash(self, rows: NDArray[np.int64]) -> None:
        self._index.update(rows, self._weight, self._bias)
        self._drift[rows] = 0
        self.rehashed += len(rows)

    def _after_step(self) -> None:
        if self._next_rebuild is not None and self.steps >= self._next_rebuild:
            self.rebuild()
            self._interval *= self.options.rebuild_growth
            self._next_rebuild = self.steps + round(self._interval)

    def _first_rebuild(self) -> tuple[int | None, float]:
        every = self.options.rebuild_every
        return every, float(every or 0)

    def _drawn(self) -> NDArray[np.int64] | None:
        n = self.options.negatives
        return self._draws.draw(n, seed=self.seed, step=self.steps) if n else None

    def _retrieve(self, hidden: NDArray, n: int, ranked: bool = True) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        self._ready()
        ids, counts = np.full((len(hidden), n), -1, np.int64), np.zeros((len(hidden), n), np.int32)
        if len(hidden):
            self._index.query(hidden, ids=ids, counts=counts, probes=self.options.probes, ranked=ranked)
        return ids, counts

    def _ready(self) -> None:
        if self._stale:
            self.rebuild()

    @property
    def weight(self) -> NDArray:
        """`[n_classes, in_features]`, not a copy; call `rebuild()` after writing to it."""
        return self._weight

    @weight.setter
    def weight(self, value: ArrayLike) -> None:
        OutputHead.weight.fset(self, value)  # type: ignore[attr-defined]
        self._stale = True

    @property
    def bias(self) -> NDArray | None:
        """`[n_classes]`, not a copy; None without bias."""
        return self._bias

    @bias.setter
    def bias(self, value: ArrayLike | None) -> None:
        OutputHead.bias.fset(self, value)  # type: ignore[attr-defined]
        self._stale = True

    def reset_parameters(self) -> None:
        """See `DenseHead`; the tables are made anew when they are wanted."""
        super().reset_parameters()
        self._stale = True
        self._next_rebuild, self._interval = self._first_rebuild()

    def load_state_dict(self, state: dict[str, ArrayLike]) -> None:
        super().load_state_dict(state)
        self._stale = True

    def grow(self, n_classes: int) -> None:
        """Adds classes at the end, up to `n_classes`, with the first weights of a head made with so many."""
        self._grow(n_classes)
        self._draws = Proposal("uniform", self.n_classes)
        self._drift = np.zeros(self.n_classes, np.float32)
        self._stale = True

    def _loss_arguments(self) -> dict[str, Any]:
        return {**super()._loss_arguments(), "softcap": 0.0}

    def _config(self) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in self.options.__dataclass_fields__}
        for name in ("loss", "label_smoothing", "lse_penalty"):
            del options[name]
        return {
            "in_features": self.in_features,
            "n_classes": self.n_classes,
            **options,
            "bias": self._bias is not None,
            "dtype": self.dtype,
            "seed": self.seed,
        }


def shared_classes(
    found: tuple[NDArray[np.int64], NDArray[np.int32]],
    targets: NDArray[np.int64],
    draws: NDArray[np.int64] | None,
    n_classes: int,
    most: int,
    estimator: str,
) -> SampledClasses:
    """One set for a batch: the `most` classes with most collisions over all examples, the targets of all, and the
    draws, weighted for all the rest; `indices` is left empty."""
    ids, counts = found
    there = ids >= 0
    retrieved, place = np.unique(ids[there], return_inverse=True)
    if len(retrieved) > most:
        met = np.bincount(place, weights=counts[there])
        retrieved = np.sort(retrieved[np.lexsort((retrieved, -met))[:most]])
    kept = np.union1d(retrieved, targets)
    outside, times = np.empty(0, np.int64), np.empty(0, np.int64)
    if draws is not None:
        drawn, count = np.unique(draws, return_counts=True)
        apart = ~np.isin(drawn, kept)
        outside, times = drawn[apart], count[apart]
    weight = np.zeros(len(outside))
    if estimator == "corrected" and len(outside):
        weight = np.log(times * ((n_classes - len(kept)) / times.sum()))
    rows = np.concatenate([kept, outside])
    order = np.argsort(rows)
    return SampledClasses(
        rows[order], np.concatenate([np.zeros(len(kept)), weight])[order].astype(np.float32), np.empty(0, np.int64)
    )
