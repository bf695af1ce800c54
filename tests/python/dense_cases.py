"""tests/python/dense_cases.py -- random problems for the dense head, calls of the core, and their float64 reference."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from devices import call
from reference import Dense, Targets
from widehead import _core
from widehead.numpy import from_bfloat16, to_bfloat16

BATCHES = (1, 3, 16, 17, 33, 130)
CLASSES = (1, 2, 11, 12, 13, 97, 1000)
FEATURES = (1, 5, 16, 31, 64, 100, 257)
SHAPES = [(b, n, d) for b in BATCHES for n in CLASSES for d in FEATURES]


def some_shapes(n: int, seed: int) -> list[tuple[int, int, int]]:
    """n of the awkward shapes, drawn by seed, the largest always among them."""
    picks = np.random.default_rng(seed).choice(len(SHAPES) - 1, n - 1, replace=False)
    return [SHAPES[i] for i in sorted(picks)] + [SHAPES[-1]]


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    return to_bfloat16(x) if dtype == "bfloat16" else x.astype(dtype)


def exact(x: np.ndarray) -> np.ndarray:
    """The float64 value of what is stored."""
    return from_bfloat16(x).astype(np.float64) if x.dtype == np.uint16 else x.astype(np.float64)


def strided(x: np.ndarray, pad: int) -> np.ndarray:
    """The same matrix with rows further apart; what lies between is NaN, or its bits."""
    wide = np.full((len(x), x.shape[1] + pad), 0x7FC0 if x.dtype == np.uint16 else np.nan).astype(x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def far_apart(x: np.ndarray, stride: int) -> np.ndarray:
    """The same matrix with `stride` elements from row to row, in memory that is reserved by the page."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since 3.13
    memory = mmap.mmap(-1, ((len(x) - 1) * stride + x.shape[1]) * x.itemsize, flags=flags)
    out = np.ndarray(x.shape, x.dtype, memory, strides=(stride * x.itemsize, x.itemsize))
    out[...] = x
    return out


@dataclass
class Case:
    """One batch and one layer, as the core takes them."""

    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    target: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    offset: np.ndarray | None = None
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def real(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def arguments(self) -> dict[str, Any]:
        layer = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias, "offset": self.offset}
        return {**layer, **self.target, **self.options}

    def targets(self) -> Targets:
        t = self.target
        if t["indptr"] is None:
            return Targets.single(t["indices"], len(self.weight), self.options.get("ignore_index", -100))
        return Targets.multi(t["indptr"], t["indices"], t["values"], len(self.weight))

    def reference(self) -> Dense:
        hidden = exact(self.hidden)
        if self.dtype in ("bfloat16", "float16"):  # the core multiplies numbers of the weights' type
            hidden = exact(stored(hidden.astype(np.float32), self.dtype))
        options = {key: value for key, value in self.options.items() if key != "ignore_index"}
        bias = None if self.bias is None else exact(self.bias)
        return Dense(hidden, exact(self.weight), bias, self.targets(), offset=self.offset, dtype=self.dtype, **options)

    def forward(self, want: tuple[str, ...] = ("losses", "output", "lse")) -> dict[str, np.ndarray]:
        out = {
            name: np.full(len(self.hidden), 7.0, self.real) if name in want else None
            for name in ("losses", "output", "lse")
        }
        call(_core.dense_forward, self.device, **self.arguments(), **out)
        return {name: array for name, array in out.items() if array is not None}

    def backward(self, scale: np.ndarray, **more: Any) -> dict[str, np.ndarray]:
        """Plain gradients, all of them."""
        lse = self.forward(("lse",))["lse"] if self.options["loss"] == "softmax" else None
        out = {
            "grad_hidden": np.full_like(self.hidden, 7),
            "grad_weight": np.full(self.weight.shape, 7, self.real),
            "grad_bias": None if self.bias is None else np.full(len(self.weight), 7, self.real),
        }
        incoming = {"lse": lse, "grad_losses": scale.astype(self.real)}
        self.filtered = call(_core.dense_backward, self.device, **self.arguments(), **incoming, **out, **more)
        return {name: array for name, array in out.items() if array is not None}

    def fused(self, scale: np.ndarray, update: dict[str, Any], **more: Any) -> dict[str, np.ndarray]:
        """The optimiser's step on copies of weight and bias; state arrays in `update` move in place."""
        lse = self.forward(("lse",))["lse"] if self.options["loss"] == "softmax" else None
        weight, bias = self.weight.copy(), None if self.bias is None else self.bias.copy()
        grad_hidden = np.full_like(self.hidden, 7)
        call(
            _core.dense_backward,
            self.device,
            **{**self.arguments(), "weight": weight, "bias": bias},
            lse=lse,
            grad_losses=scale.astype(self.real),
            grad_hidden=grad_hidden,
            update=update,
            **more,
        )
        return {"weight": weight, "bias": bias, "grad_hidden": grad_hidden}


def multi_labels(rng: np.random.Generator, batch: int, classes: int, weighted: bool) -> dict[str, Any]:
    """Zero to seven distinct labels a row, in any order."""
    rows = [rng.permutation(classes)[: rng.integers(0, 8)] for _ in range(batch)]
    indptr = np.cumsum([0] + [len(row) for row in rows]).astype(np.int64)
    indices = np.concatenate(rows).astype(np.int64)
    values = rng.uniform(0.0, 2.0, len(indices)).astype(np.float32) if weighted else None
    return {"indptr": indptr, "indices": indices, "values": values}


def single_labels(rng: np.random.Generator, batch: int, classes: int, ignore_index: int) -> dict[str, Any]:
    indices = rng.integers(0, classes, batch)
    indices[rng.random(batch) < 0.1] = ignore_index
    return {"indptr": None, "indices": indices, "values": None}


def make(
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    dtype: str = "float32",
    hidden_dtype: str | None = None,
    multi: bool | None = None,
    bias: bool = True,
    scale: float = 1.0,
    pad: int = 0,
    class_weight: bool = False,
    offset: bool = False,
    device: str = "cpu",
    **options: Any,
) -> Case:
    """A random case; logits have a spread of about `scale`."""
    batch, classes, features = shape
    rng = np.random.default_rng([seed, *shape])
    options = {"loss": "softmax", **options}
    multi = options["loss"] != "softmax" if multi is None else multi
    hidden = stored(rng.normal(size=(batch, features)), hidden_dtype or dtype)
    weight = stored(rng.normal(size=(classes, features)) * scale / np.sqrt(features), dtype)
    kept = stored(rng.normal(size=classes), "float64" if dtype == "float64" else "float32") if bias else None
    target = (
        multi_labels(rng, batch, classes, bool(seed % 2))
        if multi
        else single_labels(rng, batch, classes, options.get("ignore_index", -100))
    )
    if class_weight:
        options["class_weight"] = rng.uniform(0.1, 2.0, classes).astype(np.float32)
    shift = None
    if offset:
        shift = rng.normal(size=classes).astype(np.float32)
        shift[rng.random(classes) < 0.3] = -np.inf
        shift[0] = 0.5  # a softmax over nothing would not be one
    if pad:
        hidden, weight = strided(hidden, pad), strided(weight, pad + 1)
    return Case(hidden, weight, kept, target, options, shift, dtype, device)


def weights_of_examples(case: Case, seed: int = 1) -> np.ndarray:
    """Factors of the losses, of both signs, some 0."""
    rng = np.random.default_rng(seed)
    scale = rng.normal(size=len(case.hidden)).astype(np.float32)
    scale[rng.random(len(scale)) < 0.1] = 0
    return scale


# Every loss with every option that goes with it.
LOSSES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "smoothing": {"label_smoothing": 0.1},
    "class weights": {"class_weight": True},
    "smoothing and class weights": {"label_smoothing": 0.3, "class_weight": True},
    "penalty": {"lse_penalty": 1e-2},
    "softcap": {"softcap": 3.0},
    "softcap, penalty, smoothing": {"softcap": 5.0, "lse_penalty": 1e-3, "label_smoothing": 0.05},
    "ignore index 0": {"ignore_index": 0},
    "multi-label softmax": {"multi": True},
    "multi-label softmax, class weights": {"multi": True, "class_weight": True},
    "offset": {"offset": True},
    "offset and class weights": {"offset": True, "class_weight": True, "lse_penalty": 1e-2},
    "offset and softcap": {"offset": True, "softcap": 3.0},
    "bce": {"loss": "bce"},
    "bce, class weights": {"loss": "bce", "class_weight": True},
    "bce, one label": {"loss": "bce", "multi": False},
    "hinge": {"loss": "squared_hinge"},
    "hinge, class weights": {"loss": "squared_hinge", "class_weight": True},
    "hinge, one label": {"loss": "squared_hinge", "multi": False},
}
