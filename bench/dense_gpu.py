"""dense_gpu.py -- the dense head on a GPU against its peers, bfloat16: loss and both gradients, and the same with SGD.

    python bench/dense.py --device cuda                   the grid, as far as 170 seconds go
    python bench/dense.py --device cuda --budget 900 --every-method
    python bench/dense.py --device cuda --headline        100 million classes on one card
    python bench/dense.py --device cuda --rehearse        the same path on the CPU, tiny sizes: no measurement

Times are CUDA events, medians of interleaved runs, the cache flushed before each; memory is the peak beyond weights and
inputs. Every method's loss and gradient are held against a float32 reference. The grid runs in a process of its own: if
a method takes the device with it, that method is written down and the rest goes on in the next process.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import gpu_cells as cells
import gpu_device
import gpu_headline
import gpu_methods
from gpu_cells import Budget, Cell
from gpu_device import Device
from gpu_methods import Result

LOST = 77  # a worker's exit code: the device is gone, another process may go on
RESTARTS = 6
GRACE = 12.0  # seconds beyond its budget after which a worker hangs
STALL = 60.0  # and seconds without a word in the result file; compiling takes less
SLOW = 1.0  # seconds of a run after which one measurement has to do
SHARE = 0.6  # seconds for a method's turns in a cell


def measure_cell(
    device: Device, cell: Cell, names: list[str], budget: Budget, record: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fills `record["methods"]`, saving before whatever may take the process down."""
    device.release()
    case = gpu_methods.make_case(cell, device.name)
    expected = gpu_methods.reference(case)
    record["reference_loss"] = float(expected.loss)
    fast: dict[str, Any] = {}
    for name in names:
        if name in record["methods"]:  # an earlier process died of it
            continue
        if not budget.allows(1.0):
            record["methods"][name] = {"failed": "no time left"}
            continue
        record["running"] = name
        save()
        run, found = start(device, name, case, expected)
        del record["running"]
        record["methods"][name] = found
        if run is not None and found["second_s"] <= SLOW:
            fast[name] = run
        del run
        save()
        if not device.usable():
            raise SystemExit(LOST)
    interleave(device, fast, budget, record, save)


def start(
    device: Device, name: str, case: Any, expected: Result, build: Callable[..., Any] = gpu_methods.build
) -> tuple[Any, dict[str, Any]]:
    """The method's first runs, which compile and check it: (None, why) or (a step, its memory, errors and times)."""
    try:
        device.release()
        outside = device.outside()
        run = build(name, case)
        begin = time.perf_counter()
        result = run(gpu_device.ignore)
        errors = gpu_methods.errors(result, expected)
        first = time.perf_counter() - begin
        del result
        device.settle()
        laps = device.time(run)
        once = {"extra_mib": device.peak_mib, "outside_mib": 0.0}
        memory = device.memory(run) if laps["step"] <= SLOW else once
        memory["outside_mib"] += max(0, device.outside() - outside) / 2**20
    except gpu_methods.Unavailable as error:
        return None, {"failed": str(error)}
    except Exception as error:  # a peer may raise anything, and the others still count
        found = {"failed": gpu_device.failure(error)}
        error.__traceback__ = None  # its frames hold the method's tensors
        return None, found
    found = {"first_s": first, "second_s": laps["step"], "exact": gpu_methods.exact(errors), **errors, **memory}
    return run, found | cells.summary({name: [seconds] for name, seconds in laps.items()})


def interleave(
    device: Device, runs: dict[str, Any], budget: Budget, record: dict[str, Any], save: Callable[[], None]
) -> None:
    """The methods take turns; a turn is a run that is not counted and some that are."""
    share = min(SHARE, max(0.0, budget.left() - 2.0) / max(1, len(runs)))
    plan = {name: cells.runs_for(record["methods"][name]["second_s"], share) for name in runs}
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for turn in range(max((turns for turns, _ in plan.values()), default=0)):
        for name, run in list(runs.items()):
            turns, count = plan[name]
            if turn >= turns or not budget.allows(0.5):
                continue
            record["running"] = name
            save()
            try:
                device.trim()
                run(gpu_device.ignore)
                for _ in range(count):
                    device.settle()
                    for lap, seconds in device.time(run).items():
                        samples[name].setdefault(lap, []).append(seconds)
            except Exception as error:
                record["methods"][name] = {"failed": gpu_device.failure(error)}
                error.__traceback__ = None
                del runs[name], samples[name]
                if not device.usable():
                    del record["running"]
                    save()
                    raise SystemExit(LOST) from None
            record.pop("running", None)
    for name, laps in samples.items():
        if laps:
            record["methods"][name] |= cells.summary(laps)


def work(args: argparse.Namespace, budget: Budget) -> None:
    """One worker: goes on where the result file ends."""
    device = gpu_device.make_device(args.rehearse)
    result = common.read(args.name)
    if result is None:
        raise SystemExit("dense.py: --worker goes on with a result file, and there is none")

    def save() -> None:
        common.write(args.name, result)

    if "check" not in result:
        result |= gpu_methods.about(device)
        result["check"] = check(device)
        result["ceilings"] = device.ceilings()
        save()
    gc.freeze()  # a collection walks through all of PyTorch otherwise, a dozen times a cell
    order = cells.rehearsal() if args.rehearse else cells.grid()
    for cell in cells.remaining(order, result):
        names = args.methods if args.rehearse else cells.methods_of(cell, args.methods, args.every_method)
        record = cells.record_of(cell, result)
        if not budget.allows(cells.least_seconds(cell, names, result["ceilings"]["gemm_flops"])):
            continue  # a smaller one may fit
        result["at"] = record
        record["floors"] = cells.floors(cell, result["ceilings"])
        measure_cell(device, cell, names, budget, record, save)
        result["cells"].append(record)
        result["at"] = None
        save()
        print(line(cell, record), flush=True)


def check(device: Device) -> dict[str, Any]:
    """Speed is worth nothing without this."""
    try:
        found = gpu_methods.agreement(device.name)
    except Exception as error:  # the peers' figures are still worth having
        found = {"agrees": False, "failed": gpu_device.failure(error)}
    words = "agrees" if found["agrees"] else f"DISAGREES: {found}"
    print("small case against PyTorch float32:", words, flush=True)
    return found


def line(cell: Cell, record: dict[str, Any]) -> str:
    methods = record["methods"].items()
    shown = [f"{name} {m['step_ms']:.2f}" if "step_ms" in m else f"{name}: {m['failed']}" for name, m in methods]
    return f"{cell.label}: {'; '.join(shown)} (ms a step; floor {record['floors']['floor_s'] * 1e3:.2f})"


def run_grid(args: argparse.Namespace, words: list[str]) -> int:
    """Workers one after the other until the grid or the time is at its end."""
    budget = Budget(args.budget)
    if not args.rehearse:
        gpu_device.need_gpu()  # before the last result is overwritten
    order = cells.rehearsal() if args.rehearse else cells.grid()
    common.write(args.name, {"cells": [], "at": None, "left_out": [cell.label for cell in order]})
    command = [sys.executable, str(Path(__file__).with_name("dense.py")), "--device", "cuda", *words, "--worker"]
    for _ in range(RESTARTS):
        left = max(1.0, budget.left())
        code = attend([*command, "--budget", f"{left:.1f}"], args.name, left + GRACE)
        result = common.read(args.name) or {}
        if code not in (0, LOST):
            hung = "did not come back" if budget.left() > 0 else "no time left"
            cells.blame(result, hung if code is None else f"the process ended with {code}")
        common.write(args.name, result)
        if code == 0 or "check" not in result or not budget.allows(10.0):
            break
    cells.keep_unfinished(result)
    result["left_out"] = [cell.label for cell in cells.remaining(order, result)]
    common.write(args.name, result)
    if result["left_out"]:
        print(f"{len(result['left_out'])} cells left out, no time: {', '.join(result['left_out'])}")
    print(f"written: {common.RESULTS / args.name}.json")
    return 0 if result.get("check", {}).get("agrees") and result["cells"] else 1


def attend(command: list[str], name: str, limit: float) -> int | None:
    """Exit code of a worker; None when it was ended because its time was up or it had long written nothing."""
    path = common.RESULTS / f"{name}.json"
    end = time.monotonic() + limit
    worker = subprocess.Popen(command)
    try:
        while time.monotonic() < end and time.time() - path.stat().st_mtime < STALL:
            if worker.poll() is not None:
                return worker.returncode
            time.sleep(0.2)
        return None
    finally:
        worker.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(5)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="dense.py --device cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=170.0, help="seconds for the grid")
    parser.add_argument("--methods", nargs="+", choices=cells.METHODS, default=cells.METHODS)
    parser.add_argument("--every-method", action="store_true", help="those slow to compile in every cell")
    parser.add_argument("--headline", action="store_true", help="the largest head that fits, instead of the grid")
    parser.add_argument("--classes", type=int, help="of the headline")
    parser.add_argument("--repeats", type=int, default=5, help="steps of the headline")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny sizes: tries the script")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.name = "dense_gpu_rehearsal" if args.rehearse else "dense_gpu"
    if args.worker:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
        work(args, Budget(args.budget))
        return
    raise SystemExit(gpu_headline.headline(args) if args.headline else run_grid(args, words))
