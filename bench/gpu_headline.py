"""gpu_headline.py -- a softmax over as many classes as one card holds, trained in place: no gradient, no second copy of
the weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import gpu_cells as cells
import gpu_device
import gpu_methods
import torch

from widehead.torch import DenseHead, FusedSGD


def headline(args: argparse.Namespace) -> int:
    """Writes the result file; exit code 1 when the loss or the gradient is off, or the last class did not learn."""
    device = gpu_device.make_device(args.rehearse)
    features, batch = (16, 8) if args.rehearse else (512, 1024)
    options: dict[str, Any] = {"bias": False, "dtype": torch.bfloat16, "device": device.name, "seed": 1}

    def make(classes: int) -> tuple[DenseHead, dict[str, float]]:
        """A head, and what making it took."""
        before = common.resident_mib()
        common.reset_peak()
        made: list[DenseHead] = []
        laps = device.time(lambda mark: (made.append(DenseHead(features, classes, **options)), mark("end")))
        return made[0], {"seconds": laps["end"], "host_mib": common.peak_mib() - before}

    # What a small head costs the host tells whether a large one would pass through it: 100 GB there could end the
    # machine.
    trial = 4096 if args.rehearse else 2**20
    head, cost = make(trial // 64)
    head, cost = make(trial)
    trial_mib = trial * features * 2 / 2**20
    if cost["host_mib"] > trial_mib / 2 and not args.rehearse:
        raise SystemExit(f"headline: a head of {trial_mib:.0f} MiB took {cost['host_mib']:.0f} MiB of host memory")
    del head
    device.release()
    classes = args.classes or cells.headline_classes(device.free_bytes(), features)
    cell = cells.Cell(classes, features, batch)
    before = device.outside()
    if device.name == "cuda":
        torch.cuda.reset_peak_memory_stats()
    head, cost = make(classes)
    init_peak = torch.cuda.max_memory_allocated() / cell.weight_bytes if device.name == "cuda" else None
    hidden = torch.randn(batch, features, dtype=torch.bfloat16, device=device.name).requires_grad_()
    target = torch.randint(classes, (batch,), device=device.name)
    target[0] = classes - 1
    case = gpu_methods.Case(head.weight, hidden.detach(), target)
    expected = gpu_methods.reference(case, 2**28)
    optimizer = FusedSGD(head, lr=1.0, rounding="stochastic", seed=1)
    last = head.weight[-1].clone()
    grads = []

    def step(mark: gpu_device.Mark) -> gpu_methods.Result:
        loss = head(hidden, target).loss
        loss.backward()
        optimizer.step()
        mark("step")
        grads[:], hidden.grad = [hidden.grad], None
        return gpu_methods.Result(loss.detach(), grads[0])

    errors = gpu_methods.errors(step(gpu_device.ignore), expected)
    learned = not torch.equal(last, head.weight[-1])
    memory = device.memory(step)
    memory["outside_mib"] += max(0, device.outside() - before) / 2**20
    times = cells.summary({"step": [device.time(step)["step"] for _ in range(args.repeats)]})
    ceilings = device.ceilings()
    extra = memory["extra_mib"] + memory["outside_mib"]
    result = {
        **gpu_methods.about(device),
        "classes": classes,
        "features": features,
        "batch": batch,
        "weight_gib": cell.weight_bytes / cells.GIB,
        "init_s": cost["seconds"],
        "init_host_mib": cost["host_mib"],
        "init_peak_over_weights": init_peak,
        **times,
        **memory,
        "peak_over_weights": 1 + extra * 2**20 / cell.weight_bytes,
        **errors,
        "last_row_moved": learned,
        "ceilings": ceilings,
        "floors": cells.floors(cell, ceilings),
    }
    path = common.write(f"{args.name}_headline", result)
    print(
        f"{classes:,} x {features} bfloat16 ({result['weight_gib']:.1f} GiB), batch {batch}: {times['step_ms']:.0f} ms "
        f"a step (floor {result['floors']['floor_s'] * 1e3:.0f}), peak memory {result['peak_over_weights']:.4f} times "
        f"the weights, loss error {errors['loss_error']:.1e}, made in {cost['seconds']:.1f} s\nwritten: {path}"
    )
    return 0 if learned and gpu_methods.exact(errors) else 1
