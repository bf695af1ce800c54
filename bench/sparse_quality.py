"""sparse_quality.py -- precision and memory of the sparse head on real data, beside dense heads, Omikuji and napkinXC.

    python bench/sparse_quality.py --data DIR --set debdeps bibtex --peers /path/to/python    what is not measured yet
    python bench/sparse_quality.py --report                                                  the table of what is

The model is that of Schultheis & Babbar (ECML-PKDD 2023, arXiv 2306.03725): features, dropout, a ReLU layer, the head.
Every method has a grid; each of its points is trained on nine tenths of the training data and measured on the tenth
(`quality_data.SPLIT_SEED`). The one of the best P@3 is then trained on all of the training data, for as many epochs as
every other method, and measured on the test data, which nothing before has seen. A run is a child process of one
thread; what is in bench/results/sparse_quality.json already is not run again. quality_data.py says what DIR holds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).resolve().parent
RESULT = "sparse_quality"
TUNED_BY = "P@3"

# What the runs of a set share: `tuning` is the number of epochs of the grid's runs, `epochs` that of the final ones.
SETS: dict[str, dict[str, Any]] = {
    "debdeps": {"tuning": 3, "epochs": 5, "batch_size": 128, "rewire_every": 100},
    "bibtex": {"tuning": 10, "epochs": 20, "batch_size": 32, "rewire_every": 100},
}
SHARED = {"loss": "squared_hinge", "optimizer": "adam", "schedule": "linear", "seed": 0}


def sparse(width: int, fan_in: int, group: int = 1) -> dict[str, Any]:
    return {"head": "sparse", "intermediate": width, "head_options": {"fan_in": fan_in, "group_size": group}}


def dense(width: int) -> dict[str, Any]:
    return {"head": "dense", "intermediate": width}


# A linear layer of that width over 512 features in the place of the ReLU layer.
DICTIONARY = {"intermediate": None, "dim": 512, "normalise": False, "dictionary": 1024}
DECAYS = [{"weight_decay": decay} for decay in (0.15, 0.3)]

# Method -> grid of settings, over those above.
GRIDS: dict[str, list[dict[str, Any]]] = {
    "dense": [
        *({**dense(256), "lr": 3e-3, "dropout": share} for share in (0.0, 0.1)),
        *({**dense(512), "lr": 3e-3, "dropout": 0.0, **decay} for decay in ({}, *DECAYS)),
    ],
    "sparse 32 of 4096": [
        *({**sparse(4096, 32), "lr": 3e-3, "dropout": share} for share in (0.0, 0.1)),
        *({**sparse(4096, 32), "lr": lr, "dropout": 0.0} for lr in (6e-3, 1e-2)),
    ],
    "sparse 32 of 4096, weight decay": [
        {**sparse(4096, 32), "lr": 6e-3, "dropout": 0.0, "weight_decay": decay} for decay in (0.5, 1.5)
    ],
    "sparse 48 of 4096, groups of 16": [
        {**sparse(4096, 48, 16), "lr": 6e-3, "dropout": 0.0, **decay} for decay in ({}, *DECAYS, {"weight_decay": 0.5})
    ],
    "sparse 32 of a dictionary of 1024, groups of 16": [
        {**sparse(1024, 32, 16), **DICTIONARY, "lr": lr, "dropout": 0.0, **decay}
        for lr in (3e-3, 6e-3)
        for decay in ({}, DECAYS[0])
    ],
    "sparse direct, 32 of 512": [{**sparse(512, 32), "lr": lr, "dropout": 0.0} for lr in (3e-3, 1e-2)],
    "bottleneck 64": [{**dense(64), "lr": lr, "dropout": 0.0} for lr in (3e-3, 1e-2)],
}

# Methods that take the settings which another one's tuning has found, and change something.
LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse 32 of 16384": ("sparse 32 of 4096", sparse(16384, 32)),
    "sparse 64 of 16384": ("sparse 32 of 4096", sparse(16384, 64)),
    "sparse 64 of 4096": ("sparse 32 of 4096", sparse(4096, 64)),
    "sparse 16 of 4096": ("sparse 32 of 4096", sparse(4096, 16)),
    "sparse 32 of 4096, groups of 16": ("sparse 32 of 4096", sparse(4096, 32, 16)),
    "sparse 32 of 4096, no ReLU": ("sparse 32 of 4096", {"intermediate": None, "dim": 4096, "normalise": False}),
    "sparse 64 of 4096, groups of 16": ("sparse 32 of 4096", sparse(4096, 64, 16)),
    "sparse 16 of 4096, groups of 16": ("sparse 32 of 4096", sparse(4096, 16, 16)),
}

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Omikuji": ("omikuji", {}),
    "Omikuji, 5 levels in one": ("omikuji", {"collapse_every_n_layers": 5}),
    "Omikuji, 100-ary": ("omikuji", {"cluster_k": 100, "cluster_balanced": False, "max_depth": 3}),
    "napkinXC PLT": ("napkinxc", {}),
    "napkinXC PLT, 3 trees": ("napkinxc", {"ensemble": 3}),
}


def settings_of(name: str, method: str, point: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The arguments of the Classifier for a point of a method's grid on a set."""
    own = SETS[name]
    out = {**SHARED, "batch_size": own["batch_size"], "epochs": epochs, **point}
    if out["head"] == "sparse":
        out["head_options"] = {"rewire_every": own["rewire_every"], **point["head_options"]}
    return out


def environment() -> dict[str, str]:
    one = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**os.environ, **one}


def child(words: list[str]) -> dict[str, Any]:
    """The JSON of a child's last line, and how the child was called."""
    folder = f"DIR/{Path(words[2]).name}"
    shown = " ".join(["python", *map(shlex.quote, [Path(words[1]).name, folder, *words[3:]])])
    run = subprocess.run(words, capture_output=True, text=True, env=environment())
    if run.returncode:
        return {"command": shown, "failed": (run.stderr.strip().splitlines() or ["?"])[-1]}
    return {"command": shown, **json.loads(run.stdout.strip().splitlines()[-1])}


class Log:
    """The runs so far, written after each."""

    def __init__(self) -> None:
        self.result = common.read(RESULT) or {"runs": []}

    def find(self, **key: Any) -> dict[str, Any] | None:
        wanted = json.loads(json.dumps(key))
        return next((run for run in self.result["runs"] if all(run.get(k) == v for k, v in wanted.items())), None)

    def add(self, key: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        self.result["machine"] = common.machine(threads=1)
        run = {**key, **found, "commit": self.result["machine"]["commit"], "load": os.getloadavg()[0]}
        kept = [old for old in self.result["runs"] if any(old.get(name) != key[name] for name in key)]
        self.result["runs"] = [*kept, run]
        common.write(RESULT, self.result)
        shown = ", ".join(f"{m} {100 * v:.2f}" for m, v in run.get("metrics", {}).items())
        outcome = shown or run.get("failed")
        print(f"{time.strftime('%H:%M:%S')} {run['set']} {run['stage']} {run['method']}: {outcome}", flush=True)
        return run


def run_ours(log: Log, folder: Path, stage: str, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    key = {"set": folder.name, "stage": stage, "method": method, "settings": settings}
    done = log.find(**key)
    if done is not None and "failed" not in done:
        return done
    words = [sys.executable, str(HERE / "quality_run.py"), str(folder), json.dumps(settings)]
    return log.add(key, child(words + (["--validation"] if stage == "tune" else [])))


def best_point(log: Log, folder: Path, method: str) -> dict[str, Any]:
    """The point of a method's grid with the best figure on the validation part."""
    name = folder.name
    if method in LIKE:
        other, change = LIKE[method]
        return {**best_point(log, folder, other), **change}
    grid = GRIDS[method]
    if len(grid) == 1:
        return grid[0]
    figures = []
    for point in grid:
        run = run_ours(log, folder, "tune", method, settings_of(name, method, point, SETS[name]["tuning"]))
        figures.append(run.get("metrics", {}).get(TUNED_BY, -1.0))
    return grid[figures.index(max(figures))]


def run_peers(log: Log, folder: Path, python: str) -> None:
    import numpy as np
    import quality_data
    import quality_run
    import scipy.sparse as sp

    ask = "from importlib.metadata import version as v; print(v('omikuji'), v('napkinxc'))"
    versions = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    log.result["peers"] = dict(zip(("omikuji", "napkinxc"), versions, strict=True))
    for method, (package, options) in PEERS.items():
        key = {"set": folder.name, "stage": "test", "method": method, "settings": options}
        if log.find(**key) is not None:
            continue
        train, test = quality_data.split(folder, validation=False)
        with tempfile.TemporaryDirectory() as scratch:
            for part, matrix in (("X", train.features), ("Y", train.labels), ("T", test.features)):
                sp.save_npz(Path(scratch) / f"{part}.npz", sp.csr_matrix(matrix))
            found = child([python, str(HERE / "quality_peer.py"), scratch, package, json.dumps(options)])
            found["command"] = f"quality_peer.py {package} {json.dumps(options)}"
            if "failed" not in found:
                found["metrics"] = quality_run.measure(np.load(Path(scratch) / "best.npy"), test)
        log.add(key, found)


def finals(result: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """The test runs of a set, in the order of the tables above."""
    order = [*GRIDS, *LIKE, *PEERS]
    runs = [run for run in result["runs"] if run["set"] == name and run["stage"] == "test" and "failed" not in run]
    runs = list({run["method"]: run for run in runs}.values())  # the last one, where a larger grid has found another
    return iter(sorted(runs, key=lambda run: order.index(run["method"]) if run["method"] in order else len(order)))


def mib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f}"


def report(result: dict[str, Any]) -> str:
    """Markdown tables, one a set."""
    out = []
    for name in SETS:
        runs = list(finals(result, name))
        if not runs:
            continue
        rows = []
        dense_head = next((sum(r["head_bytes"].values()) for r in runs if r["method"] == "dense"), None)
        for run in runs:
            head = sum(run["head_bytes"].values()) if "head_bytes" in run else None
            layer = sum(run["first_layer_bytes"].values()) if "first_layer_bytes" in run else None
            share = "-" if head is None or dense_head is None else f"{head / dense_head:.3f}"
            precision = [f"{100 * run['metrics'][f'P@{k}']:.2f}" for k in (1, 3, 5)]
            cost = [f"{run['peak_mib']:,.0f}", f"{run.get('cpu_s_per_epoch', float('nan')):.1f}", f"{run['cpu_s']:.0f}"]
            rows.append([run["method"], *precision, mib(head), share, mib(layer), *cost])
        header = ["method", "P@1", "P@3", "P@5", "head MiB", "of dense", "first layer MiB"]
        header += ["peak MiB", "CPU s / epoch", "CPU s"]
        out.append(f"### {name}\n\n{common.table(header, rows)}".replace("nan", "-"))
    return "\n\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the sets' folders")
    parser.add_argument("--set", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=[*GRIDS, *LIKE], default=[*GRIDS, *LIKE])
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has omikuji and napkinxc")
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    log = Log()
    if not args.report:
        if args.data is None:
            parser.error("--data: expected the folder of the data sets")
        for name in args.set:
            folder = args.data / name
            for method in args.methods:
                point = best_point(log, folder, method)
                run_ours(log, folder, "test", method, settings_of(name, method, point, SETS[name]["epochs"]))
            if args.peers:
                run_peers(log, folder, args.peers)
    print(report(log.result))


if __name__ == "__main__":
    main()
