"""report.py -- tables and figures of bench/results, written into README.md between their marks.

python bench/report.py           prints the tables, draws docs/places.svg
python bench/report.py --readme  also puts them into README.md, those of the GPU into GPU.md
python bench/report.py --gpu     only the GPU's tables
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from common import read, table
from exact_quality import section as exact_quality_section
from exact_report import exact_section
from gpu_report import gpu_tables, sparse_gpu_tables
from sparse_report import sparse_section

ROOT = Path(__file__).resolve().parent.parent


def conditions(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "numpy", "widehead") if k in machine)
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}"
    return f"{where}; {versions}; commit {machine['commit']}, {machine['date']}"


def dense_tables(result: dict[str, Any]) -> str:
    rows = []
    for case in result["cases"]:
        if case["threads"] != 1 or case["dtype"] != "float32":
            continue
        times = {name: t["cpu_s"] for name, t in case["times"].items()}
        chunked = times.get("torch linear_cross_entropy")
        share = case["fused_gflops"] / case["gemm_gflops"] if case.get("gemm_gflops") else 0.0
        rows.append(
            [
                f"{case['classes']:,} x {case['features']}, batch {case['batch']}{' *' * ('load' in case)}",
                f"{times['widehead fused'] * 1e3:,.0f}",
                f"{times['widehead plain'] * 1e3:,.0f}",
                f"{times['torch'] * 1e3:,.0f}",
                f"{chunked * 1e3:,.0f}" if chunked else "",
                f"**{case['over_torch']:.1f}x**",
                f"{share:.0%}",
            ]
        )
    peers = "torch", "torch `linear_cross_entropy`"
    speed = table(["ms CPU, one thread", "fused", "plain + SGD", *peers, "fused over torch", "of GEMM rate"], rows)
    memory = table(
        ["memory of a step beyond the weights, MiB", "float32", "bfloat16"],
        [
            [name] + [f"{m['extra_mib']:,.0f}" for m in result["memory"] if m.get("method") == name]
            for name in dict.fromkeys(m["method"] for m in result["memory"] if "method" in m)
        ],
    )
    big = next((m for m in result["memory"] if "classes" in m), None)
    size = f"({big['classes']:,} classes, d = {big['features']}, batch {big['batch']})" if big else ""
    return (
        "A training step, float32: loss, gradient to hidden, and an SGD step of the weights. The share of the\n"
        f"GEMM rate counts the recomputed logits; the rate itself is `torch.mm`'s beside it.\n\n{speed}\n\n"
        f"{memory}\n\n{size} Measured on {conditions(result['machine'])}. `python bench/dense.py` repeats it; the\n"
        "whole grid, with bfloat16 and two threads, is in `bench/results/dense.json`. Rows with a star and the\n"
        "memory come from an earlier run, at commit ea4fa9a, while the machine had other work."
    )


def places_table(result: dict[str, Any]) -> str:
    rows = [[name, f"{p['P@1']:.1f}", f"{p['hit@5']:.1f}", p["cost"]] for name, p in result["peers"].items()]
    for run in result["runs"]:
        name = f"**widehead**, {run['epochs']} epoch{'s' * (run['epochs'] > 1)}"
        rows.append([name, f"{run['P@1']:.1f}", f"{run['hit@5']:.1f}", f"{run['cpu_seconds']:.0f} CPU s"])
    names = f"{result['held_out']:,} held-out names"
    return (
        f"{table(['place resolver: % of ' + names, 'P@1', 'hit@5', 'training'], rows)}\n\n"
        "![Quality of the place resolver against the CPU time of its training](docs/places.svg)\n\n"
        "The peers were measured earlier, on another two-core machine, on the same split: their qualities compare,\n"
        f"their times only roughly. widehead on {conditions(result['machine'])}, features included in the time.\n"
        "`python bench/places.py` repeats it. Namesakes bound P@1: a name that several places share can\n"
        "be right only once."
    )


def places_figure(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "widehead"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    runs = result["runs"]
    for measure, style in (("hit@5", "o-"), ("P@1", "s-")):
        seconds, found = [r["cpu_seconds"] for r in runs], [r[measure] for r in runs]
        color = axes.plot(seconds, found, style, label=f"widehead, {measure}")[0].get_color()
        for name, peer in result["peers"].items():
            if peer.get("cpu_seconds"):
                at = (peer["cpu_seconds"], peer[measure])
                axes.plot(*at, style[0], color=color, fillstyle="none")
                axes.annotate(name, at, fontsize=7, xytext=(0, 6), textcoords="offset points", ha="right")
    axes.set_xlabel("CPU seconds of training, features included")
    axes.set_ylabel("% of held-out names")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def put(mark: str, text: str, file: str = "README.md") -> None:
    """Replaces what stands between <!-- mark --> and <!-- /mark --> in a file of the root."""
    path = ROOT / file
    old = path.read_text(encoding="utf-8")
    block = f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->"
    new, n = re.subn(rf"<!-- {mark} -->.*?<!-- /{mark} -->", lambda _: block, old, flags=re.S)
    if n != 1:
        raise SystemExit(f"{file}: expected the marks of {mark} once, found them {n} times")
    path.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    texts = {}
    if not args.gpu and (dense := read("dense")):
        texts["speed-table"] = dense_tables(dense)
    if not args.gpu and (places := read("places")):
        texts["demo-table"] = places_table(places)
        places_figure(places, ROOT / "docs" / "places.svg")
    if not args.gpu and (sparse := read("sparse")):
        texts["sparse-table"] = sparse_section(sparse, read("sparse_scale"), conditions(sparse["machine"]))
    if not args.gpu and (exact := read("exact")) and exact["cells"]:
        texts["exact-table"] = exact_section(exact, conditions(list(exact["cells"].values())[-1]["machine"]))
    if not args.gpu and (exact := read("exact_quality")):
        texts["exact-quality-table"] = exact_quality_section(exact, conditions(exact["machine"]))
    if (gpu := read("dense_gpu")) and gpu["cells"]:
        texts["gpu-table"] = gpu_tables(gpu, read("dense_gpu_headline"))
    if (gpu := read("sparse_gpu")) and gpu["cells"]:
        texts["gpu-sparse-table"] = sparse_gpu_tables(gpu)
    for mark, text in texts.items():
        print(text, end="\n\n")
        if args.readme:
            put(mark, text, "GPU.md" if mark.startswith("gpu-") else "README.md")


if __name__ == "__main__":
    main()
