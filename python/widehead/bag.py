"""bag.py -- embedding bag: sparse examples to dense vectors, and the optimiser's step on the rows of a batch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import STORED, stored
from ._optimizer import ROUNDINGS, OptimizerState
from .files import HeadFile, load_head, save_head
from .options import choose

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EmbeddingBag"]

_OPTIMIZERS = ("sgd", "adam", "adagrad")


class EmbeddingBag:
    """The sum of the table's rows that a sparse example names, weighted by its values: ``out = X @ weight``.

    With ``normalise``, each output row is scaled to length ``scale`` (a row of no features stays 0).

    Args:
        n_features: rows of the table, fewer than 2**31 - 1.
        dim: length of the vectors.
        normalise: scale the output to length ``scale``.
        scale: that length, positive.
        init: the weights start uniform in ``[-init, init)``; default ``1 / sqrt(dim)``.
        dtype: ``"float32"``, ``"bfloat16"`` (kept as uint16; stochastic rounding) or ``"float64"``.
        seed: of the first weights and of stochastic rounding. The weights do not depend on the number of threads.

    Attributes:
        weight: ``[n_features, dim]``; assign an array to change it.
        steps: number of steps taken.
    """

    def __init__(
        self,
        n_features: int,
        dim: int,
        *,
        normalise: bool = False,
        scale: float = 1.0,
        init: float | None = None,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        choose(dtype, tuple(STORED), "dtype")
        for name, value in (("n_features", n_features), ("dim", dim)):
            if value < 1:
                raise _core.ShapeError(f"{name}: expected at least 1, got {value}")
        if normalise and not 0 < scale < float("inf"):
            raise _core.ShapeError(f"scale: expected a positive number, got {scale}")
        self.n_features, self.dim, self.dtype, self.seed = int(n_features), int(dim), dtype, int(seed)
        self.normalise, self.scale = bool(normalise), float(scale)
        self.steps = 0
        self._optimizer = OptimizerState()
        self._saved: tuple[Any, NDArray[Any], NDArray[Any]] | None = None
        self._weight = np.empty((self.n_features, self.dim), STORED[dtype])
        width = self.dim**-0.5 if init is None else float(init)
        _core.init_uniform(out=self._weight, low=-width, high=width, seed=self.seed)

    def __repr__(self) -> str:
        return (
            f"EmbeddingBag({self.n_features}, {self.dim}, normalise={self.normalise}, scale={self.scale}, "
            f"dtype={self.dtype!r}, seed={self.seed})"
        )

    @property
    def weight(self) -> NDArray[Any]:
        """``[n_features, dim]``, not a copy; uint16 for bfloat16, which ``widehead.numpy.from_bfloat16`` reads."""
        return self._weight

    @weight.setter
    def weight(self, value: ArrayLike) -> None:
        self._weight = stored(value, self._weight, "weight")
        self._saved = None

    def forward(self, X: Any) -> NDArray[Any]:
        """``[B, dim]`` float32 (float64 for a float64 table) from ``X``, sparse or dense ``[B, n_features]``.

        Raises:
            ShapeError: if ``X`` has another number of columns.
            LabelError: if ``X`` stores a column out of range.
        """
        csr = self._csr(X)
        out, norms = self._forward(csr)
        # A step on the same batch needs both; the copy keeps them from what the caller does with his.
        self._saved = (X, out.copy(), norms) if self.normalise else None
        return out

    __call__ = forward

    def step(
        self,
        X: Any,
        grad: NDArray[Any],
        lr: float,
        optimizer: str = "adagrad",
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding: str | None = None,
    ) -> None:
        """One step of the optimiser on the rows that ``X`` names, for the gradient ``grad`` of the loss to the output.

        Each touched row gets its whole gradient and is written once; other rows keep weights and state (lazy
        optimisers). The result has the same bits for any number of threads.

        Args:
            X: ``[B, n_features]`` sparse or dense, as for :meth:`forward`.
            grad: ``[B, dim]`` dL/dout, dtype of the output.
            lr: learning rate.
            optimizer: ``"sgd"``, ``"adagrad"`` (one accumulator a row) or ``"adam"``.
            betas, eps, weight_decay: as in ``torch.optim``; decay acts on touched rows.
            rounding: of a bfloat16 table: ``"stochastic"`` (default), ``"nearest"`` or ``"kahan"``.

        Raises:
            NonFiniteError, ShapeError, DtypeError, LabelError: for bad input; nothing has changed then.
        """
        csr = self._csr(X)
        choose(optimizer, _OPTIMIZERS, "optimizer")
        rounding = choose(rounding or ("stochastic" if self.dtype == "bfloat16" else "nearest"), ROUNDINGS, "rounding")
        out = norms = None
        if self.normalise:
            if self._saved is not None and self._saved[0] is X:
                _, out, norms = self._saved
            else:
                out, norms = self._forward(csr)
        before = self._optimizer.name, self._optimizer.step
        self._optimizer.prepare(optimizer, self.weight, None, rounding == "kahan" and self.dtype == "bfloat16")
        update = self._optimizer.arguments(
            rounding, self.seed, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay
        )
        try:
            _core.bag_step(**self._arguments(csr), out=out, norms=norms, grad=np.ascontiguousarray(grad), update=update)
        except _core.Error:
            self._optimizer.name, self._optimizer.step = before
            raise
        self._optimizer.step += 1
        self.steps += 1
        self._saved = None

    def save(self, path: str | os.PathLike[str], *, optimizer: bool = False) -> None:
        """Writes the table, and with `optimizer` the state of the optimiser, to a safetensors file."""
        save_head(path, self._to_file(optimizer))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a table that :meth:`save` wrote; FileError if it is damaged, foreign or newer."""
        return cls._from_file(load_head(path, cls.__name__))

    def _to_file(self, optimizer: bool) -> HeadFile:
        names = ("n_features", "dim", "normalise", "scale", "dtype", "seed")
        file = HeadFile(
            "EmbeddingBag", {n: getattr(self, n) for n in names}, {"weight": self.weight}, {"steps": self.steps}
        )
        if optimizer:
            file.state["optimizer"], arrays = self._optimizer.to_file()
            file.tensors |= arrays
        return file

    @classmethod
    def _from_file(cls, file: HeadFile) -> Self:
        config = dict(file.config)
        bag = cls(config.pop("n_features"), config.pop("dim"), **config, init=0.0)
        weight = file.tensors["weight"]
        if weight.shape != bag.weight.shape or weight.dtype != bag.weight.dtype:
            raise _core.ShapeError(
                f"weight: expected {list(bag.weight.shape)} {bag.weight.dtype}, got {list(weight.shape)} {weight.dtype}"
            )
        bag._weight, bag.steps = weight, int(file.state.get("steps", 0))
        if "optimizer" in file.state:
            bag._optimizer = OptimizerState.from_file(file.state["optimizer"], file.tensors)
        return bag

    def _forward(self, csr: sp.csr_array) -> tuple[NDArray[Any], NDArray[Any]]:
        kind = np.float64 if self.dtype == "float64" else np.float32
        out, norms = np.empty((csr.shape[0], self.dim), kind), np.empty(csr.shape[0], kind)
        _core.bag_forward(**self._arguments(csr), out=out, norms=norms if self.normalise else None)
        return out, norms

    def _arguments(self, csr: sp.csr_array) -> dict[str, Any]:
        return {
            "indptr": np.ascontiguousarray(csr.indptr, np.int64),
            "indices": np.ascontiguousarray(csr.indices),
            "values": np.ascontiguousarray(csr.data, np.float32),
            "table": self.weight,
            "normalise": self.normalise,
            "scale": self.scale,
        }

    def _csr(self, X: Any) -> sp.csr_array:
        if not sp.issparse(X):
            X = np.asarray(X)
        if X.dtype.kind not in "fiub":
            raise _core.DtypeError(f"X: expected real numbers, got {X.dtype}")
        csr = X if sp.issparse(X) and X.format == "csr" else sp.csr_array(X)
        if csr.ndim != 2 or csr.shape[1] != self.n_features:
            raise _core.ShapeError(
                f"X: expected shape [batch, n_features] = [*, {self.n_features}], got {list(csr.shape)}"
            )
        return csr
