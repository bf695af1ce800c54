"""exact.py -- a step of the exact head against dense SGD in PyTorch, from ten thousand classes to ten million.

python bench/exact.py                     every cell that is not in bench/results/exact.json yet; one thread
python bench/exact.py --again             all of them anew
python bench/exact.py --only d=300 hot=1  cells of these sizes: D, d, hot (targets an example), law (zipf, uniform)
python bench/exact.py --quick             one small cell, prints and writes nothing
python bench/exact.py --plot              only draws docs/exact_speed.svg from the results

A step is all of it: rows fetched, outputs, loss, gradient to hidden, update, W'W, block matrices, merges. The floor is
14 d^2 m flops, those of the published method (arXiv 1412.7091), at the rate of torch.mm beside it. Dense squared error
makes no dense targets and updates W in place: three products of D d m. The dense layers do not mind which classes are
targets: they are timed once for each D and d, between the steps of the exact head. Where one does not fit into
--memory, it is timed on the largest D that does, and scaled.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import common
import exact_report
import numpy as np
import torch
import torch.nn.functional as F

from widehead import Labels, _core
from widehead.torch import ExactHead, FusedSGD

CLASSES, FEATURES, BATCH = (10_000, 100_000, 800_000, 3_000_000, 10_000_000), (128, 300, 512), 128
HOT, LAWS = (1, 100), ("zipf", "uniform")
METHODS = ("blocked", "woodbury")
DENSE = ("torch squared error", "torch cross-entropy")
GEMM = 768  # side of the product whose rate is the machine's
ROOT = Path(__file__).resolve().parent.parent
RATE = 0.2  # 2 lr times the largest eigenvalue of the mean of h h': stable below 2
ROUNDS = 4  # of every method in turn
STEPS = {1: 144, 100: 24}  # of the exact head in a round, by targets an example
WARM = {1: 160, 100: 24}  # steps before; a level of the log fills up in 8 blocks, the next in 64
FACE_CLASSES = 100_000  # where PyTorch's face is timed, too


@dataclass(frozen=True)
class Cell:
    classes: int
    features: int
    hot: int
    law: str

    @property
    def key(self) -> str:
        return f"D={self.classes} d={self.features} hot={self.hot} law={self.law}"


def grid(memory: float) -> list[Cell]:
    """Cells whose weights fit into `memory` GiB."""
    sizes = [(D, d) for D, d in product(CLASSES, FEATURES) if D * d * 4 <= memory * 2**30]
    return [Cell(D, d, hot, law) for D, d in sizes for hot, law in product(HOT, LAWS)]


def left_out(memory: float) -> list[str]:
    """Sizes whose weights do not fit."""
    return [f"D={D} d={d}" for D, d in product(CLASSES, FEATURES) if D * d * 4 > memory * 2**30]


def selected(cells: list[Cell], words: list[str]) -> list[Cell]:
    """Those that have every size of `words`, each like "d=300" or "D=10000,100000"."""
    wanted = {name: values.split(",") for name, _, values in (word.partition("=") for word in words)}
    if unknown := set(wanted) - {"D", "d", "hot", "law"}:
        raise SystemExit(f"--only: expected D=, d=, hot= or law=, got {', '.join(sorted(unknown))}")
    return [c for c in cells if all(dict(w.split("=") for w in c.key.split())[n] in v for n, v in wanted.items())]


class Problem:
    """Hidden states whose spectrum falls, and targets of a law."""

    def __init__(self, cell: Cell, seed: int = 1000) -> None:
        self.cell, self.rng = cell, np.random.default_rng(seed)
        spread = np.arange(1, cell.features + 1) ** -0.5
        shape = (32, BATCH, cell.features)
        self.hidden = (self.rng.standard_normal(shape, np.float32) * spread).astype(np.float32)
        self.lr = RATE / 2  # the largest eigenvalue is 1
        if cell.law == "zipf":
            self.cumulative = zipf(cell.classes)

    def draw(self, n: int) -> np.ndarray:
        if self.cell.law == "uniform":
            return self.rng.integers(0, self.cell.classes, n)
        return np.minimum(np.searchsorted(self.cumulative, self.rng.random(n)), self.cell.classes - 1)

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Hidden and the targets `[BATCH * hot]`, distinct within an example."""
        hidden = self.hidden[self.rng.integers(len(self.hidden))]
        if self.cell.hot == 1:
            return hidden, self.draw(BATCH)
        wide = self.draw(BATCH * 4 * self.cell.hot).reshape(BATCH, -1)
        return hidden, np.concatenate([distinct(row, self.cell.hot) for row in wide])


@lru_cache(1)
def zipf(classes: int) -> np.ndarray:
    share = 1 / np.arange(1, classes + 1)
    return np.cumsum(share / share.sum())


def distinct(draws: np.ndarray, n: int) -> np.ndarray:
    """The first n different ones."""
    found = draws[np.sort(np.unique(draws, return_index=True)[1])][:n]
    assert len(found) == n, "too few different classes were drawn"
    return found


class Clock:
    """CPU and wall seconds of each call."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def __call__(self, run: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def mean(self) -> dict[str, float]:
        """Of the exact head: a merge of many blocks comes now and then, and a median would not see it."""
        cpu, wall = np.array(self.cpu), np.array(self.wall)
        shown = {"ms": cpu.mean(), "wall_ms": wall.mean(), "median_ms": np.median(cpu), "max_ms": cpu.max()}
        return {name: 1e3 * float(x) for name, x in shown.items()} | {"steps": len(cpu)}

    def median(self) -> dict[str, float]:
        cpu, wall = self.cpu[1:] or self.cpu, self.wall[1:] or self.wall
        return {"ms": 1e3 * float(np.median(cpu)), "wall_ms": 1e3 * float(np.median(wall)), "steps": len(cpu)}


class Exact:
    """The core beside a weight matrix of its own."""

    def __init__(self, weight: np.ndarray, method: str) -> None:
        self.weight, self.state = weight, _core.ExactState(weight, None, method=method)
        self.losses: np.ndarray = np.zeros(BATCH)

    def step(self, hidden: np.ndarray, target: np.ndarray, lr: float) -> None:
        n, m = len(target), len(hidden)
        labels = {"indptr": np.arange(0, n + 1, n // m), "indices": target}
        A, by_A = np.empty(n), np.empty(n)
        q, s, by_q, by_s, losses = (np.empty(m) for _ in range(5))
        grad_hidden = np.empty_like(hidden)
        batch = self.state.forward(hidden=hidden, **labels, train=True, A=A, q=q, s=s)
        _core.spherical_loss(
            loss="squared_error", eps=1.0, a=1.0, b=1.0, n_classes=len(self.weight), **labels, A=A, q=q, s=s,
            losses=losses, grad_A=by_A, grad_q=by_q, grad_s=by_s,
        )  # fmt: skip
        by_A /= m
        by_q /= m
        self.state.backward(batch, grad_A=by_A, grad_q=by_q, grad_s=by_s, grad_hidden=grad_hidden)
        self.state.step(lr=lr)
        self.losses = losses


class Face:
    """The same through PyTorch: module, autograd, optimiser."""

    def __init__(self, cell: Cell) -> None:
        self.head = ExactHead(cell.features, cell.classes, seed=1)
        self.optimizer = FusedSGD([self.head], lr=1.0)

    def step(self, hidden: np.ndarray, target: np.ndarray, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        x = torch.from_numpy(hidden).requires_grad_()
        labels: Any = torch.from_numpy(target)
        if len(target) > len(hidden):
            indptr = np.arange(0, len(target) + 1, len(target) // len(hidden))
            labels = Labels(torch.from_numpy(indptr), labels, None, self.head.n_classes)
        self.head(x, labels).loss.backward()
        self.optimizer.step()


class Dense:
    """PyTorch on the whole matrix, which both ways share."""

    def __init__(self, cell: Cell) -> None:
        self.weight = torch.from_numpy(weights(cell)).requires_grad_()
        self.optimizer = torch.optim.SGD([self.weight], lr=1e-3)

    def squared(self, hidden: np.ndarray, target: np.ndarray, lr: float) -> None:
        h, index = torch.from_numpy(hidden), torch.from_numpy(target.reshape(len(hidden), -1))
        with torch.no_grad():
            output = h @ self.weight.T
            output.scatter_add_(1, index, torch.full(index.shape, -1.0))
            torch.mm(output, self.weight)  # the gradient to hidden, but for a factor
            self.weight.addmm_(output.T, h, alpha=-2 * lr / len(hidden))

    def cross_entropy(self, hidden: np.ndarray, target: np.ndarray, lr: float) -> None:
        x = torch.from_numpy(hidden).requires_grad_()
        first = torch.from_numpy(target.reshape(len(hidden), -1)[:, 0].copy())
        F.cross_entropy(F.linear(x, self.weight), first).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    def gib(classes: int, features: int) -> float:
        """Weights, their gradient, logits and two more of their size."""
        return (2 * features + 3 * BATCH) * classes * 4 / 2**30


def weights(cell: Cell) -> np.ndarray:
    out = np.empty((cell.classes, cell.features), np.float32)
    bound = cell.features**-0.5
    _core.init_uniform(out=out, low=-bound, high=bound, seed=1)
    return out


def gemm() -> Callable[[], object]:
    """A product of a size that suits the processor."""
    a, b, c = (torch.randn(GEMM, GEMM) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def run_group(cells: list[Cell], memory: float) -> dict[str, Any]:
    """Cells of one D and d, in a process of their own; the results by key."""
    _core.set_num_threads(1)
    torch.set_num_threads(1)
    D, d = cells[0].classes, cells[0].features
    size = D * d * 4 / 2**30
    # Both methods in turn, each with its weights, or, where that is too much, one after the other.
    passes: list[tuple[str, ...]] = [METHODS] if 2 * size <= memory else [(method,) for method in METHODS]
    found: dict[str, Any] = {c.key: {"cell": vars(c), "methods": {}, "load": []} for c in cells}
    room = memory - size * len(passes[0])
    fits = [n for n in CLASSES if n <= D and Dense.gib(n, d) <= room] or [CLASSES[0]]
    for at, methods in enumerate(passes):
        heads: dict[str, Exact | Face] = {}
        extra = {}
        for method in methods:
            matrix = weights(cells[0])
            before = common.resident_mib()
            heads[method] = Exact(matrix, method)
            warm(heads[method], cells[0])
            extra[method] = common.resident_mib() - before
            del matrix
        for cell in cells:
            first = at == 0 and cell is cells[0]
            entry = run_cell(cell, heads, Cell(fits[-1], d, 1, cell.law) if first else None)
            for method in methods:
                entry["methods"][method]["extra_mib"] = extra[method]
            found[cell.key]["methods"] |= entry["methods"]
            found[cell.key]["load"] += entry["load"]
        heads.clear()  # before the next pass takes as much
        gc.collect()
    return found


def warm(head: Exact | Face, cell: Cell) -> None:
    problem = Problem(cell)
    for _ in range(WARM[cell.hot]):
        head.step(*problem.batch(), problem.lr)


def run_cell(cell: Cell, heads: dict[str, Exact | Face], dense_cell: Cell | None) -> dict[str, Any]:
    """The heads on the same batches, in turns with the peers."""
    heads = dict(heads)
    if cell.classes == FACE_CLASSES and cell.law == "zipf":
        heads["torch face"] = Face(cell)
    for head in heads.values():
        warm(head, cell)
    clocks = {name: Clock() for name in (*heads, "gemm", *(DENSE if dense_cell else ()))}
    dense = Dense(dense_cell) if dense_cell else None
    multiply, load = gemm(), [os.getloadavg()[0]]
    for round_ in range(ROUNDS):
        gc.collect()
        for name, head in heads.items():
            problem = Problem(cell, round_)
            for _ in range(STEPS[cell.hot]):
                clocks[name](partial(head.step, *problem.batch(), problem.lr))
            for _ in range(10):
                clocks["gemm"](multiply)
        if dense and dense_cell:
            problem = Problem(dense_cell)
            for name, step in zip(DENSE, (dense.squared, dense.cross_entropy), strict=True):
                clocks[name](partial(step, *problem.batch(), problem.lr))
    load.append(os.getloadavg()[0])
    for name, head in heads.items():
        if isinstance(head, Exact):
            assert np.isfinite(head.losses).all(), f"{name}: the loss is not finite"
    methods = {name: clocks[name].mean() for name in heads} | {"gemm": clocks["gemm"].median()}
    rate = 2 * GEMM**3 / methods["gemm"]["ms"] * 1e3
    for name in heads:
        floor = 1e3 * 14 * cell.features**2 * BATCH / rate
        methods[name] |= {"floor_ms": floor, "over_floor": methods[name]["ms"] / floor}
    for name in DENSE if dense_cell else ():
        assert dense_cell is not None
        times = clocks[name].median()
        scale = cell.classes / dense_cell.classes
        for key in ("ms", "wall_ms"):
            times[key] *= scale
        methods[name] = times | {"timed_classes": dense_cell.classes}
    return {"methods": methods, "load": [round(x, 2) for x in load]}


def groups(cells: list[Cell]) -> list[list[Cell]]:
    """By D and d, in their order."""
    by_size: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        by_size.setdefault((cell.classes, cell.features), []).append(cell)
    return list(by_size.values())


def describe(key: str, entry: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {m['ms']:,.2f}" for name, m in entry["methods"].items())
    over = ", ".join(f"{entry['methods'][m]['over_floor']:.2f}" for m in METHODS)
    return f"{key}: {times} ms CPU; over the floor {over}; load {entry['load'][0]} to {entry['load'][-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group:
        print(json.dumps(run_group([Cell(**c) for c in json.loads(args.group)], args.memory)))
        return
    result: dict[str, Any] = common.read("exact") or {"cells": {}}
    if args.plot:
        exact_report.figure(result, ROOT / "docs" / "exact_speed.svg")
        return
    cells = selected(grid(args.memory), args.only)
    if args.quick:
        cells, args.again = [Cell(10_000, 128, 1, "zipf")], True
    cells = [c for c in cells if args.again or c.key not in result["cells"]]
    for group in groups(cells):
        found = common.in_subprocess(
            __file__, "--memory", str(args.memory), "--group", json.dumps([vars(c) for c in group])
        )
        if "failed" in found:
            raise SystemExit(f"{group[0].key} and what goes with it: {found['failed']}")
        machine = common.machine(1)
        for key, entry in found.items():
            print(describe(key, entry), flush=True)
            # The peers' times stay with the first cell of their D and d.
            result["cells"][key] = entry | {"machine": machine}
        if not args.quick:
            result |= {"batch": BATCH, "rate": RATE, "memory_gib": args.memory, "left_out": left_out(args.memory)}
            order = {c.key: at for at, c in enumerate(grid(np.inf))}
            result["cells"] = dict(sorted(result["cells"].items(), key=lambda item: order.get(item[0], -1)))
            common.write("exact", result)
    if not args.quick and cells:
        exact_report.figure(result, ROOT / "docs" / "exact_speed.svg")


if __name__ == "__main__":
    main()
