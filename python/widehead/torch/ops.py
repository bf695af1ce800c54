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
from widehead._core import Error, NonFiniteError

from ._device import capsule, gpu_of, on_gpu, tf32
from ._glue import follow_threads, fused_backward, fused_backward_on_gpu, rows, sum_dtype
from ._owner import PENDING, owner_of, refuse_second_backward


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


def _lse_size(hidden: Tensor, loss: str) -> int:
    return hidden.shape[0] if loss == "softmax" else 0


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
    lse = torch.empty(_lse_size(hidden, loss), dtype=kind, device=hidden.device)
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
    return losses, output, hidden.new_empty(_lse_size(hidden, loss), dtype=kind)


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
    grad_hidden = torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=hidden.device)
    grad_bias = _empty_bias(bias, need_bias, weight)
    outputs = (grad_hidden, grad_weight, grad_bias)
    if not hidden.shape[0]:
        for gradient in outputs:
            gradient.zero_()
        return outputs
    try:
        _core.dense_backward(
            **_layer(hidden, weight, bias),
            **_target(indptr, indices, values, class_weight, offset),
            **_options(loss, label_smoothing, lse_penalty, softcap, ignore_index),
            **_gradients(loss, lse, grad_losses, grad_output, grad_lse, None),
            grad_hidden=capsule(grad_hidden) if need_hidden else None,
            grad_weight=capsule(grad_weight) if need_weight else None,
            grad_bias=capsule(grad_bias) if need_bias else None,
            filter_eps=filter_eps,
            tf32=on_gpu(hidden) and tf32(),
            gpu=gpu_of(hidden),
        )
    except NonFiniteError:
        # As every torch layer: the gradient is not a number, and whoever looks at it (a GradScaler) skips the step.
        for gradient in outputs:
            gradient.fill_(torch.nan)
    # Where float16 could not carry the gradient to the backbone, the weights must not take their step either.
    if hidden.dtype != torch.float16 or not need_hidden:
        return outputs
    finite = torch.isfinite(grad_hidden).all()
    if on_gpu(hidden):
        grad_weight.masked_fill_(~finite, torch.nan)
        grad_bias.masked_fill_(~finite, torch.nan)
    elif not finite:
        grad_weight.fill_(torch.nan)
        grad_bias.fill_(torch.nan)
    return outputs


@dense_grad.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, offset: Any, indptr: Any, indices: Any, values: Any,
    class_weight: Any, lse: Any, grad_losses: Any, grad_output: Any, grad_lse: Any, loss: str, label_smoothing: float,
    lse_penalty: float, softcap: float, ignore_index: int, filter_eps: float, need_hidden: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        _empty_bias(bias, need_bias, weight),
    )


def _empty_bias(bias: Tensor | None, needed: bool, weight: Tensor) -> Tensor:
    return torch.empty_like(bias) if needed and bias is not None else weight.new_empty(0)


def _gradients(
    loss: str, lse: Tensor, grad_losses: Tensor, grad_output: Tensor, grad_lse: Tensor, factor: float | Tensor | None
) -> dict[str, Any]:
    """The gradients that come in, times `factor`."""

    def ready(gradient: Tensor) -> Any:
        return capsule((gradient if factor is None else gradient * factor).contiguous())

    softmax = loss == "softmax"
    return {
        "lse": capsule(lse) if softmax else None,
        "grad_losses": ready(grad_losses),
        "grad_output": ready(grad_output),
        "grad_lse": ready(grad_lse) if softmax else None,
    }


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
    """Gradient to hidden and, in the same pass, the optimiser's step on weight and bias.

    The optimiser, its hyper-parameters and its state are found through `control` when the operator runs. Returns
    grad_hidden `[B, d]` (empty when not needed) and the anchor's gradient, 0-d: 0, or infinity when an overflow under a
    GradScaler left everything as it was. Without a scaler a non-finite input raises NonFiniteError (on a GPU it is
    recorded, and grad_hidden is 0); nothing changes.
    """
    owner = owner_of(control)
    if control[PENDING]:
        raise refuse_second_backward(owner.name)
    grad_hidden = torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    report = torch.zeros((), dtype=torch.float32, device=hidden.device)
    if not hidden.shape[0]:
        return grad_hidden, report

    def backward(factor: float | Tensor | None, **what: Any) -> None:
        _core.dense_backward(
            **_layer(hidden, weight, bias),
            **_target(indptr, indices, values, class_weight, offset),
            **_options(loss, label_smoothing, lse_penalty, softcap, ignore_index),
            **_gradients(loss, lse, grad_losses, grad_output, grad_lse, factor),
            filter_eps=filter_eps,
            tf32=on_gpu(hidden) and tf32(),
            **what,
        )

    wanted = grad_hidden if need_hidden else None
    if on_gpu(hidden):
        report = fused_backward_on_gpu(owner, backward, weight, wanted)
        control[PENDING] = 1
    elif fused_backward(owner, backward, wanted):
        control[PENDING] = 1
    else:
        report.fill_(torch.inf)
    return grad_hidden, report


@dense_grad_update.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, offset: Any, indptr: Any, indices: Any, values: Any, class_weight: Any,
    control: Tensor, lse: Any, grad_losses: Any, grad_output: Any, grad_lse: Any, loss: str, label_smoothing: float,
    lse_penalty: float, softcap: float, ignore_index: int, filter_eps: float, need_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty((), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, control = inputs[:10]
    ctx.save_for_backward(*tensors, control, output[2])
    ctx.options = inputs[10:]
    ctx.fused = control is not None


def _backward(ctx: Any, grad_losses: Tensor, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.fused:
        *tensors, _, lse = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in range(3)]
        grads = dense_grad(*tensors, lse, grad_losses, grad_output, grad_lse, *ctx.options, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 13
    if torch.is_grad_enabled():
        raise Error("create_graph (double backward) is refused in fused mode: backward updates the weights")
    try:
        *tensors, control, lse = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise refuse_second_backward("a head in fused mode, or a backward after another batch's update,") from error
    need = ctx.needs_input_grad[0]
    grad_hidden, report = dense_grad_update(
        *tensors, control, lse, grad_losses, grad_output, grad_lse, *ctx.options, need
    )
    return (grad_hidden if need else None), *(None,) * 7, report, *(None,) * 7


dense_loss.register_autograd(_backward, setup_context=_save)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise Error("double backward through a widehead head is not supported: its gradient is not differentiable")


dense_grad.register_autograd(_refuse_double_backward)


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


def _refuse_inference_backward(ctx: Any, *_: Any) -> None:
    raise Error("topk, scores and log_prob are for inference and have no gradient; train with head(hidden, target)")


dense_topk.register_autograd(_refuse_inference_backward)
dense_scores.register_autograd(_refuse_inference_backward)
