"""_exact_host.py -- the core of an exact head on the CPU, over tensors: errors come at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from widehead import _core
from widehead._core import NonFiniteError
from widehead.options import ExactOptions

from ._device import capsule
from ._glue import follow_threads, rows

if TYPE_CHECKING:
    from .exact_ops import Job

HALVES = (torch.bfloat16, torch.float16)


class HostCore:
    """`_core.ExactState` with tensors in the place of arrays; `DeviceCore` has the same methods.

    Attributes:
        spoilt: a gradient that should wait is not finite, under a GradScaler: the next step is to be skipped.
    """

    def __init__(self, weight: Tensor, velocity: Tensor | None, options: ExactOptions) -> None:
        follow_threads()
        self._state = _core.ExactState(capsule(weight), capsule(velocity), **options.method_arguments())
        self._columns = weight.shape[1]
        self.spoilt = False

    def forward(self, job: Job, hidden: Tensor, A: Tensor, q: Tensor, s: Tensor) -> Any:
        """Fills A, q and s; returns what backward takes as `job.batch`."""
        follow_threads()
        outputs = {"A": capsule(A), "q": capsule(q), "s": capsule(s)}
        try:
            return self._state.forward(hidden=capsule(rows(hidden)), **job.goal.capsules(), train=job.train, **outputs)
        except NonFiniteError:
            # What a GradScaler is there for: the step is skipped, without a word.
            if job.scaler is None or bool(torch.isfinite(hidden).all()):
                raise
            for tensor in (A, q, s):
                tensor.fill_(torch.nan)
            return None

    def backward(self, job: Job, grads: dict[str, Tensor], grad_hidden: Tensor | None) -> Tensor:
        """Fills grad_hidden and, if the job trains, adds to the gradient that waits.

        Args:
            grads: grad_A `[nnz]`, grad_q `[B]`, grad_s `[B]`.

        Returns:
            the report to a GradScaler, 0-d float32: infinity after an overflow, when nothing is added and grad_hidden
            is NaN.
        """
        good = self._backward(job, grads, grad_hidden)
        if not good and job.train:
            self.spoilt = True
        return torch.full((), 0.0 if good else torch.inf, dtype=torch.float32)

    def _backward(self, job: Job, grads: dict[str, Tensor], grad_hidden: Tensor | None) -> bool:
        follow_threads()
        scale = 1.0 if job.scaler is None else float(job.scaler.get_scale())
        wide = grad_hidden
        if grad_hidden is not None and scale != 1.0 and grad_hidden.dtype in HALVES:
            wide = torch.empty_like(grad_hidden, dtype=torch.float32)
        if scale != 1.0:
            grads = {name: g / scale for name, g in grads.items()}
        try:
            if job.batch is None:
                raise NonFiniteError("hidden: not finite")
            self._state.backward(
                job.batch,
                **{name: capsule(g.contiguous()) for name, g in grads.items()},
                grad_hidden=capsule(wide),
            )
        except NonFiniteError:
            if job.train and job.scaler is None:
                raise
            if grad_hidden is not None:
                grad_hidden.fill_(torch.nan)
            return False
        if grad_hidden is None or wide is None or scale == 1.0:
            return job.scaler is None or grad_hidden is None or bool(torch.isfinite(grad_hidden).all())
        grad_hidden.copy_(wide.mul_(scale))
        return bool(torch.isfinite(grad_hidden).all())

    def step(
        self,
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        column_scale: Tensor | None = None,
        refused: Tensor | None = None,
    ) -> int:
        """Takes the step; returns whether it counts. refused: None, as this is known before."""
        follow_threads()
        scale = capsule(column_scale)
        self._state.step(lr=lr, weight_decay=weight_decay, momentum=momentum, column_scale=scale)
        return 1

    def pending(self) -> int:
        """Examples whose gradient waits."""
        return self._state.pending()

    def grad_norm(self) -> Tensor:
        norm2 = torch.inf if self.spoilt else self._state.grad_norm2()
        return torch.tensor(max(0.0, norm2), dtype=torch.float64).sqrt()

    def grad_columns(self) -> Tensor:
        out = torch.zeros(self._columns, dtype=torch.float64)
        self._state.grad_columns(capsule(out))
        return out

    def scale_grad(self, factor: float | Tensor) -> None:
        self._state.scale_grad(float(factor))

    def spoil(self, norm: Tensor, scaled: bool) -> None:
        """The gradient belongs to one of that norm, which is not finite. scaled: a GradScaler guards the head."""
        if not scaled:
            raise NonFiniteError(
                f"clip_grad_norm_: the norm of the gradients is {float(norm)}; an exact head cannot take such a step: "
                "call zero_grad()"
            )
        self.spoilt = True

    def drop_pending(self) -> None:
        self.spoilt = False
        self._state.zero_grad()

    def rows(self, ids: Tensor, out: Tensor) -> None:
        follow_threads()
        self._state.rows(capsule(ids), capsule(out))

    def consolidate(self) -> None:
        follow_threads()
        self._state.consolidate()

    def diagnostics(self) -> dict[str, float]:
        return self._state.diagnostics()
