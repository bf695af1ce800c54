"""_hashed_ops.py -- the hashed head's function for autograd: hidden states to losses over some classes each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from widehead import _core
from widehead._core import Error, NonFiniteError

from ._device import capsule
from ._glue import follow_threads, fused_backward, rows, sum_dtype
from ._hash_tables import HashTables
from ._owner import PENDING, Owner, refuse_second_backward
from ._target import Target


class Job:
    """One batch: where its classes come from, and who takes the gradient."""

    def __init__(self, tables: HashTables, target: Target, ignore_index: int, seed: int, owner: Owner | None) -> None:
        self.tables, self.target, self.ignore_index, self.owner = tables, target, ignore_index, owner
        self.seed = seed
        self.batch: Any = None

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """losses and lse, float64 `[B]`."""
        o = self.tables.options
        ids, counts = self.tables.retrieve(hidden, weight, bias, o.candidates, ranked=False)
        losses, lse = torch.zeros(len(hidden), dtype=torch.float64), torch.zeros(len(hidden), dtype=torch.float64)
        named = {"indptr": self.target.indptr, "indices": self.target.indices, "values": self.target.values}
        self.batch = _core.hashed_forward(
            hidden=capsule(hidden),
            weight=capsule(weight),
            bias=capsule(bias),
            **{name: capsule(tensor) for name, tensor in named.items()},
            ignore_index=self.ignore_index,
            estimator=o.estimator,
            candidates=capsule(ids),
            counts=capsule(counts),
            tables=o.tables,
            negatives=capsule(uniform_classes(len(weight), o.negatives, self.seed)),
            losses=capsule(losses),
            lse=capsule(lse),
        )
        return losses, lse

    def backward(self, weight: Tensor, bias: Tensor | None, grad_losses: Tensor, **what: Any) -> int:
        follow_threads()
        return _core.hashed_backward(
            self.batch, grad_losses=capsule(grad_losses), weight=capsule(weight), bias=capsule(bias), **what
        )

    def step(self, weight: Tensor, bias: Tensor | None, grad: Tensor, grad_hidden: Tensor | None) -> Tensor:
        """The owner's step on the rows of the batch; returns the anchor's gradient."""
        owner, tables = self.owner, self.tables
        assert owner is not None
        if owner.control[PENDING]:
            raise refuse_second_backward(owner.name)
        drifting = {"drift": tables.drift, "moved": tables.room(self.batch.rows)}

        def backward(factor: float | None, update: Any = None, **what: Any) -> None:
            scaled = grad if factor is None else grad * factor
            if update is None:
                self.backward(weight, bias, scaled, **what)
                return
            more = {name: capsule(tensor) for name, tensor in drifting.items()}
            tables.n_moved = self.backward(
                weight, bias, scaled, update=update, **more, drift_limit=tables.options.drift, **what
            )

        follow_threads()
        if not fused_backward(owner, backward, grad_hidden):
            return torch.full((), torch.inf)
        for tensor in (weight, bias):
            if tensor is not None:
                torch.autograd.graph.increment_version(tensor)
        tables.settle(weight, bias)
        owner.control[PENDING] = 1
        return torch.zeros(())


def uniform_classes(n_classes: int, n: int, seed: int) -> Tensor | None:
    """int64 `[n]`; None for none."""
    if not n:
        return None
    draws = torch.empty(n, dtype=torch.int64)
    _core.sample_classes(draws=capsule(draws), n_classes=n_classes, proposal="uniform", seed=seed, step=0)
    return draws


class HashedLoss(Function):
    """hidden `[B, d]` -> losses, output and lse `[B]` of the type that sums have; lse has no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden = rows(hidden.detach())
        follow_threads()
        overflow = job.owner is not None and job.owner.scaler() is not None
        try:
            losses, lse = job.forward(hidden, weight, bias)
        except NonFiniteError:
            if not overflow or bool(torch.isfinite(hidden).all()):
                raise
            losses = lse = torch.full((len(hidden),), torch.nan, dtype=torch.float64)
        kind = sum_dtype(weight)
        ctx.job, ctx.like = job, (hidden.shape, hidden.dtype)
        ctx.save_for_backward(weight, *(() if bias is None else (bias,)))
        found = losses.to(kind), -losses.to(kind), lse.to(kind)
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise Error("create_graph (double backward) is not supported with a hashed head")
        job, (shape, dtype) = ctx.job, ctx.like
        try:
            weight, *more = ctx.saved_tensors
        except RuntimeError as error:
            if job.owner is None or "inplace" not in str(error):
                raise
            raise refuse_second_backward(job.owner.name) from error
        bias = more[0] if more else None
        grad = (grad_losses - grad_output).double().contiguous()
        grad_hidden = torch.zeros(shape, dtype=dtype) if ctx.needs_input_grad[0] else None
        if job.batch is None:  # an overflow under a scaler
            if grad_hidden is not None:
                grad_hidden.fill_(torch.nan)
            return grad_hidden, None, None, torch.full((), torch.inf) if job.owner else None, None
        if job.owner is not None:
            return grad_hidden, None, None, job.step(weight, bias, grad, grad_hidden), None
        return (grad_hidden, *_plain(job, weight, bias, grad, grad_hidden), None, None)


def _plain(
    job: Job, weight: Tensor, bias: Tensor | None, grad: Tensor, grad_hidden: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Row-sparse gradient of the weight, and that of the bias."""
    moved, kind = torch.empty(job.batch.rows, dtype=torch.int64), sum_dtype(weight)
    job.batch.copy_rows(capsule(moved))
    by_row = torch.empty(len(moved), weight.shape[1], dtype=kind)
    by_bias = None if bias is None else torch.empty(len(moved), dtype=kind)
    what = {"grad_hidden": grad_hidden, "grad_rows": by_row, "grad_bias": by_bias}
    job.backward(weight, bias, grad, **{name: capsule(tensor) for name, tensor in what.items()})
    job.tables.note(moved)
    whole = None
    if bias is not None and by_bias is not None:
        whole = torch.zeros_like(bias)
        whole[moved] = by_bias.to(bias.dtype)
    sparse = torch.sparse_coo_tensor(
        moved[None], by_row.to(weight.dtype), weight.shape, check_invariants=False, is_coalesced=True
    )
    return sparse, whole
