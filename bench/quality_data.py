"""quality_data.py -- the sets of sparse_quality.py: features and labels of a training and a test part, as CSR matrices.

A folder of the name of the set holds `X.train.npz`, `Y.train.npz`, `X.test.npz`, `Y.test.npz`; or one file in the XMC
text format with the number of its training rows, which come first, in `TRAINING_ROWS`; or `train.tsv` and `test.tsv`
(`text<TAB>label,label`, perhaps compressed), of which words and their counts become tf-idf.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from widehead import data
from widehead.data import Dataset

TRAINING_ROWS = {"bibtex": 4880}
VALIDATION, SPLIT_SEED = 0.1, 7
_WORD = re.compile(r"[^\W_]+")


def load(folder: Path) -> tuple[Dataset, Dataset]:
    """The training and the test part; rows of the features have unit length."""
    if (folder / "X.train.npz").exists():
        train = data.load(folder / "X.train.npz", folder / "Y.train.npz")
        sizes = {"n_features": train.n_features, "n_labels": train.n_labels}
        return _unit(train), _unit(data.load(folder / "X.test.npz", folder / "Y.test.npz", **sizes))
    texts = sorted(folder.glob("train.tsv*"))
    if texts:
        return _of_texts(texts[0], next(folder.glob("test.tsv*")))
    (file,) = folder.glob("*.xmc.txt*")
    whole, first = data.load(file), TRAINING_ROWS[folder.name]
    return _unit(whole.take(np.arange(first))), _unit(whole.take(np.arange(first, len(whole))))


def split(folder: Path, validation: bool) -> tuple[Dataset, Dataset]:
    """What a run trains on and what it is measured on: for tuning, both from the training part."""
    train, test = load(folder)
    return train.split(VALIDATION, SPLIT_SEED) if validation else (train, test)


def _unit(part: Dataset) -> Dataset:
    assert part.features is not None
    length = np.sqrt(np.asarray(part.features.multiply(part.features).sum(1)).ravel())
    scaled = sp.csr_array(sp.diags_array(1.0 / np.maximum(length, 1e-12)) @ part.features).astype(np.float32)
    return Dataset(labels=part.labels, features=scaled)


def _of_texts(train: Path, test: Path) -> tuple[Dataset, Dataset]:
    first = data.load(train)
    return of_words(first, data.load(test, n_labels=first.n_labels))


def of_words(first: Dataset, second: Dataset, least: int = 2) -> tuple[Dataset, Dataset]:
    """Features of texts: words of at least `least` training texts, (1 + log count) idf."""
    words: dict[str, int] = {}
    counted = [_counts(part.texts or [], words, grow=part is first) for part in (first, second)]
    seen = np.bincount(counted[0].indices, minlength=len(words))
    kept = np.flatnonzero(seen >= least)
    idf = np.log(len(first) / seen[kept])
    parts = []
    for part, counts in zip((first, second), counted, strict=True):
        csr = sp.csr_array((1.0 + np.log(counts.data), counts.indices, counts.indptr), (len(part), len(words)))
        parts.append(_unit(Dataset(labels=part.labels, features=sp.csr_array(csr[:, kept] @ sp.diags_array(idf)))))
    return parts[0], parts[1]


def _counts(texts: list[str], words: dict[str, int], grow: bool) -> sp.csr_array:
    rows, columns = [], []
    for row, text in enumerate(texts):
        for word in _WORD.findall(text.casefold()):
            at = words.setdefault(word, len(words)) if grow else words.get(word)
            if at is not None:
                rows.append(row)
                columns.append(at)
    out = sp.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(texts), len(words)))
    out.sum_duplicates()
    return out
