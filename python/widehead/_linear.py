"""_linear.py -- a linear layer between the hidden vectors of a classifier and its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import STORED, from_bfloat16
from ._optimizer import OptimizerState
from .files import HeadFile

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[Any]


def product(a: Array, b: Array) -> Array:
    """a `[m, k]` times the transpose of b `[n, k]`, the same bits on any number of threads, unlike a BLAS's."""
    out = np.empty((len(a), len(b)), np.result_type(a, b))
    if out.size:
        _core.dense_logits(hidden=np.ascontiguousarray(a), weight=np.ascontiguousarray(b), bias=None, logits=out)
    return out


class LinearLayer:
    """``out = X @ weight.T``, without a bias.

    Args:
        dim, width: columns of X and of the output.
        dtype: ``"float32"``, ``"bfloat16"`` (kept as uint16; stochastic rounding) or ``"float64"``.
        seed: of the first weights, uniform in ``[-1, 1) / sqrt(dim)``, and of rounding.

    Attributes:
        weight: ``[width, dim]``.
    """

    def __init__(self, dim: int, width: int, *, dtype: str = "float32", seed: int = 0) -> None:
        self.dim, self.width, self.dtype, self.seed = int(dim), int(width), dtype, int(seed)
        self.weight = np.empty((self.width, self.dim), STORED[dtype])
        _core.init_uniform(out=self.weight, low=-(self.dim**-0.5), high=self.dim**-0.5, seed=self.seed)
        self._optimizer = OptimizerState()

    def forward(self, X: Array) -> Array:
        """``[B, width]``, float32, or float64 for float64 weights."""
        return product(X, self._numbers())

    def step(self, X: Array, grad: Array, lr: float, optimizer: str, *, weight_decay: float = 0.0) -> Array:
        """One step of the optimiser for the gradient ``[B, width]`` to the output; returns that to X, ``[B, dim]``."""
        to_input = product(grad, self._numbers().T)
        rounding = "stochastic" if self.dtype == "bfloat16" else "nearest"
        before = self._optimizer.name, self._optimizer.step
        self._optimizer.prepare(optimizer, self.weight, None, False)
        numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": weight_decay}
        try:
            _core.update_rows(
                weight=self.weight,
                rows=np.arange(self.width),
                grad=product(grad.T, X.T),
                update=self._optimizer.arguments(rounding, self.seed, lr=lr, **numbers),
            )
        except _core.Error:
            self._optimizer.name, self._optimizer.step = before
            raise
        self._optimizer.step += 1
        return to_input

    def _numbers(self) -> Array:
        return from_bfloat16(self.weight) if self.dtype == "bfloat16" else self.weight

    def _to_file(self, optimizer: bool) -> HeadFile:
        config = {name: getattr(self, name) for name in ("dim", "width", "dtype", "seed")}
        file = HeadFile("LinearLayer", config, {"weight": self.weight})
        if optimizer:
            file.state["optimizer"], arrays = self._optimizer.to_file()
            file.tensors |= arrays
        return file

    @classmethod
    def _from_file(cls, file: HeadFile) -> Self:
        layer = cls(**file.config)
        weight = file.tensors["weight"]
        if weight.shape != layer.weight.shape or weight.dtype != layer.weight.dtype:
            raise _core.ShapeError(
                f"weight: expected {list(layer.weight.shape)} {layer.weight.dtype}, got {list(weight.shape)} "
                f"{weight.dtype}"
            )
        layer.weight = weight
        if "optimizer" in file.state:
            layer._optimizer = OptimizerState.from_file(file.state["optimizer"], file.tensors)
        return layer
