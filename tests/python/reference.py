"""tests/python/reference.py -- the dense head in plain float64 NumPy, written to be obviously right, with error bounds.

Every quantity comes with a bound on the error that a float32 (float64, bfloat16) computation of it may make: unit
roundoff times the sum of the absolute terms times a factor K(n) = 3 sqrt(n) + 8 for n terms (rounding errors of a sum
add up like a random walk; K leaves more than five standard deviations), carried through the formulas to first order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = 1e-36  # what flushing subnormal products to zero may cost


def K(n: int) -> float:
    return 3.0 * np.sqrt(n) + 8.0


@dataclass
class Targets:
    """Targets as dense matrices: y the weights [B, D], is_target the mask, active the examples that count."""

    y: np.ndarray
    is_target: np.ndarray
    active: np.ndarray

    @classmethod
    def single(cls, indices: np.ndarray, n_classes: int, ignore_index: int = -100) -> Targets:
        batch = len(indices)
        y = np.zeros((batch, n_classes))
        active = indices != ignore_index
        y[np.flatnonzero(active), indices[active]] = 1.0
        return cls(y, y > 0, active)

    @classmethod
    def multi(cls, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, n_classes: int) -> Targets:
        batch = len(indptr) - 1
        y, mask = np.zeros((batch, n_classes)), np.zeros((batch, n_classes), bool)
        for b in range(batch):
            for at in range(indptr[b], indptr[b + 1]):
                y[b, indices[at]] = 1.0 if values is None else float(values[at])
                mask[b, indices[at]] = True
        return cls(y, mask, np.ones(batch, bool))


@dataclass
class Dense:
    """Losses of a batch and, by `gradients`, their derivatives. All fields float64."""

    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    targets: Targets
    loss: str = "softmax"
    label_smoothing: float = 0.0
    lse_penalty: float = 0.0
    softcap: float = 0.0
    class_weight: np.ndarray | None = None
    offset: np.ndarray | None = None
    dtype: str = "float32"  # of the arithmetic whose errors are bounded
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hidden, self.weight = np.asarray(self.hidden, np.float64), np.asarray(self.weight, np.float64)
        self.u = UNIT["float64" if self.dtype == "float64" else "float32"]
        classes = len(self.weight)
        self.w = np.ones(classes) if self.class_weight is None else np.asarray(self.class_weight, np.float64)
        self._logits()
        self._losses()

    def _logits(self) -> None:
        z = self.hidden @ self.weight.T
        terms = np.abs(self.hidden) @ np.abs(self.weight).T
        if self.bias is not None:
            z = z + self.bias
            terms = terms + np.abs(self.bias)
        error = self.u * K(self.hidden.shape[1] + 1) * terms + TINY
        self.slope = np.ones_like(z)  # dz / d(W h + b)
        if self.softcap:
            z = self.softcap * np.tanh(z / self.softcap)
            self.slope = 1.0 - (z / self.softcap) ** 2
            error = error * np.maximum(self.slope, 1e-3) + 8 * self.u * np.abs(z)
        if self.offset is not None:
            own = self.targets.is_target
            with np.errstate(invalid="ignore"):
                z = z + np.where(own, 0.0, np.asarray(self.offset, np.float64))
                error = error + 2 * self.u * np.where(np.isfinite(z), np.abs(z), 0.0)
        self.z, self.z_error = z, error

    def _losses(self) -> None:
        z, y, w, u, e = self.z, self.targets.y, self.w, self.u, self.z_error
        finite = np.isfinite(z)
        zf = np.where(finite, z, 0.0)
        top = z.max(axis=1, keepdims=True)
        self.lse = (top + np.log(np.exp(z - top).sum(axis=1, keepdims=True)))[:, 0]
        self.p = np.exp(z - self.lse[:, None])
        spread = np.where(finite, np.abs(z - top), 0.0)
        self.lse_error = (self.p * (2 * e + 2 * u * spread)).sum(1) + u * (40 + 2 * np.abs(self.lse))
        lse, le = self.lse[:, None], self.lse_error[:, None]
        if self.loss == "softmax":
            a, classes = self.label_smoothing, z.shape[1]
            nll = np.where(finite, lse - zf, 0.0)
            losses = (1 - a) * (y * w * nll).sum(1) + self.lse_penalty * self.lse**2
            error = (1 - a) * (np.abs(y) * w * (e + le + 2 * u * (np.abs(lse) + np.abs(zf)))).sum(1)
            error = error + self.lse_penalty * 2 * (np.abs(self.lse) * self.lse_error + u * self.lse**2)
            if a:
                losses = losses + a / classes * (w * nll).sum(1)
                error = error + a / classes * (w * (e + le + u * K(classes) * (np.abs(lse) + np.abs(zf)))).sum(1)
            output = (y * nll).sum(1) * -1
            output_error = (np.abs(y) * (e + le + 2 * u * (np.abs(lse) + np.abs(zf)))).sum(1)
        else:
            if self.loss == "bce":
                every = w * np.logaddexp(0.0, z)
                change = -w * y * z
                slope = np.ones_like(z)
            else:
                every = w * np.maximum(0.0, 1 + z) ** 2
                change = self.targets.is_target * w * (y * np.maximum(0.0, 1 - z) ** 2) - self.targets.is_target * every
                slope = 2 * (np.maximum(0.0, 1 + np.abs(z)))
            losses = (every + change).sum(1)
            # Targets are corrected after the sum over all, so what cancels counts as a term.
            error = (w * (1 + np.abs(y)) * slope * e + u * K(z.shape[1]) * (np.abs(every) + np.abs(change))).sum(1)
            output = (y * z).sum(1)
            output_error = (np.abs(y) * (e + 2 * u * np.abs(z))).sum(1)
        active = self.targets.active
        self.losses = np.where(active, losses, 0.0)
        self.losses_error = np.where(active, error + u * np.abs(losses), 0.0)
        self.output = np.where(active, output, 0.0)
        self.output_error = np.where(active, output_error + u * np.abs(output), 0.0)

    def share(self, first: int, end: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What the classes [first, end) alone give: losses, output and lse, each with a bound on its error.

        The sums over classes that make up the whole's; of softmax without the terms of lse.
        """
        z, w = self.z[:, first:end], self.w[first:end]
        y, mask, active = self.targets.y[:, first:end], self.targets.is_target[:, first:end], self.targets.active
        zf, e = np.where(np.isfinite(z), z, 0.0), self.z_error[:, first:end]
        top = z.max(axis=1, initial=-1e300)
        with np.errstate(divide="ignore"):
            lse = top + np.log(np.exp(z - top[:, None]).sum(1))
        if self.loss == "softmax":
            a = self.label_smoothing
            parts = -(1 - a) * y * w * zf - a / self.z.shape[1] * w * zf
            slope = ((1 - a) * np.abs(y) + a / self.z.shape[1]) * w
        elif self.loss == "bce":
            parts, slope = w * (np.logaddexp(0.0, z) - y * zf), w * (1 + np.abs(y))
        else:
            every = np.maximum(0.0, 1 + z) ** 2
            parts = w * np.where(mask, y * np.maximum(0.0, 1 - z) ** 2, every)
            slope = w * 2 * (1 + np.abs(y)) * (1 + np.abs(zf)) * (1 + 4 * self.u / np.maximum(e, TINY) * every)
        error = (slope * e).sum(1) + self.u * K(len(w)) * (np.abs(parts) + slope * np.abs(zf)).sum(1)
        keep = [(parts.sum(1), error), ((y * zf).sum(1), (np.abs(y) * (e + 4 * self.u * np.abs(zf))).sum(1))]
        losses, output = ((np.where(active, x, 0.0), np.where(active, bound, 0.0) + TINY) for x, bound in keep)
        return {
            "losses": losses,
            "output": output,
            "lse": (lse, e.max(1, initial=0.0) * 2 + 60 * self.u * (1 + abs(lse))),
        }

    def gradients(
        self,
        grad_losses: np.ndarray,
        grad_output: np.ndarray | None = None,
        grad_lse: np.ndarray | None = None,
    ) -> Gradients:
        """Derivatives of sum_i grad_losses_i loss_i + grad_output_i output_i + grad_lse_i lse_i."""
        y, w, z, u, e = self.targets.y, self.w, self.z, self.u, self.z_error
        zero, active = np.zeros(len(z)), self.targets.active
        s, t, r = (np.asarray(zero if x is None else x, np.float64) for x in (grad_losses, grad_output, grad_lse))
        s, t, r = np.where(active, s, 0.0)[:, None], np.where(active, t, 0.0)[:, None], r[:, None]
        mask = self.targets.is_target
        if self.loss == "softmax":
            a, classes = self.label_smoothing, z.shape[1]
            mass = s * (
                (1 - a) * (y * w).sum(1, keepdims=True)
                + a / classes * w.sum()
                + 2 * self.lse_penalty * self.lse[:, None]
            )
            mass = mass - t * y.sum(1, keepdims=True) + r
            direct = -s * (1 - a) * y * w - s * a / classes * w + t * y
            terms = np.abs(s) * ((1 - a) * np.abs(y) + a / classes) * w + np.abs(t * y)  # they may cancel
            g = self.p * mass + direct
            near = np.where(np.isfinite(z), np.abs(z - self.lse[:, None]), 0.0)
            relative = e + self.lse_error[:, None] + u * (32 + 2 * near)
            mass_error = np.abs(s) * 2 * self.lse_penalty * self.lse_error[:, None]
            error = self.p * (np.abs(mass) * relative + mass_error) + 8 * u * terms
            size = self.p * np.abs(mass) + terms
            if self.softcap:
                zf = np.where(np.isfinite(z), z, 0.0)
                error = error * np.abs(self.slope) + size * (2 * np.abs(zf) / self.softcap**2 * e + 16 * u)
            g = g * self.slope
        elif self.loss == "bce":
            tail = np.exp(-np.abs(z))
            sigma = np.where(z >= 0, 1.0, tail) / (1 + tail)
            direct = -s * w * y + t * y
            g = s * w * sigma + direct
            terms = np.abs(s) * w * np.abs(y) + np.abs(t * y)
            error = np.abs(s) * w * (sigma * (1 - sigma) * e + 16 * u * (sigma + 1e-9)) + 8 * u * terms
        else:
            over, under = np.maximum(0.0, 1 + z), np.maximum(0.0, 1 - z)
            g = 2 * s * w * np.where(mask, -y * under, over) + t * y
            error = 2 * np.abs(s) * w * (1 + np.abs(y)) * (e + 8 * u * (1 + np.abs(z))) + 8 * u * np.abs(t * y)
        return Gradients(self, g, error + TINY)


class Gradients:
    """dL/dz and what follows from it, each with a bound on its error."""

    def __init__(self, head: Dense, g: np.ndarray, error: np.ndarray) -> None:
        u = head.u
        batch, classes = g.shape
        size = np.abs(g)
        # Products of 16-bit heads may round the gradient of the logits first: to the nearest, or below 2**-14, where
        # halves are evenly spaced, by half of their distance.
        used = error
        if head.dtype in ("bfloat16", "float16"):
            used = used + UNIT[head.dtype] * (size + error) + (2.0**-25 if head.dtype == "float16" else 0.0)
        self.dz, self.dz_error = g, error
        self.hidden = g @ head.weight
        self.hidden_error = used @ np.abs(head.weight) + u * K(classes) * (size @ np.abs(head.weight)) + TINY
        self.weight = g.T @ head.hidden
        self.weight_error = used.T @ np.abs(head.hidden) + u * K(batch) * (size.T @ np.abs(head.hidden)) + TINY
        self.bias = g.sum(0)
        self.bias_error = error.sum(0) + u * K(batch) * size.sum(0) + TINY


def reduction_scale(
    targets: Targets, class_weight: np.ndarray | None, sample_weight: np.ndarray | None = None
) -> np.ndarray:
    """Factors of the losses in their mean, as torch.nn.functional.cross_entropy takes it."""
    s = targets.active.astype(np.float64)
    if sample_weight is not None:
        s = s * sample_weight
    single = (targets.is_target.sum(1) <= 1).all()
    mass = s * (targets.y @ class_weight) if class_weight is not None and single else s
    return s / mass.sum() if mass.sum() > 0 else s * 0


def update(
    name: str, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], *, lr: float, step: int, momentum: float =
        0.9,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """One float64 step of torch.optim's SGD, SGD with momentum or AdamW, or of Adagrad with one accumulator a row."""
    if name in ("sgd", "momentum"):
        g = g + weight_decay * w
        if name == "momentum":
            g = state["first"] = momentum * state.get("first", np.zeros_like(w)) + g
        return w - lr * g
    w = w * (1 - lr * weight_decay)
    if name == "adam":
        m = state["first"] = betas[0] * state.get("first", np.zeros_like(w)) + (1 - betas[0]) * g
        v = state["second"] = betas[1] * state.get("second", np.zeros_like(w)) + (1 - betas[1]) * g * g
        return w - lr * (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)
    rows = g.reshape(len(g), -1)
    v = state["second"] = state.get("second", np.zeros((len(g), 1))) + (rows**2).mean(1, keepdims=True)
    return w - (lr * rows / (np.sqrt(v) + eps)).reshape(w.shape)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters [..., 4]; Salmon et al. 2011, figure 4."""
    c = [np.asarray(counter[..., i], np.uint64) for i in range(4)]
    k = [int(key[0]), int(key[1])]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            p0 & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=-1)


PURPOSE = {"init_weight": 1, "rounding_weight": 2, "rounding_bias": 3, "negatives": 4}


def random_blocks(seed: int, purpose: str, step: int, rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The library's random stream: [len(rows), len(blocks), 4] words of 32 bits."""
    low = 0xFFFFFFFF
    key = (
        (seed & low) ^ (PURPOSE[purpose] * 0x85EBCA6B & low),
        (seed >> 32) ^ ((step >> 32) * 0xC2B2AE35 & low),
    )
    rows, blocks = np.asarray(rows, np.uint64), np.asarray(blocks, np.uint64)
    counter = np.zeros((len(rows), len(blocks), 4), np.uint64)
    counter[..., 0] = blocks[None, :]
    counter[..., 1] = (rows & np.uint64(low))[:, None]
    counter[..., 2] = (rows >> np.uint64(32))[:, None]
    counter[..., 3] = step & low
    return philox(counter, key)


def rounding_bits(seed: int, step: int, rows: np.ndarray, cols: int) -> np.ndarray:
    """16 random bits for each weight, [len(rows), cols]: eight columns share a block of four words."""
    words = random_blocks(seed, "rounding_weight", step, rows, np.arange((cols + 7) // 8))
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    return halves.reshape(len(rows), -1)[:, :cols].astype(np.uint32)


def bf16_stochastic(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 numbers, up with the probability of the bits that are cut off."""
    return ((x.astype(np.float32).view(np.uint32) + bits) >> np.uint32(16)).astype(np.uint16)


def f16_stochastic(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Halves of float32 numbers below the largest, up with the probability of what is cut off, by the upper 13 bits."""
    x = x.astype(np.float32)
    size = np.abs(x).astype(float)
    unit = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(size, 2.0**-14))) - 10, -24)
    odds = np.where(size < 2.0**-14, 65536, 8192)
    up = np.floor(size / unit % 1 * odds) + np.where(odds == 8192, bits >> 3, bits) >= odds
    return (np.copysign((np.floor(size / unit) + up) * unit, x)).astype(np.float16)


def within(got: np.ndarray, want: np.ndarray, bound: np.ndarray, what: str) -> None:
    """Fails unless |got - want| <= bound everywhere, naming the worst entry."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    miss = np.abs(got - want) - bound
    if not (miss <= 0).all():
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(miss), np.inf, miss)), want.shape)
        near = np.broadcast_to(bound, want.shape)[at]
        raise AssertionError(f"{what}{list(at)}: got {got[at]!r}, expected {want[at]!r} within {near:.3g}")
