"""exact_report.py -- what the README says of the exact head's speed, from bench/results, and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import table

SQUARED, ENTROPY = "torch squared error", "torch cross-entropy"
METHODS = ("blocked", "woodbury")


def key(classes: int, features: int, hot: int = 1, law: str = "zipf") -> str:
    return f"D={classes} d={features} hot={hot} law={law}"


def dense(result: dict[str, Any], classes: int, features: int, name: str) -> dict[str, Any] | None:
    """The dense layer of this size, which was timed with one of its cells."""
    for entry in result["cells"].values():
        cell = entry["cell"]
        if (cell["classes"], cell["features"]) == (classes, features) and name in entry["methods"]:
            return entry["methods"][name]
    return None


def ratio(result: dict[str, Any], entry: dict[str, Any], name: str, method: str = "blocked") -> float | None:
    peer = dense(result, entry["cell"]["classes"], entry["cell"]["features"], name)
    return peer["ms"] / entry["methods"][method]["ms"] if peer else None


def flatness(result: dict[str, Any], features: int, method: str = "blocked") -> float | None:
    """A step at ten million classes over one at a hundred thousand, one target an example, Zipf's law."""
    large, small = (result["cells"].get(key(n, features)) for n in (10_000_000, 100_000))
    return large["methods"][method]["ms"] / small["methods"][method]["ms"] if large and small else None


def times_of(result: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    cell, methods = entry["cell"], entry["methods"]
    row = [f"{cell['classes']:,} x {cell['features']}"]
    row += [f"{methods[m]['ms']:.2f} ({methods[m]['over_floor']:.1f})" for m in METHODS]
    for name in (SQUARED, ENTROPY):
        peer, times = dense(result, cell["classes"], cell["features"], name), ratio(result, entry, name)
        scaled = " *" if peer and peer["timed_classes"] < cell["classes"] else ""
        row += [f"{peer['ms']:,.0f}{scaled}", f"**{times:,.0f}x**"] if peer and times else ["", ""]
    return row


def exact_section(result: dict[str, Any], conditions: str) -> str:
    cells = list(result["cells"].values())
    header = [
        "ms CPU, one thread (times the floor)",
        *METHODS,
        "dense squared error",
        "over it",
        "dense softmax",
        "over it",
    ]
    one = [e for e in cells if (e["cell"]["hot"], e["cell"]["law"]) == (1, "zipf")]
    parts = [
        "A training step of 128 examples with one target each, drawn by Zipf's law: loss, gradient to hidden and SGD\n"
        "on all rows, against PyTorch's dense squared error in place and its cross-entropy with autograd. The floor\n"
        "is the 14 d^2 m flops of the published method at the rate of `torch.mm` beside it.\n\n"
        f"{table(header, [times_of(result, e) for e in one])}"
    ]
    rest = [("uniform", 1), ("zipf", 100), ("uniform", 100)]
    rows = []
    for e in one:
        cell = e["cell"]
        others = [result["cells"].get(key(cell["classes"], cell["features"], hot, law)) for law, hot in rest]
        shown = [" / ".join(f"{o['methods'][m]['ms']:.1f}" for m in METHODS) if o else "" for o in others]
        if any(shown):
            rows.append([f"{cell['classes']:,} x {cell['features']}", *shown])
    header = ["ms CPU, blocked / woodbury", "1 target, uniform", "100 targets, Zipf", "100 targets, uniform"]
    if rows:
        parts.append(f"Other targets:\n\n{table(header, rows)}")
    flat = {d: flatness(result, d) for d in sorted({e["cell"]["features"] for e in one})}
    said = ", ".join(f"{x:.2f} times at d = {d}" for d, x in flat.items() if x)
    notes = []
    if said:
        notes.append(f"Ten million classes against a hundred thousand (blocked, one target, Zipf): {said}.")
    if extra := [e["methods"][m].get("extra_mib", 0) for e in one for m in METHODS]:
        notes.append(f"Beyond the weights the state takes {min(extra):.0f} to {max(extra):.0f} MiB.")
    face = [
        e["methods"]["torch face"]["ms"] / e["methods"]["blocked"]["ms"] for e in one if "torch face" in e["methods"]
    ]
    if face:
        notes.append(f"Through the PyTorch face a step takes {min(face):.2f} to {max(face):.2f} times as long.")
    if any("*" in "".join(times_of(result, e)[1:]).replace("**", "") for e in one):
        notes.append("A star: too large for the machine, timed on fewer classes and scaled.")
    if left_out := result.get("left_out"):
        notes.append(f"Left out, as the weights take more than {result['memory_gib']:.0f} GiB: {', '.join(left_out)}.")
    load = [x for e in cells for x in e["load"]]
    notes.append(f"The load of the machine was {min(load):.1f} to {max(load):.1f}.")
    parts.append("\n".join(notes))
    parts.append(
        "![Time of a step against the number of classes](docs/exact_speed.svg)\n\n"
        f"Measured on {conditions}. `python bench/exact.py` repeats it."
    )
    return "\n\n".join(parts)


def figure(result: dict[str, Any], path: Path) -> None:
    """Time against the number of classes, one plot for each d."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "widehead", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    cells = [e for e in result["cells"].values() if (e["cell"]["hot"], e["cell"]["law"]) == (1, "zipf")]
    sizes = sorted({e["cell"]["features"] for e in cells})
    plot, grid = plt.subplots(1, len(sizes), figsize=(3.4 * len(sizes), 3.2), sharey=True, squeeze=False)
    for axes, d in zip(grid[0], sizes, strict=True):
        own = [e for e in cells if e["cell"]["features"] == d]
        classes = [e["cell"]["classes"] for e in own]
        for name, style in ((SQUARED, "k.-"), (ENTROPY, "k.--")):
            peers = [(n, p["ms"]) for n in classes if (p := dense(result, n, d, name))]
            axes.loglog(*zip(*peers, strict=True), style, linewidth=1, label=name)
        for method in METHODS:
            axes.loglog(classes, [e["methods"][method]["ms"] for e in own], ".-", linewidth=1.2, label=method)
        floors = [e["methods"]["blocked"]["floor_ms"] for e in own]
        axes.loglog(classes, floors, ":", color="gray", linewidth=1, label="floor, 14 d^2 m flops")
        axes.set_title(f"d = {d}", fontsize=8)
        axes.set_xlabel("classes", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("ms a step, 128 examples, one thread", fontsize=8)
    plot.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=7)
    plot.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(exist_ok=True)
    plot.savefig(path, metadata={"Date": None})
