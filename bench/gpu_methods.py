"""gpu_methods.py -- the methods of the GPU benchmark: widehead's two modes and its peers, on the same weights, with an
exact reference for all of them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import gpu_cells as cells
import torch
import torch.nn.functional as F
from gpu_device import Device, Mark
from torch import Tensor, nn

from widehead.torch import DenseHead, FusedSGD

LR = 1e-3
ROWS = 64  # rows of the gradient to hidden that are held against the reference
PACKAGES = ("torch", "triton", "cut-cross-entropy", "liger-kernel", "numpy")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Inputs of one cell; the methods share the weights' memory, for three copies of the largest would not fit."""

    weight: Tensor  # [D, d] bfloat16
    hidden: Tensor  # [B, d] bfloat16
    target: Tensor  # [B] int64


class Result(NamedTuple):
    loss: Tensor
    grad_hidden: Tensor


class Unavailable(Exception):
    """A peer that is not there; the message says why."""


def make_case(cell: cells.Cell, device: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Logits of about unit variance."""
    generator = torch.Generator(device).manual_seed(cell.classes + cell.features + cell.batch)
    weight = torch.empty(cell.classes, cell.features, dtype=dtype, device=device)
    weight.normal_(std=cell.features**-0.5, generator=generator)
    hidden = torch.randn(cell.batch, cell.features, dtype=dtype, device=device, generator=generator)
    return Case(weight, hidden, torch.randint(cell.classes, (cell.batch,), device=device, generator=generator))


def build(name: str, case: Case) -> Callable[[Mark], Result]:
    """A step of the method: loss, both gradients, the weights' update. Marks "gradient" (not when fused) and "step".

    Raises:
        Unavailable: the peer is not installed here.
    """
    if name == cells.FUSED:
        return _fused(case)
    weight = nn.Parameter(case.weight.detach())
    hidden = case.hidden.detach().requires_grad_()
    loss_of = _head_loss(weight) if name == cells.PLAIN else PEERS[name]()
    optimizer = torch.optim.SGD([weight], lr=LR, fused=True)

    def step(mark: Mark) -> Result:
        loss = loss_of(hidden, weight, case.target)
        loss.backward()
        mark("gradient")
        optimizer.step()
        mark("step")
        weight.grad = None
        grad, hidden.grad = hidden.grad, None
        return Result(loss.detach(), grad)

    return step


def _head_over(weight: nn.Parameter) -> DenseHead:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return DenseHead.from_linear(linear)


def _head_loss(weight: nn.Parameter) -> Loss:
    head = _head_over(weight)
    return lambda hidden, _, target: head(hidden, target).loss


def _fused(case: Case) -> Callable[[Mark], Result]:
    head = _head_over(nn.Parameter(case.weight.detach()))
    hidden = case.hidden.detach().requires_grad_()
    optimizer = FusedSGD(head, lr=LR, rounding="stochastic", seed=1)

    def step(mark: Mark) -> Result:
        loss = head(hidden, case.target).loss
        loss.backward()
        optimizer.step()
        mark("step")
        grad, hidden.grad = hidden.grad, None
        return Result(loss.detach(), grad)

    return step


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _compiled() -> Loss:
    torch._dynamo.reset()  # else the eighth shape falls back to eager
    return torch.compile(_eager, fullgraph=True, dynamic=False)


def _chunked() -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"not in PyTorch {torch.__version__}")
    return F.linear_cross_entropy


def _liger() -> Loss:
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target: loss(weight, hidden, target)


def _cce(filter_eps: str | None) -> Loss:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    return lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target, filter_eps=filter_eps)


PEERS: dict[str, Callable[[], Loss]] = {
    cells.TORCH: lambda: _eager,
    cells.COMPILED: _compiled,
    cells.CHUNKED: _chunked,
    cells.LIGER: _liger,
    # Exact, as all the others are; then as it comes, where tiles of small probabilities have no gradient.
    cells.CCE: lambda: _cce(None),
    cells.CCE_FILTERED: lambda: _cce("high"),
}


@torch.no_grad()
def reference(case: Case, chunk_bytes: int = 2**30) -> Result:
    """Mean loss, and the gradient to the first rows of hidden, by a float32 log-sum-exp over chunks of classes."""
    classes, batch = case.weight.shape[0], case.hidden.shape[0]
    step = max(1, chunk_bytes // (4 * max(batch, case.hidden.shape[1])))
    lse = torch.full((batch,), -torch.inf, device=case.hidden.device)
    for at in range(0, classes, step):
        logits = F.linear(case.hidden, case.weight[at : at + step]).float()
        lse = torch.logaddexp(lse, torch.logsumexp(logits, 1))
        del logits
    picked = (case.hidden.float() * case.weight[case.target].float()).sum(1)
    rows = case.hidden[:ROWS].float()
    grad = -case.weight[case.target[:ROWS]].float()
    for at in range(0, classes, step):
        weight = case.weight[at : at + step].float()
        grad += torch.exp(rows @ weight.T - lse[:ROWS, None]) @ weight
    return Result((lse - picked).mean(), grad / batch)


def errors(result: Result, expected: Result) -> dict[str, float]:
    """Relative errors of loss and gradient."""
    return {
        "loss_error": float((result.loss.float() - expected.loss).abs() / expected.loss.abs()),
        "grad_error": relative(result.grad_hidden[:ROWS], expected.grad_hidden),
    }


def exact(errors: dict[str, float]) -> bool:
    """Within what bfloat16 explains; never with NaN."""
    return errors["loss_error"] <= 1e-2 and errors["grad_error"] <= 5e-2


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def agreement(device: str) -> dict[str, Any]:
    """widehead against PyTorch in float32 on a small case: loss, gradients, and the change that a fused step makes."""
    found: dict[str, Any] = {"agrees": True}
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
        case = make_case(cells.Cell(5003, 96, 67), device, dtype)
        weight, hidden = (t.float().clone().requires_grad_() for t in case[:2])
        expected = F.cross_entropy(F.linear(hidden, weight), case.target)
        expected.backward()
        own = nn.Parameter(case.weight.clone())
        mine = case.hidden.clone().requires_grad_()
        loss = _head_over(own)(mine, case.target).loss
        loss.backward()
        head = _head_over(nn.Parameter(case.weight.clone()))
        optimizer = FusedSGD(head, lr=50.0, rounding="stochastic", seed=1)  # the step outweighs bfloat16's rounding
        head(case.hidden.clone().requires_grad_(), case.target).loss.backward()
        optimizer.step()
        errors = {
            "loss": relative(loss.detach(), expected.detach()),
            "grad_hidden": relative(mine.grad, hidden.grad),
            "grad_weight": relative(own.grad, weight.grad),
            "fused_step": relative(head.weight.detach().float() - weight.detach(), -50.0 * weight.grad),
        }
        found[str(dtype).removeprefix("torch.")] = errors
        found["agrees"] &= all(error <= tolerance for error in errors.values())  # never so with NaN
    return found


def about(device: Device) -> dict[str, Any]:
    """What a figure means nothing without."""
    return {"machine": {**common.machine(), "versions": {n: version(n) for n in PACKAGES}}, "gpu": device.describe()}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
