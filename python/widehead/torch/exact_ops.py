"""exact_ops.py -- the exact head's two functions for autograd: outputs to statistics, and statistics to losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from widehead import _core
from widehead._core import Error, NonFiniteError

from ._device import capsule
from ._exact_memory import ExactMemory
from ._glue import follow_threads, rows

HALVES = (torch.bfloat16, torch.float16)


class Goal(NamedTuple):
    """The targets that count, as the core takes them; `valid` `[B]` where some examples have none, else None."""

    indptr: Tensor | None
    indices: Tensor
    values: Tensor | None
    valid: Tensor | None

    def capsules(self) -> dict[str, Any]:
        named = {"indptr": self.indptr, "indices": self.indices, "values": self.values}
        return {name: capsule(tensor) for name, tensor in named.items()}

    def spread(self, examples: Tensor) -> Tensor:
        """A number an example `[B]` as one a target `[nnz]`."""
        return examples if self.indptr is None else examples.repeat_interleave(self.indptr.diff())

    def gather(self, numbers: Tensor, n: int) -> Tensor:
        """The sums over each example's targets, `[B]`."""
        if self.indptr is None:
            return numbers
        return numbers.new_zeros(n).index_add(0, self.spread(torch.arange(n)), numbers)


class Job:
    """One batch on its way through the core.

    Args:
        train: backward adds the batch's gradient to what the next step takes.
        scaler: the GradScaler whose scale the gradients have, or None.
    """

    def __init__(self, memory: ExactMemory, goal: Goal, train: bool, scaler: Any | None) -> None:
        self.memory, self.goal, self.train, self.scaler = memory, goal, train, scaler
        self.batch: Any = None

    def forward(self, hidden: Tensor, A: Tensor, q: Tensor, s: Tensor) -> None:
        if not len(hidden):
            return
        follow_threads()
        outputs = {"A": capsule(A), "q": capsule(q), "s": capsule(s)}
        try:
            self.batch = self.memory.core.forward(
                hidden=capsule(rows(hidden)), **self.goal.capsules(), train=self.train, **outputs
            )
        except NonFiniteError:
            # What a GradScaler is there for: the step is skipped, without a word.
            if self.scaler is None or bool(torch.isfinite(hidden).all()):
                raise
            for tensor in (A, q, s):
                tensor.fill_(torch.nan)

    def backward(self, grads: dict[str, Tensor], grad_hidden: Tensor | None) -> bool:
        """False: an overflow under the scaler; nothing is added, grad_hidden is NaN."""
        if self.train:
            if self.memory.retired:
                raise Error("the head's weights were moved, replaced or written to since this batch's forward pass")
            self.memory.check_unedited()
        follow_threads()
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        wide = grad_hidden
        if grad_hidden is not None and scale != 1.0 and grad_hidden.dtype in HALVES:
            wide = torch.empty_like(grad_hidden, dtype=torch.float32)
        if scale != 1.0:
            grads = {name: g / scale for name, g in grads.items()}
        try:
            if self.batch is None:
                raise NonFiniteError("hidden: not finite")
            self.memory.core.backward(
                self.batch,
                **{name: capsule(g.contiguous()) for name, g in grads.items()},
                grad_hidden=capsule(wide),
            )
        except NonFiniteError:
            if self.train and self.scaler is None:
                raise
            if grad_hidden is not None:
                grad_hidden.fill_(torch.nan)
            return False
        if grad_hidden is None or wide is None or scale == 1.0:
            return self.scaler is None or grad_hidden is None or bool(torch.isfinite(grad_hidden).all())
        grad_hidden.copy_(wide.mul_(scale))
        return bool(torch.isfinite(grad_hidden).all())


class Statistics(Function):
    """hidden `[B, d]` -> A `[nnz]`, q `[B]`, s `[B]`, float64. Its backward trains, where the job says so."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor | None, job: Job) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        A = torch.empty(len(job.goal.indices), dtype=torch.float64)
        q, s = (torch.empty(len(hidden), dtype=torch.float64) for _ in range(2))
        job.forward(hidden.detach(), A, q, s)
        ctx.save_for_backward(hidden)  # torch says when the graph is gone, or hidden was written to
        ctx.job = job
        return A, q, s

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor, grad_q: Tensor, grad_s: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_graph()
        (hidden,), job = ctx.saved_tensors, ctx.job
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        report = torch.zeros((), dtype=torch.float32) if job.train else None
        grads = {"grad_A": grad_A, "grad_q": grad_q, "grad_s": grad_s}
        if len(hidden) and not job.backward(grads, grad_hidden) and report is not None:
            job.memory.overflow = True
            report.fill_(torch.inf)
        return grad_hidden, report, None


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
