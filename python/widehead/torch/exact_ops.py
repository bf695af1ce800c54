"""exact_ops.py -- the exact head's two functions for autograd: outputs to statistics, and statistics to losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from widehead import _core
from widehead._core import Error

from ._device import capsule, gpu_of
from ._exact_goal import Goal
from ._exact_memory import ExactMemory


class Job:
    """One batch on its way through the core.

    Args:
        train: backward adds the batch's gradient to what the next step takes.
        scaler: the GradScaler whose scale the gradients have, or None.

    Attributes:
        batch: what the core's forward pass has kept; time: of the core, then.
    """

    def __init__(self, memory: ExactMemory, goal: Goal, train: bool, scaler: Any | None) -> None:
        self.memory, self.goal, self.train, self.scaler = memory, goal, train, scaler
        self.batch: Any = None
        self.time = 0

    def forward(self, hidden: Tensor, A: Tensor, q: Tensor, s: Tensor) -> None:
        if len(hidden):
            self.batch = self.memory.core.forward(self, hidden, A, q, s)

    def backward(self, grads: dict[str, Tensor], grad_hidden: Tensor | None) -> Tensor:
        """Returns the report to the scaler, 0-d: 0, or infinity after an overflow; then nothing is added, and
        grad_hidden is NaN.
        """
        if self.train:
            if self.memory.retired:
                raise Error("the head's weights were moved, replaced or written to since this batch's forward pass")
            self.memory.check_unedited()
        return self.memory.core.backward(self, grads, grad_hidden)


class Statistics(Function):
    """hidden `[B, d]` -> A `[nnz]`, q `[B]`, s `[B]`, float64. Its backward trains, where the job says so."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor | None, job: Job) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        sizes = (len(job.goal.indices), len(hidden), len(hidden))
        A, q, s = (torch.empty(n, dtype=torch.float64, device=hidden.device) for n in sizes)
        job.forward(hidden.detach(), A, q, s)
        ctx.save_for_backward(hidden)  # torch says when the graph is gone, or hidden was written to
        ctx.job = job
        return A, q, s

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor, grad_q: Tensor, grad_s: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_graph()
        (hidden,), job = ctx.saved_tensors, ctx.job
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        if not len(hidden):
            return grad_hidden, torch.zeros((), device=hidden.device) if job.train else None, None
        report = job.backward({"grad_A": grad_A, "grad_q": grad_q, "grad_s": grad_s}, grad_hidden)
        return grad_hidden, report if job.train else None, None


class SphericalLoss(Function):
    """A, q, s -> losses `[B]`, by name."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, A: Tensor, q: Tensor, s: Tensor, goal: Goal, n_classes: int, options: dict[str, Any]
    ) -> Tensor:
        losses, grads = torch.empty_like(q), [torch.empty_like(x) for x in (A, q, s)]
        if len(q):
            _core.spherical_loss(
                **options,
                n_classes=n_classes,
                **goal.capsules(),
                **{name: capsule(x.contiguous()) for name, x in (("A", A), ("q", q), ("s", s))},
                losses=capsule(losses),
                **{f"grad_{name}": capsule(g) for name, g in zip("Aqs", grads, strict=True)},
                gpu=gpu_of(q),
            )
        ctx.save_for_backward(*grads)
        ctx.goal = goal
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_graph()
        by_A, by_q, by_s = ctx.saved_tensors
        return _times(ctx.goal.spread(grad), by_A), _times(grad, by_q), _times(grad, by_s), None, None, None


def _times(grad: Tensor, derivative: Tensor) -> Tensor:
    # An example that does not count has no say, not even by 0 times infinity.
    return torch.where(grad == 0, 0.0, grad * derivative)


def _refuse_graph() -> None:
    if torch.is_grad_enabled():
        raise Error(
            "create_graph (double backward) through an ExactHead is not supported: its gradient has none itself"
        )
