"""bag.py -- embedding bag: sparse examples to dense vectors, and the optimiser's step on the rows that a batch touches."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from widehead import _core

__all__ = ["EmbeddingBag"]

_STORAGE = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16}
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
        weight: ``[n_features, dim]``.
        moments: state of the optimiser by name, made at the first step.
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
        if dtype not in _STORAGE:
            raise _core.DtypeError(f"dtype: expected one of {', '.join(_STORAGE)}, got {dtype!r}")
        for name, value in (("n_features", n_features), ("dim", dim)):
            if value < 1:
                raise _core.ShapeError(f"{name}: expected at least 1, got {value}")
        if normalise and not 0 < scale < float("inf"):
            raise _core.ShapeError(f"scale: expected a positive number, got {scale}")
        self.n_features, self.dim, self.dtype, self.seed = int(n_features), int(dim), dtype, int(seed)
        self.normalise, self.scale = bool(normalise), float(scale)
        self.moments: dict[str, NDArray[Any]] = {}
        self.steps = 0
        self._optimizer: str | None = None
        self._saved: tuple[Any, NDArray[Any], NDArray[Any]] | None = None
        self.weight = np.empty((self.n_features, self.dim), _STORAGE[dtype])
        width = self.dim**-0.5 if init is None else float(init)
        _core.init_uniform(out=self.weight, low=-width, high=width, seed=self.seed)

    def __repr__(self) -> str:
        return (
            f"EmbeddingBag({self.n_features}, {self.dim}, normalise={self.normalise}, scale={self.scale}, "
            f"dtype={self.dtype!r}, seed={self.seed})"
        )

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

        Each touched row gets its whole gradient and is written once; other rows keep weights and state (lazy optimisers).
        The result has the same bits for any number of threads.

        Args:
            X: ``[B, n_features]`` sparse or dense, as for :meth:`forward`.
            grad: ``[B, dim]`` dL/dout, dtype of the output.
            lr: learning rate.
            optimizer: ``"sgd"``, ``"adagrad"`` (one accumulator a row) or ``"adam"``; keep to one.
            betas, eps, weight_decay: as in ``torch.optim``; decay acts on touched rows.
            rounding: of a bfloat16 table: ``"stochastic"`` (default), ``"nearest"`` or ``"kahan"``.

        Raises:
            NonFiniteError, ShapeError, DtypeError, LabelError: for bad input; nothing has changed then.
        """
        csr = self._csr(X)
        if optimizer not in _OPTIMIZERS:
            raise _core.ShapeError(f"optimizer: expected one of {', '.join(_OPTIMIZERS)}, got {optimizer!r}")
        if self._optimizer not in (None, optimizer):
            raise _core.ShapeError(f"optimizer: this table is trained with {self._optimizer!r}, got {optimizer!r}")
        out = norms = None
        if self.normalise:
            if self._saved is not None and self._saved[0] is X:
                _, out, norms = self._saved
            else:
                out, norms = self._forward(csr)
        moments = self.moments or self._new_moments(optimizer, rounding)
        _core.bag_step(
            **self._arguments(csr),
            out=out,
            norms=norms,
            grad=np.ascontiguousarray(grad),
            update={
                "optimizer": optimizer,
                "rounding": rounding or "stochastic",
                "lr": lr,
                "beta1": betas[0],
                "beta2": betas[1],
                "eps": eps,
                "weight_decay": weight_decay,
                "step": self.steps + 1,
                "seed": self.seed,
                **moments,
            },
        )
        self.moments, self._optimizer, self._saved = moments, optimizer, None
        self.steps += 1

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Weights and optimiser state, not copied: ``weight``, ``moments.*``; ``steps`` as int64 ``[1]``."""
        moments = {f"moments.{name}": array for name, array in self.moments.items()}
        return {"weight": self.weight, "steps": np.array([self.steps]), **moments}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Takes over what :meth:`state_dict` gave; raises ShapeError where it does not fit, with nothing changed."""
        weight = state["weight"]
        if weight.shape != self.weight.shape or weight.dtype != self.weight.dtype:
            raise _core.ShapeError(
                f"weight: expected {list(self.weight.shape)} {self.weight.dtype}, got {list(weight.shape)} {weight.dtype}"
            )
        prefix = "moments."
        moments = {name[len(prefix) :]: np.array(array) for name, array in state.items() if name.startswith(prefix)}
        self.weight, self.moments, self.steps = np.array(weight), moments, int(state["steps"][0])
        self._optimizer = None
        self._saved = None

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

    def _new_moments(self, optimizer: str, rounding: str | None) -> dict[str, NDArray[Any]]:
        kind = np.float64 if self.dtype == "float64" else np.float32
        moments: dict[str, NDArray[Any]] = {}
        if optimizer == "adam":
            moments["first"] = np.zeros(self.weight.shape, kind)
            moments["second"] = np.zeros(self.weight.shape, kind)
        elif optimizer == "adagrad":
            moments["second"] = np.zeros((self.n_features, 1), kind)
        if rounding == "kahan" and self.dtype == "bfloat16":
            moments["compensation"] = np.zeros(self.weight.shape, np.uint16)
        return moments

    def _csr(self, X: Any) -> sp.csr_array:
        csr = X if sp.issparse(X) and X.format == "csr" else sp.csr_array(X)
        if csr.ndim != 2 or csr.shape[1] != self.n_features:
            raise _core.ShapeError(f"X: expected shape [batch, n_features] = [*, {self.n_features}], got {list(csr.shape)}")
        if csr.dtype.kind not in "fiub":
            raise _core.DtypeError(f"X: expected real numbers, got {csr.dtype}")
        return csr
