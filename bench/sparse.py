"""sparse.py -- a step of the sparse head at 670,091 classes, fan-in 32, batch 32, against PyTorch's ways.

Floor: a connection is 2 flops an example each for logits, dW and dX, 4.1 GFLOP a step in all, far below what the
processor does in the time; what binds is a row of 32 examples (128 bytes) read twice for each connection, and one read
and written: L K 32 4 bytes = 2.7 GB a pass, four passes, from the second-level cache as far as hidden fits there. A
shared pattern (G = 16) reads them once a group.

    python bench/sparse.py                all, some minutes; one thread and two
    python bench/sparse.py --quick        H = 16384 on one thread
    python bench/sparse.py --device cuda  on a GPU: sparse_gpu.py, which has options of its own
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import sparse_gpu
import torch
import torch.nn.functional as F

from widehead import _core

CLASSES, FAN_IN, BATCH, LABELS = 670_091, 32, 32, 5
DENSE_FEATURES = 768
CASES = [(h, g, t) for h in (1024, 16384, 32768, 65536) for g in (1, 16) for t in ("float32", "bfloat16")]


def problem(features: int, group: int, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    index = np.zeros((-(-CLASSES // group), FAN_IN), np.uint16)
    _core.draw_index(index=index, in_features=features, seed=1)
    weight = np.empty((CLASSES, FAN_IN), np.uint16 if dtype == "bfloat16" else np.float32)
    _core.init_uniform(out=weight, low=-0.2, high=0.2, seed=1)
    hidden = np.maximum(rng.standard_normal((BATCH, features), dtype=np.float32), 0)
    bias = np.full(CLASSES, -1.0, np.float32)
    labels = np.concatenate([rng.choice(CLASSES, LABELS, replace=False) for _ in range(BATCH)])
    layer = {"hidden": hidden, "weight": weight, "index": index, "bias": bias, "group_size": group}
    return layer, {"indptr": np.arange(0, BATCH * LABELS + 1, LABELS), "indices": labels, "values": None}


def ours(features: int, group: int, dtype: str) -> dict[str, Callable[[], object]]:
    layer, target = problem(features, group, dtype)
    losses, output = np.empty(BATCH, np.float32), np.empty(BATCH, np.float32)
    grad_hidden, scale = np.empty_like(layer["hidden"]), np.full(BATCH, 1 / BATCH, np.float32)
    best, classes = np.empty((BATCH, 5), np.float32), np.empty((BATCH, 5), np.int64)
    state = {name: np.zeros((CLASSES, FAN_IN), np.float32) for name in ("first", "second")}
    state |= {f"bias_{name}": np.zeros(CLASSES, np.float32) for name in ("first", "second")}

    def step(update: dict[str, Any]) -> None:
        _core.sparse_backward(
            **layer, **target, loss="squared_hinge", lse=None, grad_losses=scale, grad_hidden=grad_hidden,
            losses=losses, output=output, update={"lr": 1e-5, "step": 1, **update},
        )  # fmt: skip

    return {
        "forward": lambda: _core.sparse_forward(
            **layer, **target, loss="squared_hinge", losses=losses, output=output, lse=None
        ),
        "top 5": lambda: _core.sparse_topk(**layer, k=5, scores=best, classes=classes),
        "fused SGD": lambda: step({"optimizer": "sgd"}),
        "fused Adam": lambda: step({"optimizer": "adam", **state}),
    }


def dense_step() -> Callable[[], object]:
    """Logits, squared hinge and both gradients of a dense layer of 768 features in PyTorch, and plain SGD."""
    weight = (torch.randn(CLASSES, DENSE_FEATURES) / DENSE_FEATURES**0.5).requires_grad_()
    hidden = torch.randn(BATCH, DENSE_FEATURES, requires_grad=True)
    sign = torch.full((BATCH, CLASSES), -1.0)
    sign[torch.arange(BATCH).repeat_interleave(LABELS), torch.randint(0, CLASSES, (BATCH * LABELS,))] = 1.0
    optimizer = torch.optim.SGD([weight], lr=1e-5)

    def step() -> None:
        F.relu(1 - sign * F.linear(hidden, weight)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        hidden.grad = None

    return step


def embedding_bag_step(features: int) -> Callable[[], object]:
    """The sparse layer as a bag of each class's inputs, with autograd."""
    layer, _ = problem(features, 1, "float32")
    index = torch.from_numpy(layer["index"].astype(np.int64))
    weight = torch.from_numpy(layer["weight"].copy()).requires_grad_()
    hidden = torch.from_numpy(np.ascontiguousarray(layer["hidden"].T)).requires_grad_()

    def step() -> None:
        z = F.embedding_bag(index, hidden, per_sample_weights=weight, mode="sum")
        F.relu(1 + z).square().sum().backward()
        weight.grad = hidden.grad = None

    return step


def extra_memory(features: int) -> float:
    """MiB that a fused SGD step takes beyond its arrays."""
    step = ours(features, 1, "float32")["fused SGD"]
    gc.collect()
    before = common.resident_mib()
    common.reset_peak()
    step()
    return common.peak_mib() - before


def main() -> None:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device, rest = where.parse_known_args()
    if device.device == "cuda":
        sparse_gpu.main(rest)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[where])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps({"extra_mib": extra_memory(args.memory)}))
        return
    threads = (1,) if args.quick else (1, 2)
    cases = [(16384, 1, "float32"), (16384, 16, "float32")] if args.quick else CASES
    result: dict[str, Any] = {"machine": common.machine(), "cases": [], "peers": []}
    for n in threads:
        torch.set_num_threads(n)
        _core.set_num_threads(n)
        for features, group, dtype in cases:
            times = common.interleaved(ours(features, group, dtype), args.repeats)
            case = {"features": features, "group_size": group, "dtype": dtype, "threads": n, "times": times}
            result["cases"].append(case)
            shown = ", ".join(f"{name} {1e3 * t['cpu_s']:.0f} / {1e3 * t['wall_s']:.0f}" for name, t in times.items())
            print(f"H={features} G={group} {dtype} threads {n}: {shown} ms CPU / wall", flush=True)
    torch.set_num_threads(1)
    _core.set_num_threads(1)
    for name, build in (("dense 768", dense_step), ("embedding_bag", lambda: embedding_bag_step(16384))):
        methods = {"fused SGD": ours(16384, 1, "float32")["fused SGD"], name: build()}
        times = common.interleaved(methods, 2)
        ratio = times[name]["cpu_s"] / times["fused SGD"]["cpu_s"]
        result["peers"].append({"peer": name, "times": times, "ratio": ratio})
        print(f"{name}: {times[name]['cpu_s']:.1f} s CPU, {ratio:.0f} times the fused step at H=16384", flush=True)
        del methods
        gc.collect()
    result["extra_mib"] = {h: common.in_subprocess(__file__, "--memory", str(h)) for h in (1024, 16384)}
    print(result["extra_mib"])
    if not args.quick:
        print(common.write("sparse", result))


if __name__ == "__main__":
    main()
