"""sparse_report.py -- what the README says of the sparse head's speed and scale, from bench/results."""

from __future__ import annotations

from typing import Any

from common import table

OPERATIONS = ("forward", "top 5", "fused SGD", "fused Adam")


def speed(result: dict[str, Any]) -> str:
    rows = []
    threads = max(case["threads"] for case in result["cases"])
    for case in result["cases"]:
        if case["threads"] != threads or case["features"] == 32768:
            continue
        name = f"H = {case['features']:,}, G = {case['group_size']}, {case['dtype']}"
        rows.append([name, *(f"{case['times'][op]['wall_s'] * 1e3:,.0f}" for op in OPERATIONS)])
    peers = "; ".join(
        f"{p['peer']} takes {p['times'][p['peer']]['cpu_s']:.1f} s CPU, **{p['ratio']:.0f} times** ours"
        for p in result["peers"]
    )
    extra = max(m["extra_mib"] for m in result["extra_mib"].values())
    return (
        f"{table([f'ms on {threads} threads', *OPERATIONS], rows)}\n\n"
        "670,091 classes, K = 32 inputs each out of H, 32 examples, squared hinge; G classes share their inputs.\n"
        f"A step takes {extra:.0f} MiB at most beyond weights, inputs and state. PyTorch's ways of the same step, on\n"
        f"one thread, against fused SGD at H = 16,384, G = 1: {peers}."
    )


def scale(result: dict[str, Any]) -> str:
    a, step = result["arguments"], result["step"]
    what = f"K = {a['fan_in']}, G = {a['group_size']}, H = {a['intermediate']:,}, {a['dtype']}, {a['optimizer']}"
    return (
        f"{a['classes']:,} classes ({what}): a step of {a['batch']} examples takes {step['wall_s']:.1f} s,\n"
        f"the head {result['head_mib'] / 1024:.1f} GiB in a process of {result['peak_mib'] / 1024:.1f} GiB, the five "
        f"best classes of a batch {result['top5_batch_s']:.1f} s.\nAfter {step['steps']} steps {result['hit@1']:.0%} "
        f"of the {a['examples']} made-up examples have their class first of all. `python bench/sparse_scale.py\n"
        "--record` repeats it."
    )


def sparse_section(sparse: dict[str, Any], scaled: dict[str, Any] | None, conditions: str) -> str:
    parts = [speed(sparse)]
    if scaled:
        parts.append(scale(scaled))
    parts.append(
        f"Measured on {conditions}. `python bench/sparse.py` repeats the table;\n"
        "one thread and H = 32,768 are in `bench/results/sparse.json`."
    )
    return "\n\n".join(parts)
