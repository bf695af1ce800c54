"""tests/python/exact_gpu.py -- the exact head's functions on a GPU behind the methods that exact_reference.Core has."""

from __future__ import annotations

from typing import Any

import numpy as np

from devices import call
from exact_reference import OPTIONS, Batch, Loss
from widehead import _core


def memory(size: int) -> np.ndarray:
    """int64 zeros of so many bytes, aligned as a GPU's allocations are."""
    room = np.zeros(size // 8 + 32, np.int64)
    first = -room.ctypes.data % 256 // 8
    return room[first : first + size // 8]


class Kept:
    """A batch between forward and step."""

    def __init__(self, memory: np.ndarray, examples: int, targets: int) -> None:
        self.memory, self.examples, self.targets = memory, examples, targets

    def counts(self) -> dict[str, Any]:
        return {"batch": self.memory, "examples": self.examples, "targets": self.targets}


class GpuCore:
    """The state lies in arrays; one batch a step."""

    def __init__(self, weight: np.ndarray, *, momentum: bool = False, wide: bool = False) -> None:
        self.weight, self.wide = weight, wide
        self.velocity = np.zeros_like(weight) if momentum else None
        self.memory = memory(self._call(_core.exact_state_bytes, state=None))
        self.refused = np.zeros(1, np.int32)
        self.check = True
        self._call(_core.exact_init)

    def _call(self, function: Any, state: Any = "own", **arguments: Any) -> Any:
        head = {"weight": self.weight, "velocity": self.velocity, "wide": self.wide}
        if state is not None:
            head["state"] = self.memory
        options = {"check": self.check, "refused": self.refused} if state is not None else {}
        return call(function, "cuda", **options, **head, **arguments)

    def bytes(self) -> bytes:
        """All that a step may change."""
        velocity = b"" if self.velocity is None else self.velocity.tobytes()
        return self.memory.tobytes() + self.weight.tobytes() + velocity

    def forward(self, batch: Batch) -> tuple[Kept, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        examples, targets = len(batch.hidden), len(batch.indices)
        size = self._call(_core.exact_batch_bytes, state=None, examples=examples, targets=targets)
        kept = Kept(memory(size), examples, targets)
        A, q, s = (np.zeros(n) for n in (targets, examples, examples))
        labels = {"indptr": batch.indptr, "indices": batch.indices}
        self._call(_core.exact_forward, batch=kept.memory, hidden=batch.hidden, **labels, A=A, q=q, s=s)
        return kept, (A, q, s)

    def backward(self, kept: Kept, by: Loss, shape: tuple[int, ...]) -> np.ndarray:
        grad_hidden = np.full(shape, np.nan)
        grads = {"grad_A": by.grad_A, "grad_q": by.grad_q, "grad_s": by.grad_s, "grad_hidden": grad_hidden}
        self._call(_core.exact_backward, batch=kept.memory, **grads)
        return grad_hidden

    def gradient(self, kept: Kept) -> tuple[float, np.ndarray]:
        """Its squared norm, and the mean squares of its columns."""
        norm2, columns = np.full(1, np.nan), np.full(self.weight.shape[1], np.nan)
        self._call(_core.exact_gradient, **kept.counts(), norm2=norm2, columns=columns)
        return float(norm2[0]), columns

    def step(self, kept: Kept, lr: float, **options: Any) -> None:
        self._call(_core.exact_step, **kept.counts(), lr=lr, **options)

    def rows(self, ids: np.ndarray | None = None) -> np.ndarray:
        ids = np.arange(len(self.weight)) if ids is None else ids
        out = np.full((len(ids), self.weight.shape[1]), np.nan)
        self._call(_core.exact_rows, ids=ids, out=out)
        return out

    def consolidate(self) -> None:
        self._call(_core.exact_consolidate)

    def refresh(self) -> None:
        self._call(_core.exact_init)

    def gram(self) -> tuple[np.ndarray, np.ndarray]:
        """W'W and W'1, of [weight | velocity]."""
        width = self.weight.shape[1] * (1 if self.velocity is None else 2)
        squares, sums = np.full(width * width, np.nan), np.full(width, np.nan)
        self._call(_core.exact_gram, squares=squares, sums=sums)
        return squares.reshape(width, width), sums

    def diagnostics(self) -> dict[str, float]:
        out = np.full(6, np.nan)
        self._call(_core.exact_diagnostics, out=out)
        return dict(zip(("steps", "taken", "matrices", "fetched", "moved", "weight_norm2"), out.tolist(), strict=True))


def fused_on_gpu(loss: str, batch: Batch, A: np.ndarray, q: np.ndarray, s: np.ndarray, n_classes: int) -> Loss:
    out = Loss(*(np.full(n, np.nan) for n in (len(q), len(A), len(q), len(q))))
    arrays = {"A": A, "q": q, "s": s, **out._asdict()}
    call(_core.spherical_loss, "cuda", loss=loss, **OPTIONS, n_classes=n_classes, **batch.labels(), **arrays)
    return out
