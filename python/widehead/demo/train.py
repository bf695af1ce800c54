"""widehead/demo/train.py -- trains the place resolver and measures what that costs."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..estimator import Classifier
from ..labels import Labels
from ..text import NGramHasher, PackedStrings, typos
from .options import Options
from .places import Places

_EVEN = 0.3  # share of the negatives that are drawn evenly
_HAMLET = 1000  # inhabitants that every place is given on top: a population of 0 mostly means that nobody knows it


@dataclass(frozen=True)
class Cost:
    """What a piece of work took: processor time of all threads, wall time, the process's largest memory meanwhile."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class Meter:
    """Measures from its construction to `read()`."""

    def __init__(self) -> None:
        _reset_peak()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> Cost:
        return Cost(time.process_time() - self._cpu, time.perf_counter() - self._wall, _peak())


def _reset_peak() -> None:
    # Only Linux can; elsewhere the peak is that of the whole process so far.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train(
    places: Places,
    options: Options,
    *,
    progress: bool = False,
    callback: Callable[[Classifier, int, float], None] | None = None,
) -> tuple[Classifier, Cost]:
    """A classifier from names to places, and what its training took, features included."""
    meter = Meter()
    noisy = options.typos > 0
    model = Classifier(
        "dense",
        dim=options.dim,
        loss="sampled_softmax",
        negatives=min(options.negatives, len(places)),
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        optimizer="adagrad",
        schedule="linear",
        scale=options.scale,
        dtype=options.dtype,
        n_classes=len(places),
        features=NGramHasher(2**options.hash_bits, (2, 4)),
        transform=_Typist(options.typos, options.seed) if noisy else None,
        head_options={"proposal": _proposal(places)},
        seed=options.seed,
        callback=callback,
        verbose=progress,
    )
    model.fit(places.train.names, targets(places))
    return model, meter.read()


def targets(places: Places) -> Labels:
    """The training labels; namesakes share a name's weight by the square root of their populations, so that the larger
    place comes first where nothing else tells them apart."""
    labels = places.train.labels
    size = np.sqrt(places.population[labels.indices] + float(_HAMLET))
    total = np.add.reduceat(size, labels.indptr[:-1])
    values = (size / np.repeat(total, np.diff(labels.indptr))).astype(np.float32)
    return Labels(labels.indptr, labels.indices, values, labels.n_classes)


def _proposal(places: Places) -> NDArray[np.float64]:
    """Where negatives come from: most of them by the number of names, as the targets do, so that places with many names
    are held down as often as they are held up; the rest evenly, so that every place is told from its like."""
    frequency = np.bincount(places.train.labels.indices, places.train.labels.values, len(places))
    return (1 - _EVEN) * frequency / frequency.sum() + _EVEN / len(places)


class _Typist:
    """New typing errors in every epoch."""

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self.seed = rate, seed

    def __call__(self, names: PackedStrings, epoch: int) -> Sequence[str]:
        return typos(names, self.rate, seed=self.seed, step=epoch)
