"""hashed.py -- a training step of the hashed head beside dense layers, and what its tables cost.

    python bench/hashed.py --record        all cells, some minutes; writes bench/results/hashed.json
    python bench/hashed.py --only index    the tables alone

A step of the hashed head has all in it: query, loss, gradient to hidden, the rows' update, and the rows that are hashed
again, as a mean over many steps; the others are medians. Weights and hidden states are made up: a hidden state lies
near the weights of its class. Floors, with R distinct rows and P pairs of an example and a class in a step:

    rows    3 R d 4 bytes at the memory's rate: read forward, read and written backward
    pairs   6 P d flops at the rate of products
    query   L buckets of 4 N / 2^bits bytes, from memory: what is counted is at least read
    tables  N d 4 bytes read, L N (2 written + 2 read + 4 written) bytes of keys and entries

SLIDE's figures are of other measurements: its public code and its optimised one, on two threads, at the shape of
Amazon-670K with the input layer and Adam.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import scipy.sparse as sp
import torch

import widehead
from widehead import _core
from widehead.bag import EmbeddingBag
from widehead.numpy import DenseHead, HashedHead, HashIndex

BATCH, WIDTH = 128, 128
SHAPES = {"Amazon-670K": 670_091, "1M": 1_000_000}
FEATURES, ACTIVE, LABELS = 135_909, 76, 5  # of Amazon-670K: features, those of an example, labels
SLIDE = {"SLIDE": 1.16, "SLIDE-opt": 4.1}  # steps a second


class Problem:
    """Classes with a point each; hidden states near those of their labels."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.classes = classes
        self.weight = self.rng.standard_normal((classes, WIDTH), dtype=np.float32) * np.float32(0.1)

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        target = self.rng.integers(0, self.classes, BATCH)
        noise = self.rng.standard_normal((BATCH, WIDTH), dtype=np.float32)
        return self.weight[target] * 10 + 0.5 * noise, target


def copy_into(head: Any, weight: np.ndarray) -> Any:
    head._weight[:] = weight
    return head


def mean_of(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Seconds a step, after a tenth of them to warm up."""
    for _ in range(max(2, steps // 10)):
        step()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    return {"cpu_s": (time.process_time() - cpu) / steps, "wall_s": (time.perf_counter() - wall) / steps, "runs": steps}


def torch_dense(problem: Problem) -> Callable[[], None]:
    layer = torch.nn.Linear(WIDTH, problem.classes)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(problem.weight))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def step() -> None:
        hidden, target = (torch.from_numpy(x) for x in problem.batch())
        hidden.requires_grad_(True)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(hidden), target).backward()
        optimizer.step()

    return step


def torch_sampled(problem: Problem, negatives: int) -> Callable[[], None]:
    """Shared uniform negatives, gathered by embeddings with row-sparse gradients."""
    weight = torch.nn.Embedding(problem.classes, WIDTH, sparse=True)
    with torch.no_grad():
        weight.weight.copy_(torch.from_numpy(problem.weight))
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
    correction = float(np.log(problem.classes / negatives))

    def step() -> None:
        hidden, target = (torch.from_numpy(x) for x in problem.batch())
        hidden.requires_grad_(True)
        optimizer.zero_grad()
        drawn = torch.randint(0, problem.classes, (negatives,))
        own = (hidden * weight(target)).sum(1, keepdim=True)
        other = hidden @ weight(drawn).T + correction
        torch.nn.functional.cross_entropy(torch.cat([own, other], 1), torch.zeros(BATCH, dtype=torch.int64)).backward()
        optimizer.step()

    return step


def hashed_step(head: Any, problem: Problem) -> Callable[[], None]:
    return lambda: head.step(*problem.batch(), 0.1) and None


def steps_of(shape: str, threads: int, steps: int) -> dict[str, Any]:
    """A step of each method, with the threads."""
    widehead.set_num_threads(threads)
    torch.set_num_threads(threads)
    problem = Problem(SHAPES[shape])
    methods: dict[str, dict[str, float]] = {}
    common.reset_peak()
    base = common.resident_mib()
    head = copy_into(HashedHead(WIDTH, problem.classes), problem.weight)
    methods["hashed, 1000 candidates + 1000 draws"] = mean_of(hashed_step(head, problem), steps)
    memory = {"peak_mib": common.peak_mib() - base, "tables_mib": head.statistics()["bytes"] / 2**20}
    recall = head.recall(problem.batch()[0], 10)
    rehashed = head.rehashed / head.steps
    del head
    shared = copy_into(HashedHead(WIDTH, problem.classes, shared=True, candidates=4000), problem.weight)
    methods["hashed, shared, 4000 + 1000"] = mean_of(hashed_step(shared, problem), steps)
    del shared
    sampled = copy_into(DenseHead(WIDTH, problem.classes, loss="sampled_softmax", negatives=2000), problem.weight)
    methods["dense, sampled softmax, 2000"] = mean_of(hashed_step(sampled, problem), steps)
    del sampled
    methods["torch, sampled softmax, 2000"] = mean_of(torch_sampled(problem, 2000), steps)
    dense = copy_into(DenseHead(WIDTH, problem.classes), problem.weight)
    rivals = {"dense": hashed_step(dense, problem), "torch dense": torch_dense(problem)}
    methods |= common.interleaved(rivals, 4)
    return {
        "shape": shape,
        "threads": threads,
        "methods": methods,
        "rehashed_a_step": rehashed,
        "recall@10": recall,
        **memory,
    }


def amazon(threads: int, steps: int) -> dict[str, Any]:
    """The whole model at the shape of Amazon-670K: an input layer over sparse features, the hashed head, Adam."""
    widehead.set_num_threads(threads)
    problem = Problem(SHAPES["Amazon-670K"])
    common.reset_peak()
    base = common.resident_mib()
    rng = np.random.default_rng(1)
    bag = EmbeddingBag(FEATURES, WIDTH, seed=1)
    head = copy_into(HashedHead(WIDTH, problem.classes), problem.weight)

    def step() -> None:
        columns = rng.integers(0, FEATURES, BATCH * ACTIVE)
        X = sp.csr_array(
            (np.ones(BATCH * ACTIVE, np.float32), columns, np.arange(BATCH + 1) * ACTIVE), (BATCH, FEATURES)
        )
        X.sum_duplicates()
        target = rng.integers(0, problem.classes, BATCH * LABELS)
        Y = sp.csr_array((np.ones(BATCH * LABELS, np.float32), target, np.arange(BATCH + 1) * LABELS),
                         (BATCH, problem.classes))  # fmt: skip
        Y.sum_duplicates()
        hidden = np.maximum(bag.forward(X), 0)
        _, grad = head.step(hidden, Y, 1e-3, "adam")
        bag.step(X, grad * (hidden > 0), 1e-3, "adam")

    found = mean_of(step, steps)
    return {"threads": threads, "step": found, "peak_mib": common.peak_mib() - base,
            "times": {name: 1 / found["wall_s"] / rate for name, rate in SLIDE.items()}}  # fmt: skip


def index_of(threads: int) -> dict[str, Any]:
    """Tables of 670,091 rows: build, a hundred thousand changed rows, a batch of queries."""
    widehead.set_num_threads(threads)
    problem = Problem(SHAPES["Amazon-670K"])
    out: dict[str, Any] = {"threads": threads}
    for family, hashes in (("wta", 4), ("dwta", 4), ("simhash", 12)):
        index = HashIndex(WIDTH, family=family, tables=50, hashes=hashes)
        index.build(problem.weight)
        changed = problem.rng.choice(problem.classes, 100_000, replace=False)
        moved = problem.weight.copy()
        moved[changed] += 0.003 * problem.rng.standard_normal((len(changed), WIDTH), dtype=np.float32)
        state = [problem.weight, moved]

        def update(index: HashIndex = index, state: list[np.ndarray] = state, changed: np.ndarray = changed) -> None:
            state.reverse()
            index.update(changed, state[0])

        hidden = problem.batch()[0]
        runs = {
            "build": lambda index=index: index.build(problem.weight),
            "update 100,000 rows": update,
            "query 128 x 1000": lambda index=index, hidden=hidden: index.query(hidden, 1000),
        }
        out[family] = common.interleaved(runs, 5)
        out[family]["mib"] = index.statistics()["bytes"] / 2**20
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("steps", "amazon", "index"), nargs="+", default=["steps", "amazon", "index"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--record", action="store_true", help="write bench/results/hashed.json")
    args = parser.parse_args()
    result = (common.read("hashed") if args.record else None) or {"steps": {}, "amazon": {}, "index": {}}
    for threads in args.threads:
        parts: dict[str, Callable[[], dict[str, dict[str, Any]]]] = {
            "steps": lambda: {f"{shape}, {threads}": steps_of(shape, threads, args.steps) for shape in SHAPES},  # noqa: B023
            "amazon": lambda: {str(threads): amazon(threads, args.steps)},  # noqa: B023
            "index": lambda: {str(threads): index_of(threads)},  # noqa: B023
        }
        for name in args.only:
            found = parts[name]()
            for key, value in found.items():
                print(name, key, value, flush=True)
            result[name] |= found
            if args.record:
                result["machine"] = common.machine(threads)
                common.write("hashed", result)
    print("isa", _core.current_isa())


if __name__ == "__main__":
    main()
