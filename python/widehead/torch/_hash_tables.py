"""_hash_tables.py -- the tables of a hashed head, and when its rows are hashed again.

A fused step says by how much each of its rows has moved; those that have come far enough are hashed again in the
optimiser's step(). An optimiser of torch does not say: there the rows that have had a gradient are noted, and hashed
again together when they are many or the tables are old.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from widehead import _core
from widehead.options import HashedOptions

from ._device import capsule
from ._glue import follow_threads

_OLD = 50  # backward passes of plain training until noted rows are hashed again
_MANY = 16  # or when more than one in so many rows is noted


def version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class HashTables:
    """Over a weight `[D, d]` and a bias `[D]` or None, on the CPU.

    Attributes:
        drift: float32 `[D]`, the lengths of a row's steps since it was hashed over its own.
        moved: int64, room for the rows of a step that have drifted too far, and how many there are: `n_moved`.
    """

    def __init__(self, in_features: int, n_classes: int, bias: bool, options: HashedOptions, seed: int) -> None:
        self.options, self._bias = options, bias
        self._index: Any = _core.HashIndex(in_features, bias=bias, **options.index_arguments(), seed=seed)
        self.drift = torch.zeros(n_classes, dtype=torch.float32)
        self.moved, self.n_moved = torch.empty(0, dtype=torch.int64), 0
        self.rehashed = self._passes = 0
        self._noted: Tensor | None = None  # bool [D]
        self._steps, self._due, self._interval = 0, options.rebuild_every, float(options.rebuild_every or 0)
        self._seen: list[tuple[int, int]] | None = None  # place and version of what the tables know

    def build(self, weight: Tensor, bias: Tensor | None) -> None:
        follow_threads()
        self._index.build(capsule(weight), capsule(bias))
        self.drift.zero_()
        self.n_moved = self._passes = 0
        self._noted = None
        self.settle(weight, bias)

    def settle(self, weight: Tensor, bias: Tensor | None) -> None:
        """The parameters are as the tables know them."""
        self._seen = self._state(weight, bias)

    def retrieve(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, n: int, ranked: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Classes int64 and collisions int32, both `[B, n]`; ranked: most collisions first."""
        self._follow(weight, bias)
        ids = torch.full((len(hidden), n), -1, dtype=torch.int64)
        counts = torch.zeros(len(hidden), n, dtype=torch.int32)
        if len(hidden):
            follow_threads()
            found = {"ids": capsule(ids), "counts": capsule(counts)}
            self._index.query(capsule(hidden), **found, probes=self.options.probes, ranked=ranked)
        return ids, counts

    def room(self, rows: int) -> Tensor:
        """`moved`, for a step of so many rows."""
        if len(self.moved) < rows:
            self.moved = torch.empty(2 * rows, dtype=torch.int64)
        return self.moved

    def close_step(self, weight: Tensor, bias: Tensor | None) -> None:
        """After a fused step: hashes what has moved far, or all when it is time to."""
        self._steps += 1
        if self._due is not None and self._steps >= self._due:
            self._interval *= self.options.rebuild_growth
            self._due = self._steps + round(self._interval)
            return self.build(weight, bias)
        if self.options.shared:  # its steps do not say how far rows move: they are noted
            return None
        self._rehash(self.moved[: self.n_moved], weight, bias)
        self.n_moved = 0
        return self.settle(weight, bias)

    def note(self, rows: Tensor) -> None:
        """Rows that an optimiser of torch is going to move."""
        if self._noted is None:
            self._noted = torch.zeros(len(self.drift), dtype=torch.bool)
        self._noted[rows] = True
        self._passes += 1

    def statistics(self, weight: Tensor, bias: Tensor | None) -> dict[str, int]:
        self._follow(weight, bias)
        return {**self._index.statistics(), "rehashed": self.rehashed}

    def _follow(self, weight: Tensor, bias: Tensor | None) -> None:
        now = self._state(weight, bias)
        if self._seen == now:
            return
        noted = None if self._noted is None else int(self._noted.sum())
        moved_alone = self._seen is not None and [place for place, _ in self._seen] == [place for place, _ in now]
        if not noted or not moved_alone:
            self.build(weight, bias)
        elif noted * _MANY > len(self.drift) or self._passes >= _OLD:
            assert self._noted is not None
            self._rehash(self._noted.nonzero()[:, 0], weight, bias)
            self._noted, self._passes = None, 0
            self.settle(weight, bias)

    def _rehash(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if not len(rows):
            return
        follow_threads()
        self._index.update(capsule(rows.contiguous()), capsule(weight), capsule(bias))
        self.drift[rows] = 0
        self.rehashed += len(rows)

    @staticmethod
    def _state(weight: Tensor, bias: Tensor | None) -> list[tuple[int, int]]:
        return [(t.data_ptr(), version(t)) for t in (weight, bias) if t is not None]
