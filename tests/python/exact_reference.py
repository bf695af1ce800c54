"""tests/python/exact_reference.py -- the exact head's losses and dense SGD on all weights, in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from widehead import _core

METHODS = ("blocked", "woodbury")
LOSSES = ("squared_error", "spherical_softmax", "taylor_softmax", "z_loss")
OPTIONS = {"eps": 0.1, "a": 1.0, "b": 1.0}


@dataclass
class Batch:
    """hidden [m, d] as the core takes it; CSR targets with values, or single labels: indptr is None."""

    hidden: np.ndarray
    indptr: np.ndarray | None
    indices: np.ndarray
    values: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """The example of each target."""
        counts = np.ones(len(self.hidden), int) if self.indptr is None else np.diff(self.indptr)
        return np.repeat(np.arange(len(self.hidden)), counts)

    @property
    def weights(self) -> np.ndarray:
        return np.ones(len(self.indices)) if self.values is None else self.values.astype(np.float64)

    def labels(self) -> dict[str, Any]:
        return {"indptr": self.indptr, "indices": self.indices, "values": self.values}


class Loss(NamedTuple):
    """Losses [m] and their derivatives by A [nnz], q [m] and s [m]."""

    losses: np.ndarray
    grad_A: np.ndarray
    grad_q: np.ndarray
    grad_s: np.ndarray

    def scaled(self, by: float) -> Loss:
        return Loss(*(by * x for x in self))


def spherical(loss: str, batch: Batch, A: np.ndarray, q: np.ndarray, s: np.ndarray, n_classes: int) -> Loss:
    rows, y, D = batch.rows, batch.weights, n_classes
    qs, ss = q[rows], s[rows]  # of each target

    def total(x: np.ndarray) -> np.ndarray:
        return np.bincount(rows, x, len(q)) if len(rows) else np.zeros(len(q))

    if loss == "squared_error":
        return Loss(q + total(y * y - 2 * y * A), -2 * y, np.ones(len(q)), np.zeros(len(q)))
    if loss == "spherical_softmax":
        norm, own = qs + D * OPTIONS["eps"], A * A + OPTIONS["eps"]
        return Loss(total(y * np.log(norm / own)), -2 * y * A / own, total(y / norm), np.zeros(len(q)))
    if loss == "taylor_softmax":
        norm, own = D + ss + qs / 2, 1 + A + A * A / 2
        return Loss(total(y * np.log(norm / own)), -y * (1 + A) / own, total(y / (2 * norm)), total(y / norm))
    assert loss == "z_loss"
    a, b = OPTIONS["a"], OPTIONS["b"]
    mean = ss / D
    variance = qs / D - mean * mean
    z = (A - mean) / np.sqrt(variance)
    by_z = -y / (1 + np.exp(-a * (b - z)))
    return Loss(
        total(y * np.logaddexp(0, a * (b - z)) / a),
        by_z / np.sqrt(variance),
        total(-by_z * z / (2 * variance * D)),
        total(by_z * (z * mean / variance - 1 / np.sqrt(variance)) / D),
    )


class DenseSGD:
    """torch.optim.SGD on all n_classes x in_features weights."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight.astype(np.float64)
        self.velocity = np.zeros_like(self.weight)
        self.gradient = np.zeros_like(self.weight)

    def statistics(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        output = batch.hidden.astype(np.float64) @ self.weight.T
        return output[batch.rows, batch.indices], (output**2).sum(1), output.sum(1)

    def add(self, batch: Batch, by: Loss) -> np.ndarray:
        """Adds the batch's gradient; returns that to hidden."""
        hidden = batch.hidden.astype(np.float64)
        by_output = 2 * by.grad_q[:, None] * (hidden @ self.weight.T) + by.grad_s[:, None]
        np.add.at(by_output, (batch.rows, batch.indices), by.grad_A)
        self.gradient += by_output.T @ hidden
        return by_output @ self.weight

    def step(
        self, lr: float, *, weight_decay: float = 0.0, momentum: float = 0.0, column_scale: np.ndarray | None = None
    ) -> None:
        scaled = self.gradient if column_scale is None else self.gradient * column_scale
        self.velocity = momentum * self.velocity + scaled + weight_decay * self.weight
        self.weight = self.weight - lr * self.velocity
        self.gradient[:] = 0


class Core:
    """_core.ExactState with the same methods."""

    def __init__(self, weight: np.ndarray, *, momentum: bool = False, **options: Any) -> None:
        self.weight = weight
        self.velocity = np.zeros_like(weight) if momentum else None
        self.state = _core.ExactState(weight, self.velocity, **options)

    def forward(self, batch: Batch, train: bool = True) -> tuple[Any, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        A, q, s = (np.full(n, np.nan) for n in (len(batch.indices), len(batch.hidden), len(batch.hidden)))
        kept = self.state.forward(hidden=batch.hidden, **batch.labels(), train=train, A=A, q=q, s=s)
        return kept, (A, q, s)

    def backward(self, kept: Any, by: Loss, shape: tuple[int, ...]) -> np.ndarray:
        grad_hidden = np.full(shape, np.nan)
        grads = {"grad_A": by.grad_A, "grad_q": by.grad_q, "grad_s": by.grad_s}
        self.state.backward(kept, **grads, grad_hidden=grad_hidden)
        return grad_hidden

    def rows(self) -> np.ndarray:
        out = np.full(self.weight.shape, np.nan)
        self.state.rows(np.arange(len(out)), out)
        return out

    def columns(self) -> np.ndarray:
        out = np.full(self.weight.shape[1], np.nan)
        self.state.grad_columns(out)
        return out


def fused(loss: str, batch: Batch, A: np.ndarray, q: np.ndarray, s: np.ndarray, n_classes: int) -> Loss:
    """The same as `spherical`, by the core."""
    out = Loss(*(np.full(n, np.nan) for n in (len(q), len(A), len(q), len(q))))
    _core.spherical_loss(loss=loss, **OPTIONS, n_classes=n_classes, **batch.labels(), A=A, q=q, s=s, **out._asdict())
    return out


def draw(
    rng: np.random.Generator, shape: tuple[int, int, int, int], values: bool = True, dtype: Any = np.float64
) -> Batch:
    """Up to K different targets an example, drawn so that many examples share classes."""
    classes, features, batch, most = shape
    ids = [np.unique((classes * rng.random(most) ** 3).astype(np.int64)) for _ in range(batch)]
    indptr = np.cumsum([0, *map(len, ids)])
    indices = np.concatenate(ids) if len(ids) else np.zeros(0, np.int64)
    weights = rng.uniform(0.5, 1.5, len(indices)).astype(np.float32) if values else None
    return Batch(rng.standard_normal((batch, features)).astype(dtype), indptr, indices, weights)


def first_weight(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    return (0.3 * rng.standard_normal(shape[:2])).astype(dtype)


def stable_lr(batch: Batch, rate: float) -> float:
    """2 lr lambda_1 = rate for squared error."""
    return rate / (2 * np.linalg.norm(batch.hidden.astype(np.float64), 2) ** 2)


def near(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-10) -> None:
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max(initial=0.0)))
