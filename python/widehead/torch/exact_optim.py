"""exact_optim.py -- what the known norms of an exact head's gradient allow: RMSprop by column, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from widehead._core import NonFiniteError

from ._device import on_gpu
from ._head import Head, check
from ._owner import Owner
from .exact import ExactHead
from .optim import FusedOptimizer, exact_step


class FusedRMSprop(FusedOptimizer):
    """RMSprop of an `ExactHead` with one second moment a column of the weights, which is known exactly.

    v = alpha v + (1 - alpha) mean over classes of g^2, `[in_features]` and one for the biases; g becomes g / (sqrt(v) +
    eps), then weight_decay w is added to it; with momentum m = momentum m + g, g = m; w -= lr g.

    Args:
        heads: exact heads; as of `FusedSGD`.
        lr, alpha, eps, momentum: as in torch.optim.RMSprop, whose v has a number a weight.
        weight_decay: not divided by sqrt(v): an exact step has no place for that.
        grad_scaler: see `FusedSGD`, and its errors.
    """

    takes_deferred = True

    def __init__(
        self,
        heads: Head | Iterable[Head] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        grad_scaler: Any | None = None,
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(heads, defaults, None, grad_scaler, 0)

    def _check_group(self, group: dict[str, Any], heads: list[Head]) -> None:
        super()._check_group(group, heads)
        for head in heads:
            check(head.deferred, f"heads: FusedRMSprop trains an ExactHead, got a {type(head).__name__}")
        check(0 <= group["momentum"] < 1, f"momentum: expected at least 0 and below 1, got {group['momentum']}")
        check(0 <= group["alpha"] < 1, f"alpha: expected at least 0 and below 1, got {group['alpha']}")
        check(0 < group["eps"] < math.inf, f"eps: expected a positive number, got {group['eps']}")

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _take_step(self, owner: Owner, refused: Tensor | None) -> Tensor | int | None:
        head, group = owner.head, self.param_groups[owner.group_index]
        assert isinstance(head, ExactHead)
        columns, state = head.grad_columns(), self._state_of(head._stored())
        before = state.get("square_avg")
        if before is None:
            before = torch.zeros_like(columns)
        after = group["alpha"] * before + (1 - group["alpha"]) * columns
        scale = 1.0 / (after.sqrt() + group["eps"])
        applied = head.take_step(**exact_step(group, head._stored()), column_scale=scale, refused=refused)
        if isinstance(applied, Tensor):  # in place: a captured graph has its address
            state["square_avg"] = before.copy_(torch.where(applied != 0, after, before))
        elif applied:
            state["square_avg"] = after
        return applied


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    heads: ExactHead | Iterable[ExactHead],
    max_norm: float,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over the gradients of a backbone and those of exact heads, which do not exist.

    Args:
        parameters: of the backbone; those without a gradient, such as the heads' own, play no part. Under a GradScaler
            call its unscale_() for them first; the heads' gradients are unscaled already.
        heads: exact heads.
        max_norm: if the norm over all of them is larger, all gradients are multiplied by max_norm / (norm + 1e-6).
        error_if_nonfinite: as torch's.

    Returns:
        the norm before, 0-d float64.

    Raises:
        NonFiniteError: the norm is NaN or infinite, with error_if_nonfinite, or with a head that no GradScaler guards;
            on a GPU that comes later, from step() or `head.check()`, and the head's step is refused.
    """
    exact = [heads] if isinstance(heads, Head) else list(heads)
    check(
        all(isinstance(head, ExactHead) for head in exact),
        f"heads: expected exact heads, got {[type(head).__name__ for head in exact]}",
    )
    check(float(max_norm) >= 0, f"max_norm: expected at least 0, got {max_norm}")
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in given if p.grad is not None]
    place = next((w.device for w in (head._stored() for head in exact) if on_gpu(w)), torch.device("cpu"))
    waits = error_if_nonfinite or not any(on_gpu(head._stored()) for head in exact)
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(g.detach()).double() for g in grads] + [head.grad_norm() for head in exact]
        there = [norm.to(place, non_blocking=True) for norm in norms]
        total = torch.linalg.vector_norm(torch.stack(there)) if there else torch.zeros((), dtype=torch.float64)
        if waits and not torch.isfinite(total):
            if error_if_nonfinite:
                raise NonFiniteError(f"clip_grad_norm_: the norm of the gradients is {float(total)}")
            for head in exact:
                head.spoil_grad(total)
            return total
        factor = (float(max_norm) / (total + 1e-6)).clamp(max=1.0)
        if not waits:
            for head in exact:
                head.spoil_grad(total)
            factor = torch.where(torch.isfinite(total), factor, 1.0)
        for g in grads:
            g.mul_(factor.to(g.device, non_blocking=True))
        for head in exact:
            head.scale_grad(factor)
    return total
