"""dense.py -- a training step of the dense head (loss, both gradients, SGD) against PyTorch's ways to do the same work.

Floor of a step with logits recomputed: four products of 2 B D d flops (logits twice, dH, dW), W read twice and written
once. PyTorch keeps the logits (B D floats) and needs three products. The rate is quoted against this machine's measured
rate of a large float32 product, `torch.mm` of 2048 x 2048.

    python bench/dense.py                 the whole grid, about half an hour on two cores
    python bench/dense.py --quick         a corner of it, about a minute
    python bench/dense.py --device cuda   on a GPU: dense_gpu.py, which has options of its own
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import dense_gpu
import torch
import torch.nn.functional as F

from widehead.torch import DenseHead, FusedSGD

PEERS = ("torch", "torch linear_cross_entropy")


def gemm_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of torch.mm at 2048^3, median of 7 by CPU time."""
    n = 2048
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    times = []
    for _ in range(8):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * n**3 / statistics.median(times[1:]) * 1e-9


def methods(D: int, d: int, B: int, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(D, d, generator=generator) / d**0.5).to(dtype)
    hidden = torch.randn(B, d, generator=generator)
    target = torch.randint(0, D, (B,), generator=generator)
    made = {}
    for name in names:
        make = _torch_step if name in PEERS else _widehead_step
        made[name] = make(name, weight, hidden, target)
    return made


def _torch_step(name: str, weight: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    w = weight.clone().requires_grad_()
    h = hidden.to(weight.dtype).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.1)

    def step() -> None:
        loss = F.cross_entropy(F.linear(h, w), target) if name == "torch" else F.linear_cross_entropy(h, w, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        h.grad = None

    return step


def _widehead_step(name: str, weight: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    head = DenseHead(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    h = hidden.clone().requires_grad_()
    fused = name == "widehead fused"
    optimizer = FusedSGD([head], lr=0.1) if fused else torch.optim.SGD(head.parameters(), lr=0.1)

    def step() -> None:
        head(h, target).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        h.grad = None

    return step


def measure_case(D: int, d: int, B: int, dtype_name: str, threads: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    names: tuple[str, ...] = ("widehead fused", "widehead plain", "torch")
    # torch's own chunked loss takes minutes where D is large: measured once per D there, at the middle batch.
    if hasattr(F, "linear_cross_entropy") and (D <= 100_000 or (B == 128 and d != 128)):
        names += ("torch linear_cross_entropy",)
    times = common.interleaved(methods(D, d, B, dtype, names), repeats)
    fused, clock = times["widehead fused"], "cpu_s" if threads == 1 else "wall_s"
    return {
        "classes": D,
        "features": d,
        "batch": B,
        "dtype": dtype_name,
        "threads": threads,
        "times": times,
        "fused_gflops": 8 * B * D * d / fused["cpu_s"] * 1e-9,
        "over_torch": times["torch"][clock] / fused[clock],
    }


def memory_case(name: str, D: int, d: int, B: int, dtype_name: str) -> dict[str, Any]:
    """In a process of its own: peak resident memory of two steps beyond the weights."""
    torch.set_num_threads(2)
    dtype = getattr(torch, dtype_name)
    warm = methods(1000, d, B, dtype, (name,))[name]
    warm()
    step = methods(D, d, B, dtype, (name,))[name]
    gc.collect()
    before = common.resident_mib()
    common.reset_peak()
    step()
    step()
    extra = common.peak_mib() - before
    return {
        "method": name,
        "classes": D,
        "features": d,
        "batch": B,
        "dtype": dtype_name,
        "weight_mib": D * d * dtype.itemsize / 2**20,
        "extra_mib": extra,
    }


def main() -> None:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device, rest = where.parse_known_args()
    if device.device == "cuda":
        dense_gpu.main(rest)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[where]
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--classes", type=int, nargs="+", help="these sizes only; other cases stay as they were measured"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-case", nargs=5, metavar=("METHOD", "D", "d", "B", "DTYPE"))
    args = parser.parse_args()
    if args.memory_case:
        name, D, d, B, dtype = args.memory_case
        print(json.dumps(memory_case(name, int(D), int(d), int(B), dtype)))
        return
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": common.machine(),
        "gemm_gflops_1_thread": {t: gemm_rate(getattr(torch, t)) for t in ("float32", "bfloat16")},
        "cases": [],
        "memory": [],
    }
    name = "dense_quick" if args.quick else "dense"
    sizes = args.classes or ([100_000, 10_000] if args.quick else [1_000_000, 100_000, 10_000])
    if args.classes and (old := common.read(name)):
        result["cases"] = [case for case in old["cases"] if case["classes"] not in sizes]
        result["memory"] = old["memory"]
    features, batches = ([64], [32, 128]) if args.quick else ([64, 128, 512], [32, 128, 512])
    grid = list(itertools.product(sizes, features, batches))
    for (D, d, B), dtype, threads in itertools.product(grid, ("float32", "bfloat16"), (1, 2)):
        if B != 128 and (threads == 2 or dtype == "bfloat16"):
            continue
        if threads == 2 and D != 100_000:
            continue
        case = measure_case(D, d, B, dtype, threads, args.repeats if D < 1_000_000 else 1)
        case["gemm_gflops"] = gemm_rate(torch.float32) if threads == 1 else None
        result["cases"].append(case)
        shown = "  ".join(f"{n} {t['cpu_s'] * 1e3:.0f}" for n, t in case["times"].items())
        rate = f"{case['over_torch']:.2f}x torch, {case['fused_gflops']:.0f} GFLOP/s"
        print(f"D={D} d={d} B={B} {dtype} x{threads}: {shown} ms CPU; {rate}", flush=True)
        common.write(name, result)
    if result["memory"]:
        return
    big = (100_000, 64, 128) if args.quick else (1_000_000, 512, 128)
    for name, dtype in itertools.product(("widehead fused", "widehead plain", *PEERS[:1]), ("float32", "bfloat16")):
        result["memory"].append(common.in_subprocess(__file__, "--memory-case", name, *map(str, big), dtype))
        print(result["memory"][-1], flush=True)
    print("written:", common.write(name, result))


if __name__ == "__main__":
    main()
