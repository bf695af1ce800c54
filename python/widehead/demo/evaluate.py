"""widehead/demo/evaluate.py -- how well a resolver finds the held-out names: in all, by script, by names a place."""

from __future__ import annotations

import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..labels import Labels
from ..text import typos
from .places import Places, names_per_place
from .resolver import Resolver

_K = 10
_TYPO_SAMPLE = 5000  # held-out names that are asked again with a typing error: enough for half a per cent
_BATCH = 2048
_BINS = ((1, 1), (2, 4), (5, 9), (10, None))
_FEW = 200  # scripts with fewer held-out names are put together

Track = Callable[[Iterable[int], str], Iterable[int]]


def hits_of(classes: NDArray[np.int64], labels: Labels) -> NDArray[np.bool_]:
    """`[n, k]`: is one of the example's labels among its first j + 1 classes? `classes` may hold -1 for none."""
    rows = np.repeat(np.arange(len(labels)), np.diff(labels.indptr))
    true = rows * labels.n_classes + labels.indices
    asked = np.arange(len(classes))[:, None] * labels.n_classes + classes
    return np.logical_or.accumulate(np.isin(asked, true) & (classes >= 0), axis=1)


def quality(hits: NDArray[np.bool_]) -> dict[str, float]:
    """Per cent: `P@1` is the share of names whose first answer is right, `hit@j` of those with a right one among j."""
    count = len(hits)
    share = 100.0 * hits.mean(axis=0) if count else np.zeros(hits.shape[1])
    wanted = [j for j in (1, 2, 3, 5, 10) if j <= hits.shape[1]]
    return {"names": count, "P@1": float(share[0])} | {f"hit@{j}": float(share[j - 1]) for j in wanted}


def script_of(name: str) -> str:
    """The script of most letters of a name, as Unicode calls it ("Latin", "Cyrillic", "Han"), or "other"."""
    scripts = Counter(_script(c) for c in name if c.isalpha())
    return scripts.most_common(1)[0][0] if scripts else "other"


def _script(letter: str) -> str:
    word = unicodedata.name(letter, "OTHER").partition(" ")[0]
    return {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "OTHER": "other"}.get(word, word.capitalize())


def evaluate(resolver: Resolver, track: Track | None = None) -> dict[str, Any]:
    """All measurements on the held-out names; per cent, see `quality`.

    Keys: `all`; `by_script`, `by_training_names` (of the place; for several places, of the one with most), dicts of
    the same; `with_country` (each name asked within the country of its place), `with_typo` (a sample, one error in each
    name); `no_known_letter`, names of which no character occurs in training (they count in `all`); `seconds`, wall time
    a name in batches; `seconds_one`, wall time of a question by itself.
    """
    follow: Track = track or (lambda items, text: items)
    places, test = resolver.places, resolver.places.test
    k = min(_K, len(places))
    began = time.perf_counter()
    hits = hits_of(_topk(resolver, test.names, k, follow, "asking for the held-out names"), test.labels)
    seconds = (time.perf_counter() - began) / max(1, len(test))
    out: dict[str, Any] = {"all": quality(hits)}
    out["by_script"] = _by(np.array([script_of(name) for name in test.names]), hits, _FEW)
    out["by_training_names"] = _by(_bins(places), hits, 0)
    out["with_country"] = quality(_country_hits(resolver, k, follow))
    sample = min(len(test), _TYPO_SAMPLE)
    noisy = typos(test.names[:sample], 1.0, seed=1, second=0.0)
    answers = _topk(resolver, noisy, k, follow, "asking with typing errors")
    out["with_typo"] = quality(hits_of(answers, _first(test.labels, sample)))
    out["no_known_letter"] = _no_known_letter(places)
    out["seconds"] = seconds
    out["seconds_one"] = _seconds_one(resolver)
    return out


def _topk(resolver: Resolver, names: Any, k: int, follow: Track, text: str) -> NDArray[np.int64]:
    parts = [resolver.topk(names[at : at + _BATCH], k) for at in follow(range(0, len(names), _BATCH), text)]
    return np.concatenate(parts) if parts else np.zeros((0, k), np.int64)


def _country_hits(resolver: Resolver, k: int, follow: Track) -> NDArray[np.bool_]:
    places, test = resolver.places, resolver.places.test
    classes = np.full((len(test), k), -1, np.int64)
    countries = places.country[test.labels.indices[test.labels.indptr[:-1]]]
    for country in follow(np.unique(countries).tolist(), "asking within countries"):
        rows = np.flatnonzero(countries == country)
        best = resolver.topk_within(test.names[rows], country, k)
        classes[rows, : best.shape[1]] = best
    return hits_of(classes, test.labels)


def _bins(places: Places) -> NDArray[Any]:
    """The bin of the number of training names, for each held-out name."""
    counts, labels = names_per_place(places), places.test.labels
    most = np.maximum.reduceat(counts[labels.indices], labels.indptr[:-1]) if len(labels) else np.zeros(0, np.int64)
    names = np.full(len(most), "none", dtype="<U8")
    for low, high in _BINS:
        text = f"{low}+" if high is None else str(low) if low == high else f"{low} to {high}"
        names[(most >= low) & (most <= (high or most.max(initial=0)))] = text
    return names


def _by(groups: NDArray[Any], hits: NDArray[np.bool_], few: int) -> dict[str, dict[str, float]]:
    """Quality by group, largest group first; groups of fewer than `few` names together as "other", last."""
    names, counts = np.unique(groups, return_counts=True)
    small = names[counts < few]
    groups = np.where(np.isin(groups, small), "other", groups)
    names, counts = np.unique(groups, return_counts=True)
    order = np.lexsort((-counts, names == "other"))
    return {str(name): quality(hits[groups == name]) for name in names[order]}


def _no_known_letter(places: Places) -> int:
    """Held-out names of which no character occurs in a training name."""
    known = np.zeros(0x110000, bool)
    known[places.train.names.text] = True
    known[ord(" ")] = False
    names = places.test.names
    found = np.concatenate([np.zeros(1, np.int64), np.cumsum(known[names.text])])
    return int((found[names.offsets[1:]] == found[names.offsets[:-1]]).sum())


def _first(labels: Labels, n: int) -> Labels:
    """The first `n` rows of labels."""
    end = labels.indptr[n]
    return Labels(labels.indptr[: n + 1], labels.indices[:end], None, labels.n_classes)


def _seconds_one(resolver: Resolver, repeats: int = 10) -> float:
    times = []
    for name in list(resolver.places.names[:repeats]):
        began = time.perf_counter()
        resolver.topk([name], min(5, len(resolver.places)))
        times.append(time.perf_counter() - began)
    return float(np.median(times))
