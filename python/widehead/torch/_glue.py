"""_glue.py -- what the operators of every head share: capsules, threads, streams, and the rules of a fused backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from widehead import _core
from widehead._core import NonFiniteError

from ._owner import Owner

_threads_seen = 0


def follow_threads() -> None:
    """Give the core as many threads as torch has now."""
    global _threads_seen
    n = torch.get_num_threads()
    if n != _threads_seen:
        _core.set_num_threads(n)
        _threads_seen = n


def capsule(tensor: Tensor | None) -> Any:
    return None if tensor is None else to_dlpack(tensor.detach())


def stream_of(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def rows(tensor: Tensor) -> Tensor:
    """The same matrix in a layout that the core walks: columns side by side, rows apart."""
    if tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[1]:
        return tensor
    return tensor.contiguous()


def sum_dtype(weight: Tensor) -> torch.dtype:
    """The type of losses and scores: float64 for float64 weights (checks), else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def update_capsules(owner: Owner) -> dict[str, Any]:
    """The owner's next step as the core takes it; its capsules serve one call."""
    return {name: capsule(v) if isinstance(v, Tensor) else v for name, v in owner.update().items()}


def fused_backward(owner: Owner, backward: Any, grad_hidden: Tensor | None) -> bool:
    """Run `backward(factor, grad_hidden=, update=)` under the rules of the owner's GradScaler; False: overflow, no
    change.

    Gradients come in multiplied by the scale: the weights need them without it, the backbone with it.
    """
    update = update_capsules(owner)
    scaler = owner.scaler()
    if scaler is None:
        backward(1.0, grad_hidden=capsule(grad_hidden), update=update)
        return True
    scale = float(scaler.get_scale())
    try:
        if grad_hidden is not None and grad_hidden.dtype == torch.float16:
            # The scaled gradient can overflow in float16 though all that came in was finite: it is known first.
            backward(1.0, grad_hidden=capsule(grad_hidden))
            if not torch.isfinite(grad_hidden).all():
                return False
            backward(1.0 / scale, update=update)
        else:
            backward(1.0 / scale, grad_hidden=capsule(grad_hidden), update=update)
            if grad_hidden is not None:
                grad_hidden.mul_(scale)
    except NonFiniteError:
        if grad_hidden is not None:
            grad_hidden.fill_(torch.nan)
        return False
    return True
