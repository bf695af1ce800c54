"""sparse_ops.py -- the sparse head's kernels as torch operators, with fake kernels and derivatives.

Every operator allocates its outputs and hands DLPack capsules to the core. Shapes: B rows of hidden, H features, D
classes with K inputs each, G classes a group: weight `[D, K]`, index `[ceil(D / G), K]` uint16 or int32, checked.
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
from ._device import capsule, gpu_of
from ._glue import follow_threads, rows, sum_dtype


def _layer(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, group_size: int) -> dict[str, Any]:
    follow_threads()
    return {
        "hidden": capsule(rows(hidden)),
        "weight": capsule(weight),
        "index": capsule(index),
        "bias": capsule(bias),
        "group_size": group_size,
    }


def _target(
    indptr: Tensor | None, indices: Tensor, values: Tensor | None, class_weight: Tensor | None
) -> dict[str, Any]:
    return {
        "indptr": capsule(indptr),
        "indices": capsule(indices),
        "values": capsule(values),
        "class_weight": capsule(class_weight),
    }


def _options(loss: str, label_smoothing: float, lse_penalty: float, ignore_index: int) -> dict[str, Any]:
    return {
        "loss": loss,
        "label_smoothing": label_smoothing,
        "lse_penalty": lse_penalty,
        "ignore_index": ignore_index,
    }


@custom_op("widehead::sparse_loss", mutates_args=())
def sparse_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    indptr: Tensor | None,
    indices: Tensor,
    values: Tensor | None,
    class_weight: Tensor | None,
    anchor: Tensor | None,
    control: Tensor | None,
    loss: str,
    label_smoothing: float,
    lse_penalty: float,
    ignore_index: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a batch, before any reduction: losses, output and lse as `dense_loss` gives them."""
    kind = sum_dtype(weight)
    losses, output = (torch.empty(hidden.shape[0], dtype=kind, device=hidden.device) for _ in range(2))
    lse = torch.empty(lse_size(hidden, loss), dtype=kind, device=hidden.device)
    if hidden.shape[0]:
        _core.sparse_forward(
            **_layer(hidden, weight, bias, index, group_size),
            **_target(indptr, indices, values, class_weight),
            **_options(loss, label_smoothing, lse_penalty, ignore_index),
            losses=capsule(losses),
            output=capsule(output),
            lse=capsule(lse) if loss == "softmax" else None,
            gpu=gpu_of(hidden),
        )
    return losses, output, lse


@sparse_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, index: Any, indptr: Any, indices: Any, values: Any, class_weight: Any,
    anchor: Any, control: Any, loss: str, *_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind = sum_dtype(weight)
    losses, output = (hidden.new_empty(hidden.shape[0], dtype=kind) for _ in range(2))
    return losses, output, hidden.new_empty(lse_size(hidden, loss), dtype=kind)


@custom_op("widehead::sparse_grad", mutates_args=())
def sparse_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
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
    ignore_index: int,
    group_size: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to hidden `[B, H]`, weight `[D, K]` and bias `[D]`; what is not needed comes back empty."""

    def backward(**outputs: Any) -> None:
        _core.sparse_backward(
            **_layer(hidden, weight, bias, index, group_size),
            **_target(indptr, indices, values, class_weight),
            **_options(loss, label_smoothing, lse_penalty, ignore_index),
            **incoming(loss, lse, grad_losses, grad_output, grad_lse, None),
            **outputs,
            gpu=gpu_of(hidden),
        )

    return plain_gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias), backward)


@sparse_grad.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Any, indptr: Any, indices: Any, values: Any,
    class_weight: Any, lse: Any, grad_losses: Any, grad_output: Any, grad_lse: Any, loss: str, label_smoothing: float,
    lse_penalty: float, ignore_index: int, group_size: int, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias))


@custom_op("widehead::sparse_grad_update", mutates_args=("weight", "bias", "control"))
def sparse_grad_update(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
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
    ignore_index: int,
    group_size: int,
    need_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient to hidden and, in the same pass, the optimiser's step on weight and bias; see `fused_gradients`."""

    def backward(factor: float | Tensor | None, **what: Any) -> None:
        _core.sparse_backward(
            **_layer(hidden, weight, bias, index, group_size),
            **_target(indptr, indices, values, class_weight),
            **_options(loss, label_smoothing, lse_penalty, ignore_index),
            **incoming(loss, lse, grad_losses, grad_output, grad_lse, factor),
            **what,
        )

    return fused_gradients(control, hidden, weight, need_hidden, backward)


@sparse_grad_update.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, index: Any, indptr: Any, indices: Any, values: Any, class_weight: Any,
    control: Tensor, lse: Any, grad_losses: Any, grad_output: Any, grad_lse: Any, loss: str, label_smoothing: float,
    lse_penalty: float, ignore_index: int, group_size: int, need_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_fused_gradients(hidden, need_hidden)


register_loss(sparse_loss, sparse_grad, sparse_grad_update)


@custom_op("widehead::sparse_topk", mutates_args=())
def sparse_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    group_size: int,
    k: int,
    exclude_indptr: Tensor | None,
    exclude_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k best classes of every row: scores `[B, k]` float32 (float64) and classes `[B, k]` int64."""
    scores = torch.empty(hidden.shape[0], k, dtype=sum_dtype(weight), device=hidden.device)
    classes = torch.empty(hidden.shape[0], k, dtype=torch.int64, device=hidden.device)
    if hidden.shape[0]:
        _core.sparse_topk(
            **_layer(hidden, weight, bias, index, group_size),
            k=k,
            exclude_indptr=capsule(exclude_indptr),
            exclude_indices=capsule(exclude_indices),
            scores=capsule(scores),
            classes=capsule(classes),
            gpu=gpu_of(hidden),
        )
    return scores, classes


@sparse_topk.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, index: Any, group_size: int, k: int, *_exclude: Any
) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    return hidden.new_empty(n, k, dtype=sum_dtype(weight)), hidden.new_empty(n, k, dtype=torch.int64)


@custom_op("widehead::sparse_scores", mutates_args=())
def sparse_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, group_size: int, classes: Tensor | None
) -> Tensor:
    """Logits of the classes int64 `[B, n]`, or of all of them `[B, D]` when None; float32 (float64)."""
    n = weight.shape[0] if classes is None else classes.shape[1]
    scores = torch.empty(hidden.shape[0], n, dtype=sum_dtype(weight), device=hidden.device)
    if not scores.numel():
        return scores
    common = {**_layer(hidden, weight, bias, index, group_size), "gpu": gpu_of(hidden)}
    if classes is None:
        _core.sparse_logits(**common, logits=capsule(scores))
    else:
        _core.sparse_scores(**common, classes=capsule(classes.contiguous()), scores=capsule(scores))
    return scores


@sparse_scores.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, index: Any, group_size: int, classes: Tensor | None) -> Tensor:
    n = weight.shape[0] if classes is None else classes.shape[1]
    return hidden.new_empty(hidden.shape[0], n, dtype=sum_dtype(weight))


sparse_topk.register_autograd(refuse_inference_backward)
sparse_scores.register_autograd(refuse_inference_backward)
