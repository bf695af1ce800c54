"""sparse_scale.py -- trains the sparse head at 10 million classes for real steps, on one small machine.

The model of arXiv 2306.03725 end to end: sparse features -> ReLU layer of 16,384 -> balanced sparse head, squared
hinge, fused Adam, rewiring. No public set has so many classes, so the examples are made up: a few hundred, each with
three features and a label anywhere among the classes, which the model has to learn to tell from all the others. The
steps, their memory and their time are those of any other data.

    python bench/sparse_scale.py                           10 million classes, groups of 16, some minutes
    python bench/sparse_scale.py --classes 100000000 --dtype bfloat16 --optimizer sgd --steps 3 --batch 32

Bytes that stay: a class has K weights of 4 (2) bytes, K / G inputs of 2, with Adam 2 K moments of 4, and its bias.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import common
import numpy as np
import scipy.sparse as sp

from widehead import _core
from widehead.bag import EmbeddingBag
from widehead.numpy import SparseHead

FEATURES, ACTIVE = 5_000, 3


def examples(n: int, classes: int, seed: int) -> tuple[sp.csr_array, np.ndarray]:
    """Rows of a few features each, and a class anywhere."""
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, FEATURES, (n, ACTIVE))
    indptr = np.arange(0, n * ACTIVE + 1, ACTIVE)
    X = sp.csr_array((np.ones(n * ACTIVE, np.float32), columns.ravel(), indptr), shape=(n, FEATURES))
    X.sum_duplicates()
    return X, rng.integers(0, classes, n)


def standing_bytes(args: argparse.Namespace) -> float:
    size, state = (2 if args.dtype == "bfloat16" else 4), {"sgd": 0, "momentum": 4, "adam": 8}[args.optimizer]
    return args.classes * (args.fan_in * (size + state + 2 / args.group_size) + 4 + state)


class Model:
    def __init__(self, args: argparse.Namespace) -> None:
        self.bag = EmbeddingBag(FEATURES, args.intermediate, normalise=False, dtype="float32", seed=1)
        self.head = SparseHead(
            args.intermediate,
            args.classes,
            args.fan_in,
            group_size=args.group_size,
            dtype=args.dtype,
            rewire_every=args.rewire_every,
        )
        self.options: dict[str, Any] = {"optimizer": args.optimizer}

    def hidden(self, X: sp.csr_array) -> np.ndarray:
        return np.maximum(self.bag.forward(X), 0)

    def step(self, X: sp.csr_array, y: np.ndarray, lr: float) -> float:
        hidden = self.hidden(X)
        loss, grad = self.head.step(hidden, y, lr, **self.options)
        self.bag.step(X, grad * (hidden > 0), lr, **self.options)
        return float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("classes", 10_000_000), ("fan-in", 32), ("group-size", 16), ("intermediate", 16_384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("batch", 32), ("steps", 60), ("examples", 320), ("rewire-every", 25)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--optimizer", choices=("sgd", "momentum", "adam"), default="adam")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--record", action="store_true", help="write bench/results/sparse_scale.json")
    args = parser.parse_args()
    X, y = examples(args.examples, args.classes, 0)
    began = time.perf_counter()
    model = Model(args)
    print(f"{args.classes:,} classes made in {time.perf_counter() - began:.1f} s", flush=True)
    common.reset_peak()
    losses, cpu, wall = [], [], []
    for step in range(args.steps):
        rows = (np.arange(args.batch) + step * args.batch) % args.examples
        c, w = time.process_time(), time.perf_counter()
        losses.append(model.step(X[rows], y[rows], args.lr))
        cpu.append(time.process_time() - c)
        wall.append(time.perf_counter() - w)
        print(f"step {step + 1}: loss {losses[-1]:,.3f}, {wall[-1]:.2f} s", flush=True)
    peak = common.peak_mib()
    w = time.perf_counter()
    best = np.concatenate(
        [model.head.topk(model.hidden(X[i : i + args.batch]), 5)[1] for i in range(0, args.examples, args.batch)]
    )
    query = (time.perf_counter() - w) / -(-args.examples // args.batch)
    result = {
        "machine": common.machine(_core.get_num_threads()),
        "arguments": vars(args),
        "loss": {"first": losses[0], "last": losses[-1]},
        "step": {"cpu_s": float(np.median(cpu)), "wall_s": float(np.median(wall)), "steps": args.steps},
        "top5_batch_s": query,
        "hit@1": float((best[:, 0] == y).mean()),
        "hit@5": float((best == y[:, None]).any(1).mean()),
        "peak_mib": peak,
        "head_mib": standing_bytes(args) / 2**20,
        "bag_mib": FEATURES * args.intermediate * 4 * (3 if args.optimizer == "adam" else 1) / 2**20,
    }
    print({key: value for key, value in result.items() if key != "machine"})
    if args.record:
        print(common.write("sparse_scale", result))


if __name__ == "__main__":
    main()
