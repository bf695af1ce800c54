"""_glue.py -- what the operators of every head share: threads, layouts, and the rules of a fused backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from widehead import _core
from widehead._core import NonFiniteError

from ._device import NUMBERS, faults_of, gpu_of
from ._device import capsule as _capsule
from ._owner import Owner

if TYPE_CHECKING:
    from widehead._core import Gpu

_threads_seen = 0


def _same(tensor: Tensor | None) -> Tensor | None:
    return tensor


def follow_threads() -> None:
    """Give the core as many threads as torch has now."""
    global _threads_seen
    n = torch.get_num_threads()
    if n != _threads_seen:
        _core.set_num_threads(n)
        _threads_seen = n


def rows(tensor: Tensor) -> Tensor:
    """The same matrix in a layout that the core walks: columns side by side, rows apart."""
    if tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[1]:
        return tensor
    return tensor.contiguous()


def sum_dtype(weight: Tensor) -> torch.dtype:
    """The type of losses and scores: float64 for float64 weights (checks), else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def update_capsules(owner: Owner, layer: int = 0) -> dict[str, Any]:
    """The owner's next step on a layer of its head, as the core takes it; its capsules serve one call."""
    return {name: _capsule(v) if isinstance(v, Tensor) else v for name, v in owner.update(layer).items()}


def fused_backward(owner: Owner, backward: Any, grad_hidden: Tensor | None, layers: int = 1) -> bool:
    """Run `backward(factor, grad_hidden=, update=)` under the rules of the owner's GradScaler; False: overflow, no
    change.

    Gradients come in multiplied by the scale: the weights need them without it, the backbone with it. A head of several
    layers gets `grad_hidden` as a tensor, which it sums up itself, and a list of updates.
    """
    capsule = _same if layers > 1 else _capsule
    update = update_capsules(owner) if layers == 1 else [update_capsules(owner, layer) for layer in range(layers)]
    scaler = owner.scaler()
    if scaler is None:
        backward(None, grad_hidden=capsule(grad_hidden), update=update)
        return True
    scale = float(scaler.get_scale())
    try:
        if grad_hidden is not None and grad_hidden.dtype == torch.float16:
            # The scaled gradient can overflow in float16 though all that came in was finite: it is known first.
            backward(None, grad_hidden=capsule(grad_hidden))
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


def scale_on(scaler: Any, device: torch.device) -> Tensor:
    """The scale of a GradScaler, 0-d on the device, without waiting."""
    scale = scaler._get_scale_async()  # None until its first use
    if scale is None:
        return torch.full((), scaler.get_scale(), dtype=torch.float32, device=device)
    return scale.to(device, non_blocking=True)


class DeviceStep:
    """A fused step on a GPU, where nothing is waited for: whether it is refused is known to the device alone.

    Attributes:
        refused: int32 `[1]`; the core changes nothing where it is not 0, and sets it when it meets a bad value.
        scale: 0-d, of the owner's GradScaler; None without one. inverse: 1 / scale.
    """

    def __init__(self, owner: Owner, weight: Tensor) -> None:
        self.owner, self.device = owner, weight.device
        self.refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.scale = self.inverse = self._record = None
        if (scaler := owner.scaler()) is None:
            return
        self.scale = scale_on(scaler, self.device)
        self.inverse = self.scale.double().reciprocal().float()
        # An overflow is nothing to complain of under a scaler.
        self._record = torch.zeros(NUMBERS, dtype=torch.int64, device=self.device)

    def gpu(self, tensor: Tensor) -> Gpu | None:
        """The core's `gpu` of a call of this step."""
        return gpu_of(tensor, self.refused, self._record)

    def refuse_unless(self, good: Tensor) -> None:
        """good: 0-d bool."""
        self.refused.bitwise_or_((~good).to(torch.int32))

    def close(self, grad_hidden: Tensor | None = None) -> Tensor:
        """Leaves with the owner whether the step counts, and gives the anchor's gradient, its report to the scaler."""
        self.owner.applied = (1 - self.refused[0]).to(torch.int64)
        if self.scale is None:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        assert self._record is not None
        faults_of(self.device).add(self._record, unless=_core.NON_FINITE)
        bad = self.refused[0] != 0
        if grad_hidden is not None:
            grad_hidden.masked_fill_(bad, torch.nan)
        return torch.where(bad, torch.inf, 0.0).to(torch.float32)


def fused_backward_on_gpu(
    owner: Owner, backward: Any, weight: Tensor, grad_hidden: Tensor | None, layers: int = 1
) -> Tensor:
    """`fused_backward` on a GPU, `backward` with `gpu=` (of several layers a list); returns the anchor's gradient."""
    step = DeviceStep(owner, weight)
    capsule = _same if layers > 1 else _capsule
    update = update_capsules(owner) if layers == 1 else [update_capsules(owner, layer) for layer in range(layers)]

    def gpu() -> Any:
        return step.gpu(weight) if layers == 1 else [step.gpu(weight) for _ in range(layers)]

    if step.scale is not None and grad_hidden is not None and grad_hidden.dtype == torch.float16:
        backward(None, grad_hidden=capsule(grad_hidden), gpu=gpu())
        step.refuse_unless(torch.isfinite(grad_hidden).all())
        backward(step.inverse, update=update, gpu=gpu())
    else:
        backward(step.inverse, grad_hidden=capsule(grad_hidden), update=update, gpu=gpu())
        if step.scale is not None and grad_hidden is not None:
            grad_hidden.mul_(step.scale)
    return step.close(grad_hidden)
