"""sparse_gpu.py -- a step of the sparse head on a GPU against other ways to do it: squared hinge, all gradients, SGD.

    python bench/sparse.py --device cuda                 the grid, as far as 60 seconds go
    python bench/sparse.py --device cuda --rehearse      the same path on the CPU, tiny sizes: no measurement

Peers: kernels with a thread for each example and class, and atomic additions (scatter_baseline.cu); PyTorch's
embedding_bag over the transposed hidden states; and, as what a sparse layer takes the place of, dense layers of 768
features. Times are CUDA events, medians of interleaved runs, the cache flushed before each; memory is the peak beyond
weights and inputs. Every method's loss and gradient are held against a float32 reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import common
import dense_gpu
import gpu_cells
import gpu_device
import gpu_methods
import scatter
import sparse_cells as cells
import torch
import torch.nn.functional as F
from gpu_cells import Budget
from gpu_device import Device, Mark
from gpu_methods import Result
from sparse_cells import SparseCell
from torch import Tensor, nn

from widehead import Labels
from widehead.torch import DenseHead, FusedSGD, SparseHead

LR = 1e-5


class Case(NamedTuple):
    """Inputs of one cell; the methods share the weights' memory."""

    cell: SparseCell
    weight: Tensor  # [D, K] or, dense, [D, H]
    index: Tensor | None  # [groups, K]
    bias: Tensor  # [D] float32
    hidden: Tensor  # [B, H] of the weights' type, not negative
    labels: Tensor  # [B, LABELS] int64


def make_case(cell: SparseCell, device: str) -> Case:
    """Logits of about unit variance around -1, where the biases begin."""
    dtype = getattr(torch, cell.dtype)
    generator = torch.Generator(device).manual_seed(cell.features + cell.batch)
    inputs = cell.fan_in or cell.features
    weight = torch.empty(cell.classes, inputs, dtype=dtype, device=device)
    weight.normal_(std=inputs**-0.5, generator=generator)
    index = None
    if cell.fan_in:
        index = SparseHead(cell.features, cell.classes, cell.fan_in, group_size=cell.group, device=device).index
    hidden = torch.randn(cell.batch, cell.features, device=device, generator=generator).relu().to(dtype)
    labels = torch.randint(cell.classes, (cell.batch, cells.LABELS), device=device, generator=generator)
    labels = (labels[:, :1] + torch.arange(cells.LABELS, device=device) * 31) % cell.classes  # distinct
    return Case(cell, weight, index, torch.full((cell.classes,), -1.0, device=device), hidden, labels)


def targets(case: Case) -> Labels:
    rows, each = case.labels.shape
    indptr = torch.arange(0, rows * each + 1, each, device=case.labels.device)
    return Labels(indptr, case.labels.reshape(-1), None, case.cell.classes)


def hinge(z: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of the squared hinge over all classes; z `[B, D]`."""
    own = z.gather(1, labels).float()
    others = F.relu(1 + z).square().sum(dtype=torch.float32) - F.relu(1 + own).square().sum()
    return (others + F.relu(1 - own).square().sum()) / len(z)


@torch.no_grad()
def reference(case: Case, chunk_bytes: int = 2**30) -> Result:
    """Loss, and the gradient to hidden, in float32 over chunks of classes."""
    cell, hidden = case.cell, case.hidden.float()
    grad, loss = torch.zeros_like(hidden), torch.zeros((), dtype=torch.float64, device=hidden.device)
    inputs = cell.fan_in or cell.features
    step = max(cell.group, chunk_bytes // (4 * cell.batch * (inputs if cell.fan_in else 1)) // cell.group * cell.group)
    for at in range(0, cell.classes, step):
        weight = case.weight[at : at + step].float()
        bias = case.bias[at : at + step]
        index = None
        if case.index is None:
            z = F.linear(hidden, weight, bias)
        else:
            rows = case.index[at // cell.group : -(-(at + step) // cell.group)].long()
            index = rows.repeat_interleave(cell.group, 0)[: len(weight)]
            z = (hidden[:, index.reshape(-1)].reshape(len(hidden), *index.shape) * weight).sum(-1) + bias
        positive = torch.zeros_like(z, dtype=torch.bool)
        row, label = (case.labels - at).ge(0).logical_and(case.labels - at < len(weight)).nonzero(as_tuple=True)
        positive[row, case.labels[row, label] - at] = True
        sign = torch.where(positive, -1.0, 1.0)
        miss = F.relu(1 + sign * z)
        loss += miss.double().square().sum()
        g = 2 * sign * miss / len(hidden)
        if index is None:
            grad += g @ weight
        else:
            grad.index_add_(1, index.reshape(-1), (g[:, :, None] * weight).reshape(len(hidden), -1))
    return Result((loss / len(hidden)).float(), grad)


def build(name: str, case: Case) -> Callable[[Mark], Result]:
    """A step of the method: loss, all gradients, SGD. Marks "gradient" (not when fused) and "step".

    Raises:
        Unavailable: what it needs is not here.
    """
    if name == cells.SCATTER:
        return _scatter(case)
    if name in (cells.BAGS, cells.TORCH_DENSE):
        return _plain(case, _bags if name == cells.BAGS else _linear)
    return _head(case, name != cells.PLAIN)


def _head(case: Case, fused: bool) -> Callable[[Mark], Result]:
    cell = case.cell
    options: dict[str, Any] = {"loss": "squared_hinge", "dtype": case.weight.dtype, "device": "meta"}
    head: SparseHead | DenseHead
    if case.index is None:
        head = DenseHead(cell.features, cell.classes, **options)
    else:
        head = SparseHead(cell.features, cell.classes, cell.fan_in, group_size=cell.group, rewire_every=0, **options)
        head.index = case.index
    head.weight = nn.Parameter(case.weight.detach())
    head.bias = nn.Parameter(case.bias.clone())
    hidden, target = case.hidden.detach().requires_grad_(), targets(case)
    optimizer: torch.optim.Optimizer
    if fused:
        optimizer = FusedSGD(head, lr=LR, rounding="stochastic", seed=1)
    else:
        optimizer = torch.optim.SGD(head.parameters(), lr=LR, fused=True)

    def step(mark: Mark) -> Result:
        loss = head(hidden, target).loss
        loss.backward()
        if not fused:
            mark("gradient")
        optimizer.step()
        mark("step")
        head.weight.grad = head.bias.grad = None
        grad, hidden.grad = hidden.grad, None
        return Result(loss.detach(), grad)

    return step


def _plain(case: Case, logits_of: Callable[..., Callable[[Tensor, Tensor], Tensor]]) -> Callable[[Mark], Result]:
    weight, bias = nn.Parameter(case.weight.detach()), nn.Parameter(case.bias.clone())
    hidden = case.hidden.detach().requires_grad_()
    logits = logits_of(case)
    optimizer = torch.optim.SGD([weight, bias], lr=LR, fused=True)

    def step(mark: Mark) -> Result:
        loss = hinge(logits(hidden, weight) + bias, case.labels)
        loss.backward()
        mark("gradient")
        optimizer.step()
        mark("step")
        weight.grad = bias.grad = None
        grad, hidden.grad = hidden.grad, None
        return Result(loss.detach(), grad)

    return step


def _linear(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return F.linear


def _bags(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Each class a bag of rows of the transposed hidden states."""
    assert case.index is not None
    index = case.index.int()

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.embedding_bag(index, hidden.T.contiguous(), per_sample_weights=weight, mode="sum").T

    return logits


def _scatter(case: Case) -> Callable[[Mark], Result]:
    assert case.index is not None
    index = case.index
    try:
        scatter.library(case.hidden.is_cuda)
    except scatter.Missing as error:
        raise gpu_methods.Unavailable(f"not compiled: {error}") from error
    bias = case.bias.clone()

    @torch.no_grad()
    def step(mark: Mark) -> Result:
        z = scatter.logits(case.hidden, case.weight, index, bias)
        loss = hinge(z, case.labels)
        own = 1 - z.gather(1, case.labels)
        g = z.add_(1).relu_().mul_(2 / len(z))  # in the logits' place
        g.scatter_(1, case.labels, -2 / len(z) * own.relu())
        grad_hidden, grad_weight = scatter.gradients(case.hidden, case.weight, index, g)
        grad_bias = g.sum(0)
        mark("gradient")
        case.weight.add_(grad_weight, alpha=-LR)
        bias.add_(grad_bias, alpha=-LR)
        mark("step")
        return Result(loss, grad_hidden)

    return step


def rewiring(device: Device, case: Case) -> dict[str, float]:
    """Milliseconds of moving a tenth of the connections, and of drawing all inputs anew; medians of five."""
    cell = case.cell
    head = SparseHead(
        cell.features, cell.classes, cell.fan_in, group_size=cell.group, dtype=case.weight.dtype, device=device.name
    )
    runs = {
        "rewire": lambda mark: (head.rewire(step=1), mark("step")),
        "draw": lambda mark: (head._draw(head.index, 0), mark("step")),
    }
    found = {}
    for name, run in runs.items():
        run(gpu_device.ignore)
        laps = []
        for _ in range(5):
            device.settle()
            laps.append(device.time(run)["step"])
        found[f"{name}_ms"] = gpu_cells.summary({"step": laps})["step_ms"]
    return found


def measure(
    device: Device, cell: SparseCell, names: list[str], budget: Budget, record: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fills `record`, saving after every method."""
    device.release()
    case = make_case(cell, device.name)
    expected = reference(case)
    record["reference_loss"] = float(expected.loss)
    fast: dict[str, Any] = {}
    for name in names:
        if not budget.allows(1.0):
            record["methods"][name] = {"failed": "no time left"}
            continue
        run, found = dense_gpu.start(device, name, case, expected, build)
        record["methods"][name] = found
        if run is not None and found["second_s"] <= dense_gpu.SLOW:
            fast[name] = run
        del run
        save()
        if not device.usable():
            raise SystemExit(dense_gpu.LOST)
    dense_gpu.interleave(device, fast, budget, record, save)
    if cell.fan_in and budget.allows(1.0):
        try:
            record |= rewiring(device, case)
        except Exception as error:
            record["rewiring_failed"] = gpu_device.failure(error)


def run_grid(args: argparse.Namespace) -> int:
    budget = Budget(args.budget)
    device = gpu_device.make_device(args.rehearse)
    name = "sparse_gpu_rehearsal" if args.rehearse else "sparse_gpu"
    result: dict[str, Any] = {**gpu_methods.about(device), "ceilings": device.ceilings(), "cells": [], "left_out": []}

    def save() -> None:
        common.write(name, result)

    for cell in cells.rehearsal() if args.rehearse else cells.grid():
        if not budget.allows(3.0):
            result["left_out"].append(cell.label)
            continue
        record: dict[str, Any] = {**asdict(cell), "floors": cells.floors(cell, result["ceilings"]), "methods": {}}
        result["cells"].append(record)
        measure(device, cell, cells.methods_of(cell, args.methods), budget, record, save)
        save()
        print(line(cell, record), flush=True)
    save()
    print(f"written: {common.RESULTS / name}.json")
    return 0 if any(wrong_or_right(record) for record in result["cells"]) else 1


def wrong_or_right(record: dict[str, Any]) -> bool:
    """Whether this cell has a figure of ours, and it is right."""
    found = [record["methods"].get(name, {}) for name in (cells.FUSED, cells.PLAIN, cells.DENSE)]
    return any(method.get("exact") for method in found)


def line(cell: SparseCell, record: dict[str, Any]) -> str:
    methods = record["methods"].items()
    shown = [f"{name} {m['step_ms']:.2f}" if "step_ms" in m else f"{name}: {m['failed']}" for name, m in methods]
    more = f"; rewiring {record['rewire_ms']:.2f}, drawing {record['draw_ms']:.2f}" if "rewire_ms" in record else ""
    return f"{cell.label}: {'; '.join(shown)}{more} (ms a step; floor {record['floors']['floor_s'] * 1e3:.2f})"


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sparse.py --device cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the grid")
    parser.add_argument("--methods", nargs="+", choices=cells.METHODS, default=cells.METHODS)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny sizes: tries the script")
    raise SystemExit(run_grid(parser.parse_args(words)))
