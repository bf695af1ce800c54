"""_autograd.py -- gradients of the heads' losses: plain ones, those of a fused step, and how torch is told of them.

The loss operator of every head takes, in this order, hidden `[B, in_features]`, weight, bias, one more tensor or None,
the targets (indptr, indices, values), class_weight, and anchor and control of a fused optimiser (both or neither); then
weight and bias of a second layer, if it has one; the options follow. It returns losses, output and lse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from widehead._core import Error, NonFiniteError

from ._device import capsule, on_gpu
from ._glue import fused_backward, fused_backward_on_gpu
from ._owner import PENDING, owner_of, refuse_second_backward

TENSORS = 10  # arguments of a loss operator before its options
_ANCHOR, _CONTROL = 8, 9


def lse_size(hidden: Tensor, loss: str) -> int:
    return hidden.shape[0] if loss == "softmax" else 0


def incoming(
    loss: str, lse: Tensor, grad_losses: Tensor, grad_output: Tensor, grad_lse: Tensor, factor: float | Tensor | None
) -> dict[str, Any]:
    """The gradients that come in, times `factor`, as the core takes them."""

    def ready(gradient: Tensor) -> Any:
        return capsule((gradient if factor is None else gradient * factor).contiguous())

    softmax = loss == "softmax"
    return {
        "lse": capsule(lse) if softmax else None,
        "grad_losses": ready(grad_losses),
        "grad_output": ready(grad_output),
        "grad_lse": ready(grad_lse) if softmax else None,
    }


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Places for the gradients to hidden, weight and bias; of no elements where one is not needed."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        torch.empty_like(bias) if needs[2] and bias is not None else weight.new_empty(0),
    )


def plain_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    backward: Callable[..., Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `backward(grad_hidden=, grad_weight=, grad_bias=)` of the core."""
    outputs = empty_gradients(hidden, weight, bias, needs)
    names = ("grad_hidden", "grad_weight", "grad_bias")

    def fill() -> None:
        backward(**{n: capsule(g) if need else None for n, g, need in zip(names, outputs, needs, strict=True)})

    fill_gradients(hidden, outputs, needs[0], fill)
    return outputs


def fill_gradients(hidden: Tensor, outputs: tuple[Tensor, ...], need_hidden: bool, fill: Callable[[], None]) -> None:
    """Runs `fill`, which computes the outputs, gradient to hidden first: 0 of an empty batch, NaN where one is not
    finite."""
    if not hidden.shape[0]:
        for gradient in outputs:
            gradient.zero_()
        return
    try:
        fill()
    except NonFiniteError:
        # As every torch layer: the gradient is not a number, and whoever looks at it (a GradScaler) skips the step.
        for gradient in outputs:
            gradient.fill_(torch.nan)
    # Where float16 could not carry the gradient to the backbone, the weights must not take their step either.
    if hidden.dtype != torch.float16 or not need_hidden:
        return
    finite = torch.isfinite(outputs[0]).all()
    for gradient in outputs[1:]:
        if on_gpu(hidden):
            gradient.masked_fill_(~finite, torch.nan)
        elif not finite:
            gradient.fill_(torch.nan)


def fused_gradients(
    control: Tensor, hidden: Tensor, weight: Tensor, need_hidden: bool, backward: Callable[..., Any], layers: int = 1
) -> tuple[Tensor, Tensor]:
    """Runs `backward(factor, ...)` of the core with the step of the optimiser that `control` leads to.

    Args:
        layers: of the head; see `fused_backward`.

    Returns:
        grad_hidden `[B, in_features]` (empty when not needed) and the anchor's gradient, 0-d: 0, or infinity when an
        overflow under a GradScaler left everything as it was. Without a scaler a non-finite input raises NonFiniteError
        (on a GPU it is recorded, and grad_hidden is 0); nothing changes.
    """
    owner = owner_of(control)
    if control[PENDING]:
        raise refuse_second_backward(owner.name)
    grad_hidden = torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    report = torch.zeros((), dtype=torch.float32, device=hidden.device)
    if not hidden.shape[0]:
        return grad_hidden, report
    wanted = grad_hidden if need_hidden else None
    if on_gpu(hidden):
        report = fused_backward_on_gpu(owner, backward, weight, wanted, layers)
        control[PENDING] = 1
    elif fused_backward(owner, backward, wanted, layers):
        control[PENDING] = 1
    else:
        report.fill_(torch.inf)
    return grad_hidden, report


def fake_fused_gradients(hidden: Tensor, need_hidden: bool) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape if need_hidden else (0,)), hidden.new_empty((), dtype=torch.float32)


def register_loss(loss: Any, gradient: Any, fused_gradient: Any, layers: int = 1) -> None:
    """Gives the operator `loss` its derivative.

    Args:
        gradient: operator of the loss's tensors without anchor and control, then lse, the three gradients that come in,
            the options, and which of grad_hidden, grad_weight, grad_bias (then those of a second layer) are needed.
        fused_gradient: the same with control before lse, and whether grad_hidden is needed.
        layers: 2 where the operator takes weight and bias of a second one.
    """
    tensors_in = TENSORS + 2 * (layers - 1)
    trained = (0, 1, 2, *range(TENSORS, tensors_in))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:_ANCHOR], *inputs[TENSORS:tensors_in], inputs[_CONTROL], output[2])
        ctx.options = inputs[tensors_in:]
        ctx.fused = inputs[_CONTROL] is not None

    def backward(ctx: Any, grad_losses: Tensor, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * (tensors_in + len(ctx.options))
        if not ctx.fused:
            *tensors, _, lse = ctx.saved_tensors
            needs = [ctx.needs_input_grad[i] for i in trained]
            found = gradient(*tensors, lse, grad_losses, grad_output, grad_lse, *ctx.options, *needs)
            for at, g, need in zip(trained, found, needs, strict=True):
                grads[at] = g if need else None
            return tuple(grads)
        if torch.is_grad_enabled():
            raise Error("create_graph (double backward) is refused in fused mode: backward updates the weights")
        try:
            *tensors, control, lse = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise refuse_second_backward("a head in fused mode, or a backward after another batch's update,") from error
        need = ctx.needs_input_grad[0]
        grad_hidden, grads[_ANCHOR] = fused_gradient(
            *tensors, control, lse, grad_losses, grad_output, grad_lse, *ctx.options, need
        )
        grads[0] = grad_hidden if need else None
        return tuple(grads)

    loss.register_autograd(backward, setup_context=save)
    gradient.register_autograd(_refuse_double_backward)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise Error("double backward through a widehead head is not supported: its gradient is not differentiable")


def refuse_inference_backward(ctx: Any, *_: Any) -> None:
    raise Error("topk, scores and log_prob are for inference and have no gradient; train with head(hidden, target)")
