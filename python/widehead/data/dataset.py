"""widehead/data/dataset.py -- what a data file holds: points with features or texts, and their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse


@dataclass(frozen=True)
class Dataset:
    """Points and their labels.

    Attributes:
        labels: CSR float32 [n, n_labels], ascending indices; values are label weights (1 where the format has none).
        features: CSR float32 [n, n_features], ascending indices; None where the points are texts.
        texts: n strings; None where the points have features.
    """

    labels: scipy.sparse.csr_array
    features: scipy.sparse.csr_array | None = None
    texts: list[str] | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def n_labels(self) -> int:
        return int(self.labels.shape[1])

    @property
    def n_features(self) -> int | None:
        return None if self.features is None else int(self.features.shape[1])

    @property
    def points(self) -> Any:
        """The inputs, whichever kind they are."""
        return self.features if self.features is not None else self.texts

    def take(self, rows: Any) -> Dataset:
        """The points with the numbers `rows`, in that order."""
        return Dataset(
            labels=self.labels[rows],
            features=None if self.features is None else self.features[rows],
            texts=None if self.texts is None else [self.texts[i] for i in np.asarray(rows).tolist()],
        )

    def split(self, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Two disjoint parts, the second with `share` of the points drawn by `seed`; both keep the order of the file.

        Raises ValueError where `share` is not inside (0, 1) or a part would be empty.
        """
        n_second = round(len(self) * share)
        if not 0.0 < share < 1.0 or not 0 < n_second < len(self):
            raise ValueError(f"share: cannot split {len(self)} points with share {share}; both parts need a point")
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[n_second:])), self.take(np.sort(order[:n_second]))


def statistics(dataset: Dataset) -> dict[str, float]:
    """Sizes and the shape of the tail of a data set, by name."""
    labels = dataset.labels
    n = len(dataset)
    counts = np.bincount(labels.indices, minlength=dataset.n_labels)
    own = np.diff(labels.indptr)
    used = counts > 0
    out: dict[str, float] = {"points": n}
    if dataset.features is not None:
        out["features"] = dataset.features.shape[1]
        out["features per point"] = dataset.features.nnz / max(1, n)
    if dataset.texts is not None:
        out["characters per point"] = sum(map(len, dataset.texts)) / max(1, n)
    out["labels"] = dataset.n_labels
    out["labels per point"] = labels.nnz / max(1, n)
    out["points without labels"] = int(np.count_nonzero(own == 0))
    out["points per label in use"] = labels.nnz / max(1, int(used.sum()))
    out["labels without points"] = int(np.count_nonzero(~used))
    out["labels with 1 point"] = int(np.count_nonzero(counts == 1))
    out["labels with 2-4 points"] = int(np.count_nonzero((counts >= 2) & (counts <= 4)))
    out["labels with 5-9 points"] = int(np.count_nonzero((counts >= 5) & (counts <= 9)))
    out["labels with 10 or more"] = int(np.count_nonzero(counts >= 10))
    out["points of the commonest label"] = int(counts.max(initial=0))
    head = np.sort(counts)[::-1][: max(1, int(used.sum()) // 100)]
    out["share of the commonest 1 % of labels"] = float(head.sum() / max(1, labels.nnz))
    return out
