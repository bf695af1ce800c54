"""gpu_report.py -- the result of the GPU benchmark as Markdown tables; no PyTorch is needed to make them."""

from __future__ import annotations

from typing import Any

from common import table
from gpu_cells import FUSED, METHODS, PLAIN, Cell
from sparse_cells import METHODS as SPARSE_METHODS
from sparse_cells import SparseCell


def gpu_tables(result: dict[str, Any], headline: dict[str, Any] | None = None) -> str:
    """Times and memory of every cell, in the order they were measured."""
    names = [name for name in METHODS if any("step_ms" in c["methods"].get(name, {}) for c in result["cells"])]
    if not names:
        return "No cell of the GPU benchmark was measured."
    cells = [(Cell(c["classes"], c["features"], c["batch"]), c) for c in result["cells"]]
    gemm = result["ceilings"]["gemm_flops"]
    peers = [name for name in names if name not in (FUSED, PLAIN)]
    times, memory = [], []
    for cell, record in cells:
        found = record["methods"]
        rate, over = rates_of(cell, found, peers, gemm)
        floor = record.get("floors", {}).get("floor_s", 0.0) * 1e3
        times.append([cell.label, *(shown_time(found.get(n, {})) for n in names), over, rate, f"{floor:.2f}"])
        weights = f"{cell.weight_bytes / 2**20:,.0f}"
        memory.append([cell.label, weights, *(shown_memory(found.get(n, {})) for n in names)])
    reasons = {name: first_failure(name, result["cells"]) for name in METHODS if name not in names}
    missing = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
    left = f" Left out for time: {', '.join(result['left_out'])}." if result.get("left_out") else ""
    parts = [
        "bfloat16, ms of loss and gradients, then with the SGD step; widehead fused takes the step inside backward.\n"
        "`~`: the gradient is off by more than 5 %. Over best peer: the step of the best exact peer over that of\n"
        "widehead fused. Useful rate: 6 B D d flops over the step of widehead fused, which does 8 B D d. Floor: the\n"
        "largest of bytes, flops (with the logits recomputed) and exponentials, at the rates below.",
        table(["ms", *names, "over best peer", "useful TFLOP/s, of GEMM", "floor"], times),
        table(["MiB at the peak beyond weights and inputs", "weights", *names], memory),
        *([headline_line(headline)] if headline else []),
        f"Measured on {conditions(result)}.{left}" + (f" Not measured: {missing}." if missing else ""),
    ]
    return "\n\n".join(parts)


def sparse_gpu_tables(result: dict[str, Any]) -> str:
    """Times and memory of the sparse head's cells."""
    names = [name for name in SPARSE_METHODS if any("step_ms" in c["methods"].get(name, {}) for c in result["cells"])]
    if not names:
        return "No cell of the sparse head's GPU benchmark was measured."
    times, memory = [], []
    for record in result["cells"]:
        cell = SparseCell(**{key: record[key] for key in SparseCell.__dataclass_fields__})
        found, floors = record["methods"], record["floors"]
        rewiring = [f"{record[key]:.2f}" if key in record else "" for key in ("rewire_ms", "draw_ms")]
        gathered = f"{floors['gathered_bytes'] / 1e9:.1f}" if floors["gathered_bytes"] else ""
        shown = [shown_time(found.get(n, {})) for n in names]
        times.append([cell.label, *shown, f"{floors['floor_s'] * 1e3:.2f}", gathered, *rewiring])
        weights = f"{(cell.weight_bytes + cell.index_bytes) / 2**20:,.0f}"
        memory.append([cell.label, weights, *(shown_memory(found.get(n, {})) for n in names)])
    reasons = {name: first_failure(name, result["cells"]) for name in SPARSE_METHODS if name not in names}
    missing = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
    left = f" Left out for time: {', '.join(result['left_out'])}." if result.get("left_out") else ""
    columns = ["floor", "gathered GB", "rewiring", "drawing"]
    parts = [
        "Squared hinge, ms of loss and gradients, then with the SGD step; widehead fused takes it inside backward.\n"
        "`~`: the gradient is off by more than 5 %. Floor: the larger of bytes (weights read and written, index\n"
        "read) and flops. Gathered: rows of the batch that pass through the caches if each connection fetches its own.",
        table(["ms", *names, *columns], times),
        table(["MiB at the peak beyond weights and inputs", "weights and index", *names], memory),
        f"Measured on {conditions(result)}.{left}" + (f" Not measured: {missing}." if missing else ""),
    ]
    return "\n\n".join(parts)


def shown_time(found: dict[str, Any]) -> str:
    if "step_ms" not in found:
        return shown_failure(found)
    laps = [found[key] for key in ("gradient_ms", "step_ms") if key in found]
    shown = [f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}" for ms in laps]
    return ("" if found["exact"] else "~") + " / ".join(shown)


def shown_memory(found: dict[str, Any]) -> str:
    if found.get("extra_mib") is None:
        return shown_failure(found)
    return f"{found['extra_mib'] + found['outside_mib']:,.0f}"


def first_failure(name: str, cells: list[dict[str, Any]]) -> str:
    found = (cell["methods"].get(name, {}) for cell in cells)
    return next((m["failed"] for m in found if "failed" in m), "")


def shown_failure(found: dict[str, Any]) -> str:
    """Nothing where it was not tried."""
    why = found.get("failed", "")
    return why if why in ("", "out of memory") else "no time" if why == "no time left" else "failed"


def rates_of(cell: Cell, found: dict[str, Any], peers: list[str], gemm: float) -> tuple[str, str]:
    """The useful rate of a fused step, and the best exact peer's time over its own."""
    step = found.get(FUSED, {}).get("step_ms")
    if step is None:
        return "", ""
    rate = cell.flops / step * 1e3
    others = [found[p]["step_ms"] for p in peers if "step_ms" in found.get(p, {}) and found[p]["exact"]]
    return f"{rate * 1e-12:.0f}, {rate / gemm:.0%}", f"**{min(others) / step:.1f}x**" if others else ""


def headline_line(result: dict[str, Any]) -> str:
    return (
        f"{result['classes']:,} classes, d = {result['features']} ({result['weight_gib']:.1f} GiB of weights), batch "
        f"{result['batch']}: {result['step_ms']:,.0f} ms a softmax step with SGD and stochastic rounding (floor "
        f"{result['floors']['floor_s'] * 1e3:,.0f}), peak memory {result['peak_over_weights']:.3f} times the weights, "
        f"on {result['gpu']['name']}."
    )


def conditions(result: dict[str, Any]) -> str:
    gpu, machine, rates = result["gpu"], result["machine"], result["ceilings"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v != "not installed")
    driver = gpu.get("nvidia_smi", {}).get("driver_version", "unknown")
    return (
        f"{gpu['name']}, driver {driver}, CUDA {gpu.get('cuda')}: {rates['gemm_flops'] * 1e-12:.0f} TFLOP/s (8192^3, "
        f"bfloat16), {rates['copy_bytes'] * 1e-12:.2f} TB/s (copy), {rates['exps'] * 1e-12:.2f}e12 exponentials/s at "
        f"{rates.get('clock_mhz', 0):.0f} MHz; {versions}; commit {machine['commit']}, {machine['date']}"
    )
