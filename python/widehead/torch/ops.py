"""ops.py -- the dense head's kernels as torch operators, with fake kernels and derivatives.

Every operator allocates its outputs and hands DLPack capsules to the core. Shapes: B rows of hidden, d features, D
classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from widehead import _core

from ._autograd import (
    empty_gradients,
    fake_fused_gradients,
    fused_gradients,
    incoming,
    lse_size,
    plain_gradients,
    refuse_inference_backward,
    register_loss,
)
from ._device import capsule, gpu_of, on_gpu, tf32
from ._glue import follow_threads, rows, sum_dtype


def _layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    follow_threads()
    return {
        "hidden": capsule(rows(hidden)),
        "weight": capsule(weight),
        "bias": capsule(bias),
    }


def _target(
    indptr: Tensor | None, indices: Tensor, values: Tensor | None, class_weight: Tensor | None, offset: Tensor | None
) -> dict[str, Any]:
    return {
        "indptr": capsule(indptr),
        "indices": capsule(indices),
        "values": capsule(values),
        "class_weight": capsule(class_weight),
        "offset": capsule(offset),
    }


def _options(
    loss: str, label_smoothing: float, lse_penalty: float, softcap: float, ignore_index: int
) -> dict[str, Any]:
    return {
        "loss": loss,
        "label_smoothing": label_smoothing,
        "lse_penalty": lse_penalty,
        "softcap": softcap,
        "ignore_index": ignore_index,
    }


@custom_op("widehead::dense_loss", mutates_args=())
def dense_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor,
    values: Tensor | None,
    class_weight: Tensor | None,
    anchor: Tensor | None,
    control: Tensor | None,
    loss: str,
    label_smoothing: float,
    lse_penalty: float,
    softcap: float,
    ignore_index: int,
    filter_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a batch, before any reduction.

    Args:
        hidden: `[B, d]`; weight: `[D, d]`; bias: `[D]`; offset: `[D]` float32, added to the logits of non-targets.
        indptr, indices, values: one class a row, int64 `[B]`, when `indptr` is None; else CSR.
        anchor, control: of the fused optimiser that owns the head (both or neither): backward then updates the weights.
    Returns:
        losses `[B]`, output `[B]` (target log-probability or score) and lse `[B]` (softmax; else empty), float32 or,
        with float64 weights, float64.
    """
    kind = sum_dtype(weight)
    losses, output = (torch.empty(hidden.shape[0], dtype=kind, device=hidden.device) for _ in range(2))
    lse = torch.empty(lse_size(hidden, loss), dtype=kind, device=hidden.device)
    if hidden.shape[0]:
        _core.dense_forward(
            **_layer(hidden, weight, bias),
            **_target(indptr, indices, values, class_weight, offset),
            **_options(loss, label_smoothing, lse_penalty, softcap, ignore_index),
            losses=capsule(losses),
            output=capsule(output),
            lse=capsule(lse) if loss == "softmax" else None,
            tf32=on_gpu(hidden) and tf32(),
            gpu=gpu_of(hidden),
        )
    return losses, output, lse


@dense_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, offset: Any, indptr: Any, indices: Any, values: Any, class_weight: Any,
    anchor: Any, control: Any, loss: str, *_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind = sum_dtype(weight)
    losses, output = (hidden.new_empty(hidden.shape[0], dtype=kind) for _ in range(2))
    return losses, output, hidden.new_empty(lse_size(hidden, loss), dtype=kind)


@custom_op("widehead::dense_grad", mutates_args=())
def dense_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor,
    values: Tensor | None,
    class_weight: Tensor | None,
    lse: Tensor,
    grad_losses: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    loss: str,
    label_smoothing: float,
    lse_penalty: float,
    softcap: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to hidden `[B, d]`, weight `[D, d]` and bias `[D]`; what is not needed comes back empty."""

    def backward(**outputs: Any) -> None:
        _core.dense_backward(
            **_layer(hidden, weight, bias),
            **_target(indptr, indices, values, class_weight, offset),
            **_options(loss, label_smoothing, lse_penalty, softcap, ignore_index),
            **incoming(loss, lse, grad_losses, grad_output, grad_lse, None),
            **outputs,
            filter_eps=filter_eps,
            tf32=on_gpu(hidden) and tf32(),
            gpu=gpu_of(hidden),
        )

    return plain_gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias), backward)


@dense_grad.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, offset: Any, indptr: Any, indices: Any, values: Any,
    class_weight: Any, lse: Any, grad_losses: Any, grad_output: Any, grad_lse: Any, loss: str, label_smoothing: float,
    lse_penalty: float, softcap: float, ignore_index: int, filter_eps: float, need_hidden: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias))


@custom_op("widehead::dense_grad_update", mutates_args=("weight", "bias", "control"))
def dense_grad_update(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor,
    values: Tensor | None,
    class_weight: Tensor | None,
    control: Tensor,
    lse: Tensor,
    grad_losses: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    loss: str,
    label_smoothing: float,
    lse_penalty: float,
    softcap: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient to hidden and, in the same pass, the optimiser's step on weight and bias; see `fused_gradients`.

    The optimiser, its hyper-parameters and its state are found through `control` when the operator runs.
    """

    def backward(factor: float | Tensor | None, **what: Any) -> None:
        _core.dense_backward(
            **_layer(hidden, weight, bias),
            **_target(indptr, indices, values, class_weight, offset),
            **_options(loss, label_smoothing, lse_penalty, softcap, ignore_index),
            **incoming(loss, lse, grad_losses, grad_output, grad_lse, factor),
            filter_eps=filter_eps,
            tf32=on_gpu(hidden) and tf32(),
            **what,
        )

    return fused_gradients(control, hidden, weight, need_hidden, backward)


@dense_grad_update.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, offset: Any, indptr: Any, indices: Any, values: Any, class_weight: Any,
    control: Tensor, lse: Any, grad_losses: Any, grad_output: Any, grad_lse: Any, loss: str, label_smoothing: float,
    lse_penalty: float, softcap: float, ignore_index: int, filter_eps: float, need_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_fused_gradients(hidden, need_hidden)


register_loss(dense_loss, dense_grad, dense_grad_update)


@custom_op("widehead::dense_topk", mutates_args=())
def dense_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float,
    k: int,
    exclude_indptr: Tensor | None,
    exclude_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k best classes of every row: scores `[B, k]` float32 (float64) and classes `[B, k]` int64."""
    scores = torch.empty(hidden.shape[0], k, dtype=sum_dtype(weight), device=hidden.device)
    classes = torch.empty(hidden.shape[0], k, dtype=torch.int64, device=hidden.device)
    if hidden.shape[0]:
        _core.dense_topk(
            **_layer(hidden, weight, bias),
            softcap=softcap,
            k=k,
            exclude_indptr=capsule(exclude_indptr),
            exclude_indices=capsule(exclude_indices),
            scores=capsule(scores),
            classes=capsule(classes),
            gpu=gpu_of(hidden),
        )
    return scores, classes


@dense_topk.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, softcap: float, k: int, *_exclude: Any) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, k, dtype=sum_dtype(weight)), hidden.new_empty(rows, k, dtype=torch.int64)


@custom_op("widehead::dense_scores", mutates_args=())
def dense_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, classes: Tensor | None) -> Tensor:
    """Logits of the classes int64 `[B, n]`, or of all of them `[B, D]` when None; float32 (float64)."""
    n = weight.shape[0] if classes is None else classes.shape[1]
    scores = torch.empty(hidden.shape[0], n, dtype=sum_dtype(weight), device=hidden.device)
    if not scores.numel():
        return scores
    common = {**_layer(hidden, weight, bias), "softcap": softcap, "gpu": gpu_of(hidden)}
    if classes is None:
        _core.dense_logits(**common, logits=capsule(scores))
    else:
        _core.dense_scores(**common, classes=capsule(classes.contiguous()), scores=capsule(scores))
    return scores


@dense_scores.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, softcap: float, classes: Tensor | None) -> Tensor:
    n = weight.shape[0] if classes is None else classes.shape[1]
    return hidden.new_empty(hidden.shape[0], n, dtype=sum_dtype(weight))


dense_topk.register_autograd(refuse_inference_backward)
dense_scores.register_autograd(refuse_inference_backward)
