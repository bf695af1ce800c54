"""_sampled.py -- sampled softmax as three operators: choose the classes, gather their rows, bring their gradients home.

Between the last two stands the dense head's own loss over the gathered rows. The choice draws its key from torch's
generator of the head's device, as dropout does: `torch.manual_seed` repeats a run, gradient checkpointing draws the
same classes again, and every replay of a CUDA graph draws new ones.

On a GPU everything stays there: shapes are those that no data decides, with padding.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from widehead import _core
from widehead._core import Error, NonFiniteError, ShapeError
from widehead.sampling import Proposal, sample_classes

from ._device import capsule, gpu_of, on_gpu
from ._glue import DeviceStep, follow_threads, update_capsules
from ._owner import PENDING, Owner, owner_of, refuse_second_backward
from ._sampled_gpu import sample_on_gpu

# Proposals by key: operators take tensors and numbers only.
_keys = itertools.count(1)
_proposals: weakref.WeakValueDictionary[int, Proposal] = weakref.WeakValueDictionary()


def register_proposal(proposal: Proposal) -> int:
    key = next(_keys)
    _proposals[key] = proposal
    return key


@custom_op("widehead::sample_rows", mutates_args=())
def sample_rows(
    indices: Tensor, seed: Tensor, proposal: int, negatives: int, ignore_index: int | None, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The classes of one step.

    Args:
        indices: the batch's labels int64 `[B]` or `[nnz]`; seed: 0-d int64, the key of the draws, on the CPU or where
            indices are.
        padded: bring rows to the length that no data decides, len(indices) + negatives (compiled graphs want that, and
            GPUs always do it); padding is -1 with offset -infinity.
    Returns:
        rows int64 `[A]`, distinct and ascending; offset float32 `[A]` for their logits; the labels as positions in
        rows, shaped as indices (IGNORED where they are ignore_index); and the number of rows to work on, 0-d int64 on
        the CPU: on a GPU all, else those that are no padding.
    """
    if on_gpu(indices):
        return sample_on_gpu(_proposals[proposal], negatives, indices, seed, ignore_index)
    picked = sample_classes(
        _proposals[proposal], negatives, indices.cpu().numpy(), seed=int(seed), step=0, ignore_index=ignore_index
    )
    rows, offset = picked.rows, picked.offset
    count = len(rows)
    if padded:
        extra = len(indices) + negatives - count
        rows = np.concatenate([rows, np.full(extra, -1, np.int64)])
        offset = np.concatenate([offset, np.full(extra, -np.inf, np.float32)])
    arrays = (rows, offset, np.ascontiguousarray(picked.indices))
    chosen, shift, positions = (torch.from_numpy(array).to(indices.device) for array in arrays)
    return chosen, shift, positions, torch.tensor(count, device="cpu")


@sample_rows.register_fake
def _(
    indices: Tensor, seed: Tensor, proposal: int, negatives: int, ignore_index: int | None, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fixed = padded or on_gpu(indices)
    n = indices.shape[0] + negatives if fixed else torch.library.get_ctx().new_dynamic_size()
    count = torch.empty((), dtype=torch.int64, device="cpu")
    return indices.new_empty(n), indices.new_empty(n, dtype=torch.float32), torch.empty_like(indices), count


@custom_op("widehead::gather_rows", mutates_args=())
def gather_rows(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    count: Tensor,
    anchor: Tensor | None,
    control: Tensor | None,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """weight `[A, d]` and bias `[A]` (empty without) of the rows; zeros where they are padding.

    Backward: with anchor and control the owner's optimiser updates the rows; else gradients come, row-sparse or dense.
    """
    n = int(count)
    taken = torch.empty(rows.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    if on_gpu(weight):
        _core.gather_rows(weight=capsule(weight), rows=capsule(rows), out=capsule(taken), gpu=gpu_of(weight))
        if bias is None:
            return taken, weight.new_empty(0)
        column = bias.new_empty(rows.shape[0], 1)
        _core.gather_rows(weight=capsule(bias[:, None]), rows=capsule(rows), out=capsule(column), gpu=gpu_of(weight))
        return taken, column[:, 0]
    follow_threads()
    if n:
        _core.gather_rows(weight=capsule(weight), rows=capsule(rows[:n]), out=capsule(taken[:n]))
    taken[n:] = 0
    if bias is None:
        return taken, weight.new_empty(0)
    taken_bias = bias.new_zeros(rows.shape[0])
    torch.index_select(bias.detach(), 0, rows[:n], out=taken_bias[:n])
    return taken, taken_bias


@gather_rows.register_fake
def _(
    weight: Tensor, bias: Tensor | None, rows: Tensor, count: Tensor, anchor: Any, control: Any, sparse: bool
) -> tuple[Tensor, Tensor]:
    n = rows.shape[0]
    return weight.new_empty(n, weight.shape[1]), (weight.new_empty(0) if bias is None else bias.new_empty(n))


@custom_op("widehead::update_rows", mutates_args=("weight", "bias", "control"))
def update_rows(
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    rows: Tensor,
    count: Tensor,
    grad: Tensor,
    grad_bias: Tensor | None,
) -> Tensor:
    """The owner's step on some rows of weight and bias; returns the anchor's gradient (see `dense_grad_update`)."""
    owner = owner_of(control)
    if control[PENDING]:
        raise refuse_second_backward(owner.name)
    n = int(count)
    report = torch.zeros((), dtype=torch.float32, device=weight.device)
    if not n:
        return report
    if on_gpu(weight):
        report = _update_rows_on_gpu(owner, weight, bias, rows, grad, grad_bias)
        control[PENDING] = 1
        return report
    scaler = owner.scaler()
    scale = 1.0 if scaler is None else float(scaler.get_scale())

    def ready(gradient: Tensor | None) -> Any:
        if gradient is None:
            return None
        return capsule((gradient[:n] / scale if scale != 1.0 else gradient[:n]).contiguous())

    follow_threads()
    try:
        # What was not finite in hidden or in the incoming gradients is not finite here either.
        _core.update_rows(
            weight=capsule(weight),
            rows=capsule(rows[:n]),
            grad=ready(grad),
            bias=capsule(bias),
            grad_bias=ready(grad_bias),
            update=update_capsules(owner),
        )
    except NonFiniteError:
        if scaler is None:
            raise
        return report.fill_(torch.inf)
    control[PENDING] = 1
    return report


def _update_rows_on_gpu(
    owner: Owner, weight: Tensor, bias: Tensor | None, rows: Tensor, grad: Tensor, grad_bias: Tensor | None
) -> Tensor:
    step = DeviceStep(owner, weight)

    def ready(gradient: Tensor | None) -> Any:
        if gradient is None:
            return None
        if step.inverse is not None:
            # Small numbers without their scale are lost in float16.
            wide = torch.promote_types(gradient.dtype, torch.float32)
            gradient = gradient.to(wide) * step.inverse
        return capsule(gradient.contiguous())

    _core.update_rows(
        weight=capsule(weight),
        rows=capsule(rows),
        grad=ready(grad),
        bias=capsule(bias),
        grad_bias=ready(grad_bias),
        update=update_capsules(owner),
        gpu=step.gpu(weight),
    )
    return step.close()


@update_rows.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, bias, rows, count, _, control, sparse = inputs
    ctx.fused, ctx.sparse, ctx.has_bias = control is not None, sparse, bias is not None
    ctx.shape = weight.shape
    # The rows that were gathered are copies: only the update needs the weights themselves.
    ctx.save_for_backward(rows, count, *((weight, bias, control) if ctx.fused else ()))


def _backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise Error("create_graph (double backward) is not supported with sampled softmax")
    if not ctx.fused:
        rows, count = ctx.saved_tensors
        return (
            _scatter(grad, rows, count, ctx.shape, ctx.sparse) if ctx.needs_input_grad[0] else None,
            _scatter(grad_bias, rows, count, ctx.shape[:1], False) if ctx.needs_input_grad[1] else None,
            *(None,) * 5,
        )
    try:
        rows, count, weight, bias, control = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise refuse_second_backward("a head in fused mode, or a backward after another batch's update,") from error
    report = update_rows(weight, bias, control, rows, count, grad, grad_bias if ctx.has_bias else None)
    return None, None, None, None, report, None, None


def _scatter(grad: Tensor, rows: Tensor, count: Tensor, shape: torch.Size, sparse: bool) -> Tensor:
    """Gradients of rows as a gradient of the whole.

    On a GPU padding becomes repeats of the first row with a gradient of zero: an optimiser that moves the rows of a
    sparse gradient moves no others.
    """
    if on_gpu(grad):
        padding = rows < 0
        grad = grad.masked_fill(padding if grad.dim() == 1 else padding[:, None], 0)
        rows = torch.where(padding, rows[:1], rows).clamp(min=0)
    if not sparse:
        # Padding has a gradient of zero, wherever it goes.
        return grad.new_zeros(shape).index_add(0, rows.clamp(min=0), grad)
    n, distinct = int(count), not on_gpu(grad)
    where = rows[:n].unsqueeze(0)
    return torch.sparse_coo_tensor(where, grad[:n], shape, is_coalesced=distinct, check_invariants=False)


gather_rows.register_autograd(_backward, setup_context=_save)


def checked_proposal(proposal: Any, n_classes: int) -> Proposal:
    if isinstance(proposal, Proposal):
        if proposal.n_classes != n_classes:
            raise ShapeError(f"proposal: expected one over {n_classes} classes, got one over {proposal.n_classes}")
        return proposal
    return Proposal(proposal.detach().cpu().numpy() if isinstance(proposal, Tensor) else proposal, n_classes)
