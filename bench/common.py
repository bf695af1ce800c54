"""common.py -- what the benchmarks share: the machine, interleaved timing, peak memory, result files, tables."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("BENCH_OUT") or Path(__file__).resolve().parent / "results")


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, instruction-set unit, versions and commit: what a figure means nothing without."""
    import numpy

    import widehead
    from widehead import _core

    info: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": _core.current_isa(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "widehead": widehead.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if "torch" in sys.modules:
        info["torch"] = sys.modules["torch"].__version__
    if threads is not None:
        info["threads"] = threads
    return info


def _processor() -> str:
    with open("/proc/cpuinfo") as f:
        names = {line.split(":", 1)[1].strip() for line in f if line.startswith("model name")}
    with open("/proc/cpuinfo") as f:
        models = {line.split(":", 1)[1].strip() for line in f if line.startswith("model\t")}
    return f"{'/'.join(sorted(names))} (model {'/'.join(sorted(models))})"


def _commit() -> str:
    """Of the working tree; COMMIT names it where there is a copy of the files without their history."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    except OSError:
        return os.environ.get("COMMIT", "unknown")
    return run.stdout.strip() or os.environ.get("COMMIT", "unknown")


def interleaved(
    methods: dict[str, Callable[[], object]], repeats: int, budget: float = 60.0
) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each method. The methods take turns, so that a disturbance hits all of them.

    A first round warms up and is not counted, unless it shows that one more would pass `budget` seconds for a method.
    """
    cpu: dict[str, list[float]] = {name: [] for name in methods}
    wall: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(repeats + 1):
        for name, run in methods.items():
            if round_ and wall[name] and wall[name][-1] > budget / 2:
                continue
            gc.collect()
            w, c = time.perf_counter(), time.process_time()
            run()
            cpu[name].append(time.process_time() - c)
            wall[name].append(time.perf_counter() - w)
    keep = {name: slice(1, None) if len(times) > 1 else slice(None) for name, times in cpu.items()}
    return {
        name: {
            "cpu_s": statistics.median(cpu[name][keep[name]]),
            "wall_s": statistics.median(wall[name][keep[name]]),
            "runs": len(cpu[name][keep[name]]),
        }
        for name in methods
    }


def reset_peak() -> None:
    """Forgets the highest resident memory so far (Linux), so that `peak_mib` speaks of what follows."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Highest resident memory of this process since `reset_peak`, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not report VmHWM")


def resident_mib() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_subprocess(script: str, *arguments: str) -> dict[str, Any]:
    """Runs `script` with the arguments in a process of its own and reads the JSON of its last line."""
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit {run.returncode}"}
    return json.loads(run.stdout.strip().splitlines()[-1])


def read(name: str) -> dict[str, Any] | None:
    """bench/results/<name>.json, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(name: str, result: dict[str, Any]) -> Path:
    """Writes bench/results/<name>.json whole or not at all."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
