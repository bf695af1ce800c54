"""block_ops.py -- kernels of a sparse head whose first classes have dense rows, as torch operators.

Two layers over ranges of the rows: `frequent_weight` `[n, H]` has rows 0 .. n - 1, `weight` `[D - n, K]` with its index
the others. Targets and class weights are those of all D rows; ranges.h says how losses of ranges become one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from widehead import _core

from . import ops, sparse_ops
from ._autograd import (
    empty_gradients,
    fake_fused_gradients,
    fill_gradients,
    fused_gradients,
    incoming,
    lse_size,
    register_loss,
)
from ._device import capsule, gpu_of, on_gpu, tf32
from ._glue import follow_threads, rows, sum_dtype


class _Layers:
    """Both layers of a call, as the core takes them; every call needs capsules of its own."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, group_size: int, frequent: Any,
        frequent_bias: Tensor | None,
    ) -> None:  # fmt: skip
        follow_threads()
        self.hidden, self.n = rows(hidden), frequent.shape[0]
        self.n_classes = self.n + weight.shape[0]
        self.kind = sum_dtype(weight)
        self._sparse = {"weight": weight, "bias": bias, "index": index}
        self._dense = {"weight": frequent, "bias": frequent_bias}
        self._group_size = group_size

    def sparse(self) -> dict[str, Any]:
        arrays = {name: capsule(tensor) for name, tensor in self._sparse.items()}
        return {"hidden": capsule(self.hidden), **arrays, "group_size": self._group_size, **self._range(self.n)}

    def dense(self) -> dict[str, Any]:
        arrays = {name: capsule(tensor) for name, tensor in self._dense.items()}
        use_tf32 = on_gpu(self.hidden) and tf32()
        return {"hidden": capsule(self.hidden), **arrays, "tf32": use_tf32, **self._range(0)}

    def _range(self, first: int) -> dict[str, int]:
        return {"n_classes": self.n_classes, "first_class": first}


class _Losses:
    """Targets and options of a call, likewise."""

    def __init__(
        self, indptr: Tensor | None, indices: Tensor, values: Tensor | None, class_weight: Tensor | None, loss: str,
        label_smoothing: float, lse_penalty: float, ignore_index: int,
    ) -> None:  # fmt: skip
        self._tensors = {"indptr": indptr, "indices": indices, "values": values, "class_weight": class_weight}
        self._options = {"label_smoothing": label_smoothing, "lse_penalty": lse_penalty, "ignore_index": ignore_index}
        self.loss = loss

    def joined(self) -> dict[str, Any]:
        return {**{name: capsule(tensor) for name, tensor in self._tensors.items()}, **self._options}

    def __call__(self) -> dict[str, Any]:
        return {**self.joined(), "loss": self.loss}


@custom_op("widehead::block_loss", mutates_args=())
def block_loss(
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
    frequent_weight: Tensor,
    frequent_bias: Tensor | None,
    loss: str,
    label_smoothing: float,
    lse_penalty: float,
    ignore_index: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a batch, before any reduction: losses, output and lse as `dense_loss` gives them."""
    size, kind = hidden.shape[0], sum_dtype(weight)
    losses, output = (torch.empty(size, dtype=kind, device=hidden.device) for _ in range(2))
    lse = torch.empty(lse_size(hidden, loss), dtype=kind, device=hidden.device)
    if not size:
        return losses, output, lse
    layers = _Layers(hidden, weight, bias, index, group_size, frequent_weight, frequent_bias)
    given = _Losses(indptr, indices, values, class_weight, loss, label_smoothing, lse_penalty, ignore_index)
    softmax = loss == "softmax"

    def into(*tensors: Tensor) -> dict[str, Any]:
        out = {name: capsule(tensor) for name, tensor in zip(("losses", "output", "lse"), tensors, strict=True)}
        return {**out, "lse": out["lse"] if softmax else None, "gpu": gpu_of(hidden)}

    more = [torch.empty_like(tensor) for tensor in (losses, output, lse)]
    _core.dense_forward(**layers.dense(), **given(), **into(losses, output, lse))
    _core.sparse_forward(**layers.sparse(), **given(), **into(*more))
    losses += more[0]
    output += more[1]
    if softmax:
        lse = torch.logaddexp(lse, more[2])
        _core.join_softmax(**given.joined(), n_classes=layers.n_classes, **into(losses, output, lse))
    return losses, output, lse


@block_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, index: Any, indptr: Any, indices: Any, values: Any, class_weight: Any,
    anchor: Any, control: Any, frequent_weight: Any, frequent_bias: Any, loss: str, *_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind = sum_dtype(weight)
    losses, output = (hidden.new_empty(hidden.shape[0], dtype=kind) for _ in range(2))
    return losses, output, hidden.new_empty(lse_size(hidden, loss), dtype=kind)


class _Backward:
    """The core's backward of both layers: plain gradients, or the step of an optimiser."""

    def __init__(self, layers: _Layers, given: _Losses, *gradients: Tensor) -> None:
        """gradients: lse, then what comes in for losses, output and lse."""
        self.layers, self.given, self.gradients = layers, given, gradients

    def __call__(
        self,
        factor: float | Tensor | None,
        grad_hidden: Tensor | None = None,
        update: list[dict[str, Any]] | None = None,
        gpu: list[Any] | None = None,
        outputs: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    ) -> None:
        """update, gpu, outputs: of the sparse layer, then the dense one. Both check the same batch before anything
        changes, so what the first does not refuse the second does not either."""
        hidden = self.layers.hidden
        # In full precision, so that their sum is rounded once.
        wanted = 0 if grad_hidden is None else 2
        parts = [torch.empty(hidden.shape, dtype=self.layers.kind, device=hidden.device) for _ in range(wanted)]
        for i, layer in enumerate((self.layers.sparse, self.layers.dense)):
            lse, losses, output, from_lse = self.gradients
            arguments = {
                **layer(),
                **self.given(),
                **incoming(self.given.loss, lse, losses, output, from_lse, factor),
                **outputs[i],
                "grad_hidden": capsule(parts[i]) if parts else None,
                "gpu": gpu_of(hidden) if gpu is None else gpu[i],
            }
            arguments |= {} if update is None else {"update": update[i]}
            (_core.sparse_backward if i == 0 else _core.dense_backward)(**arguments)
        if grad_hidden is not None:
            grad_hidden.copy_(parts[0].add_(parts[1]))


@custom_op("widehead::block_grad", mutates_args=())
def block_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    indptr: Tensor | None,
    indices: Tensor,
    values: Tensor | None,
    class_weight: Tensor | None,
    frequent_weight: Tensor,
    frequent_bias: Tensor | None,
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
    need_frequent_weight: bool,
    need_frequent_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to hidden `[B, H]` and to weight and bias of both layers; what is not needed comes back empty."""
    needs = (need_hidden, need_weight, need_bias, need_frequent_weight, need_frequent_bias)
    outputs = _empty(hidden, weight, bias, frequent_weight, frequent_bias, needs)
    layers = _Layers(hidden, weight, bias, index, group_size, frequent_weight, frequent_bias)
    given = _Losses(indptr, indices, values, class_weight, loss, label_smoothing, lse_penalty, ignore_index)
    backward = _Backward(layers, given, lse, grad_losses, grad_output, grad_lse)

    def fill() -> None:
        wanted = [out if need else None for out, need in zip(outputs, needs, strict=True)]
        places = ({"grad_weight": capsule(w), "grad_bias": capsule(b)} for w, b in (wanted[1:3], wanted[3:5]))
        backward(None, wanted[0], outputs=tuple(places))  # type: ignore[arg-type]

    fill_gradients(hidden, outputs, need_hidden, fill)
    return outputs


def _empty(
    hidden: Tensor, weight: Tensor, bias: Any, frequent_weight: Tensor, frequent_bias: Any, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first = empty_gradients(hidden, weight, bias, needs[:3])
    return (*first, *empty_gradients(hidden, frequent_weight, frequent_bias, (False, *needs[3:]))[1:])


@block_grad.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, index: Any, indptr: Any, indices: Any, values: Any, class_weight: Any,
    frequent_weight: Tensor, frequent_bias: Any, lse: Any, grad_losses: Any, grad_output: Any, grad_lse: Any, loss: str,
    label_smoothing: float, lse_penalty: float, ignore_index: int, group_size: int, *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(hidden, weight, bias, frequent_weight, frequent_bias, needs)


@custom_op(
    "widehead::block_grad_update", mutates_args=("weight", "bias", "frequent_weight", "frequent_bias", "control")
)
def block_grad_update(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    indptr: Tensor | None,
    indices: Tensor,
    values: Tensor | None,
    class_weight: Tensor | None,
    frequent_weight: Tensor,
    frequent_bias: Tensor | None,
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
    """Gradient to hidden and the optimiser's step on both layers; see `fused_gradients`."""
    layers = _Layers(hidden, weight, bias, index, group_size, frequent_weight, frequent_bias)
    given = _Losses(indptr, indices, values, class_weight, loss, label_smoothing, lse_penalty, ignore_index)
    backward = _Backward(layers, given, lse, grad_losses, grad_output, grad_lse)
    return fused_gradients(control, hidden, weight, need_hidden, backward, layers=2)


@block_grad_update.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, index: Any, indptr: Any, indices: Any, values: Any, class_weight: Any,
    frequent_weight: Any, frequent_bias: Any, control: Tensor, lse: Any, grad_losses: Any, grad_output: Any,
    grad_lse: Any, loss: str, label_smoothing: float, lse_penalty: float, ignore_index: int, group_size: int,
    need_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_fused_gradients(hidden, need_hidden)


register_loss(block_loss, block_grad, block_grad_update, layers=2)


def block_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    group_size: int,
    frequent_weight: Tensor,
    frequent_bias: Tensor | None,
    k: int,
    exclude_indptr: Tensor | None,
    exclude_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k best rows of every example from the k best of each layer; of equal scores the lower row."""
    n = frequent_weight.shape[0]
    few, many = min(k, n), min(k, weight.shape[0])
    first = ops.dense_topk(hidden, frequent_weight, frequent_bias, 0.0, few, exclude_indptr, exclude_indices)
    others = None if exclude_indices is None else exclude_indices - n
    second = sparse_ops.sparse_topk(hidden, weight, bias, index, group_size, many, exclude_indptr, others)
    classes = torch.cat([first[1], torch.where(second[1] >= 0, second[1] + n, -1)], 1)
    scores, best = torch.cat([first[0], second[0]], 1).sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), classes.gather(1, best[:, :k])


def block_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    group_size: int,
    frequent_weight: Tensor,
    frequent_bias: Tensor | None,
    classes: Tensor | None,
) -> Tensor:
    """Logits of rows int64 `[B, n]`, or of all of them."""
    n = frequent_weight.shape[0]
    if classes is None:
        first, second = None, None
    else:  # what is no row goes to the layer that says so
        sparse = classes >= n
        first, second = torch.where(sparse, 0, classes), torch.where(sparse, classes - n, 0)
    frequent = ops.dense_scores(hidden, frequent_weight, frequent_bias, 0.0, first)
    others = sparse_ops.sparse_scores(hidden, weight, bias, index, group_size, second)
    return torch.cat([frequent, others], 1) if classes is None else torch.where(sparse, others, frequent)
