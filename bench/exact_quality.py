"""exact_quality.py -- what the exact head's losses are worth on real data.

    python bench/exact_quality.py --data DIR --peers /path/to/python   what is not measured yet
    python bench/exact_quality.py --report                             the tables of what is

Two questions. Implicit feedback on Gowalla: a tower and an exact head with a weighted squared error over all pairs,
beside implicit's ALS (recommend_run.py says what is measured and how). Losses: spherical ones in an exact head beside
softmax and squared hinge in a dense one, with the same tower and as many epochs (losses_run.py).

Every method has a grid; its points are trained and measured on data apart from the test data, the best one is trained
anew on all training data and measured on the test data, once. A run is a child process of one thread; what is in
bench/results/exact_quality.json already is not run again. DIR holds a folder for each set.
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
from pathlib import Path
from typing import Any

import common
from sparse_quality import environment

HERE = Path(__file__).resolve().parent
RESULT = "exact_quality"
RECOMMEND = "gowalla"
TUNED_BY = {"gowalla": "Recall@20", "bibtex": "P@1", "debdeps": "P@1", "revdict": "hit@10"}
PUBLISHED = {"EASE": (0.1765, 0.1467), "LightGCN": (0.1820, 0.1547), "SimpleX": (0.1872, 0.1557)}

TOWER = {"a": 0.25, "b": 0.5, "w": 0.0, "dropout": 0.0, "clip": 0.0, "batch_size": 256, "seed": 0, "start": "random"}
TOWER |= {"powers": [0.2, 0.3, 0.4, 0.5]}
SVD = {**TOWER, "dim": 256, "start": "svd", "epochs": 0, "lr": 0.0}
RECOMMENDERS: dict[str, list[dict[str, Any]]] = {
    "truncated SVD, 256": [{**SVD, "a": a, "b": b} for a, b in ((0.25, 0.5), (0.5, 0.5), (0.5, 0.25))],
    "ExactHead, 256": [
        {**SVD, "dropout": 0.5, "epochs": 10, "w": 5.0, "lr": 25.0, "clip": 0.06},
        {**SVD, "dropout": 0.5, "epochs": 10, "w": 15.0, "lr": 8.0, "clip": 0.15},
        {**SVD, "dropout": 0.3, "epochs": 10, "w": 5.0, "lr": 25.0, "clip": 0.06},
    ],
}
ALS = {"factors": 256, "iterations": 15, "powers": [-0.2, 0.0, 0.2]}
PEERS: dict[str, list[dict[str, Any]]] = {
    "implicit ALS, 256": [
        *({**ALS, "alpha": alpha, "regularization": r} for alpha in (5.0, 20.0) for r in (5.0, 20.0)),
        *({**ALS, "alpha": 60.0, "regularization": r} for r in (5.0, 20.0, 60.0)),
        {**ALS, "alpha": 150.0, "regularization": 60.0},
        {**ALS, "alpha": 20.0, "regularization": 5.0, "bm25": [100, 0.8]},
    ],
}
# Methods that take the settings which another one's tuning has found, and change something.
LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "ExactHead, 512": ("ExactHead, 256", {"dim": 512}),
    "implicit ALS, 512": ("implicit ALS, 256", {"factors": 512}),
    "ExactHead, 1024": ("ExactHead, 256", {"dim": 1024}),
    "ExactHead, 256, random start": ("ExactHead, 256", {"start": "random", "epochs": 20}),
    "truncated SVD, 1024": ("truncated SVD, 256", {"dim": 1024}),
}

# What the runs of a set share: `tuning` is the number of epochs of the grid's runs, `epochs` that of the final ones.
SETS: dict[str, dict[str, Any]] = {
    "bibtex": {"tuning": 15, "epochs": 20, "batch_size": 64, "ks": [1, 3, 5], "dim": 128, "dropout": 0.3},
    "debdeps": {"tuning": 1, "epochs": 3, "batch_size": 128, "ks": [1, 3, 5], "dim": 128, "dropout": 0.1},
    "revdict": {"tuning": 1, "epochs": 3, "batch_size": 128, "ks": [1, 10], "dim": 128, "dropout": 0.1},
}
LEAST = {"revdict": 5}  # training examples of a class
SHARED = {"tower_lr": 0.003}


def exact(loss: str, *rates: float, **more: Any) -> list[dict[str, Any]]:
    return [{"head": "exact", "loss": loss, "optimizer": "sgd", "lr": lr, **more} for lr in rates]


def dense(loss: str, optimizer: str, *rates: float) -> list[dict[str, Any]]:
    return [{"head": "dense", "loss": loss, "optimizer": optimizer, "lr": lr} for lr in rates]


LOSSES: dict[str, list[dict[str, Any]]] = {
    "dense, softmax": dense("softmax", "adam", 1e-3, 4e-3, 1e-2),
    "dense, squared hinge": dense("squared_hinge", "adam", 1e-3, 4e-3, 1e-2),
    "exact, squared error": exact("squared_error", 3e-4, 1e-3, 3e-3, 1e-2, start=0.01),
    "exact, spherical softmax": exact("spherical_softmax", 0.01, 0.03, 0.1, 0.3),
    "exact, Taylor softmax": exact("taylor_softmax", 0.1, 1.0, 3.0, 10.0),
    "exact, Z-loss": exact("z_loss", 0.01, 0.1, 0.3, 1.0),
}
# In the order of the tables.
EVERY = ["truncated SVD, 256", "truncated SVD, 1024", "implicit ALS, 256", "implicit ALS, 512"]
EVERY += [*(f"ExactHead, {size}" for size in ("256", "256, random start", "512", "1024")), *LOSSES]


class Log:
    """The runs so far, written after each."""

    def __init__(self) -> None:
        self.result = common.read(RESULT) or {"runs": []}

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        wanted = json.loads(json.dumps(key))
        return next((run for run in self.result["runs"] if all(run.get(k) == v for k, v in wanted.items())), None)

    def add(self, key: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        self.result["machine"] = common.machine(threads=1)
        run = {**key, **found, "commit": self.result["machine"]["commit"], "load": os.getloadavg()[0]}
        kept = [old for old in self.result["runs"] if any(old.get(name) != key[name] for name in key)]
        self.result["runs"] = [*kept, run]
        common.write(RESULT, self.result)
        what = {k: round(v, 4) for k, v in run.get("metrics", {}).items()} or run.get("failed")
        print(f"{time.strftime('%H:%M:%S')} {run['set']} {run['stage']} {run['method']}: {what}", flush=True)
        return run


def child(words: list[str]) -> dict[str, Any]:
    """The JSON of a child's last line."""
    run = subprocess.run(words, capture_output=True, text=True, env=environment())
    if run.returncode:
        return {"failed": (run.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def best_power(found: dict[str, Any]) -> dict[str, Any]:
    """With the metrics of the best power of the degrees, and it."""
    if "failed" in found:
        return found
    power = max(found["by_power"], key=lambda p: found["by_power"][p][TUNED_BY[RECOMMEND]])
    return {**found, "metrics": found["by_power"][power], "power": float(power)}


def run_script(
    log: Log, script: str, folder: Path, stage: str, method: str, settings: dict[str, Any]
) -> dict[str, Any]:
    key = {"set": folder.name, "stage": stage, "method": method, "settings": settings}
    done = log.find(key)
    if done is not None and "failed" not in done:
        return done
    words = [sys.executable, str(HERE / script), str(folder), json.dumps(settings)]
    found = child(words + ["--validation"] * (stage == "tune"))
    shown = ["python", script, f"DIR/{folder.name}", *words[3:], *["--validation"] * (stage == "tune")]
    found["command"] = shlex.join(shown)
    return log.add(key, best_power(found) if script == "recommend_run.py" else found)


def run_peer(log: Log, python: str, folder: Path, stage: str, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import recommend_run
    import scipy.sparse as sp

    key = {"set": folder.name, "stage": stage, "method": method, "settings": settings}
    done = log.find(key)
    if done is not None and "failed" not in done:
        return done
    options = {name: value for name, value in settings.items() if name != "powers"}
    train, held = recommend_run.split(folder, stage == "tune")
    with tempfile.TemporaryDirectory() as scratch:
        sp.save_npz(Path(scratch) / "R.npz", train)
        found = child([python, str(HERE / "recommend_peer.py"), scratch, json.dumps(options)])
        found["command"] = f"recommend_peer.py {json.dumps(options)}"
        if "failed" not in found:
            users, items = (np.load(Path(scratch) / f"{name}.npy") for name in ("users", "items"))

            def scores(some: Any) -> Any:
                return users[some] @ items.T

            found["by_power"] = recommend_run.by_power(scores, train, held, settings["powers"], stage == "tune")
    return log.add(key, best_power(found))


def tuned(runs: list[dict[str, Any]], grid: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The point of the grid whose run has the best figure, and that run."""
    figures = [run.get("metrics", {}).get(TUNED_BY[run["set"]], -1.0) for run in runs]
    best = figures.index(max(figures))
    return grid[best], runs[best]


def recommend(log: Log, folder: Path, python: str | None, methods: list[str]) -> None:
    """Tunes on `valid`, the power included, and measures on `test`."""
    grids = {**RECOMMENDERS, **PEERS}
    for method in methods:
        of, change = LIKE.get(method, (method, {}))
        if of not in grids or (of in PEERS and python is None):
            continue

        def one(stage: str, name: str, point: dict[str, Any], peer: bool = of in PEERS) -> dict[str, Any]:
            if peer:
                return run_peer(log, str(python), folder, stage, name, point)
            return run_script(log, "recommend_run.py", folder, stage, name, point)

        point, run = tuned([one("tune", of, point) for point in grids[of]], grids[of])
        one("test", method, {**point, "powers": [run["power"]], **change})


def compare(log: Log, folder: Path, methods: list[str]) -> None:
    own = SETS[folder.name]
    shared = {**SHARED, **{name: own[name] for name in ("batch_size", "ks", "dim", "dropout")}}
    for method, grid in LOSSES.items():
        if method not in methods:
            continue
        runs = [
            run_script(log, "losses_run.py", folder, "tune", method, {**shared, **point, "epochs": own["tuning"]})
            for point in grid
        ]
        point, _ = tuned(runs, grid)
        run_script(log, "losses_run.py", folder, "test", method, {**shared, **point, "epochs": own["epochs"]})


def tests_of(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The test runs of a set, in the order of the tables above; the last one of each method."""
    order = EVERY
    runs = [r for r in result["runs"] if r["set"] == name and r["stage"] == "test" and "failed" not in r]
    last = {run["method"]: run for run in runs if run["method"] in order}
    return sorted(last.values(), key=lambda run: order.index(run["method"]))


def recommend_table(result: dict[str, Any]) -> str:
    rows = [[name, *(f"{100 * v:.2f}" for v in figures), "-"] for name, figures in PUBLISHED.items()]
    for run in tests_of(result, RECOMMEND):
        figures = [f"{100 * run['metrics'][m]:.2f}" for m in ("Recall@20", "NDCG@20")]
        rows.append([run["method"], *figures, f"{run['cpu_s']:,.0f}"])
    return common.table(["Gowalla, test, %", "Recall@20", "NDCG@20", "training, CPU s"], rows)


def losses_table(result: dict[str, Any], name: str) -> str:
    runs = tests_of(result, name)
    metrics = [m for m in ("P@1", "P@3", "P@5", "hit@10") if runs and m in runs[0]["metrics"]]
    keep = ["P@1", "hit@10"] if "hit@10" in metrics else metrics
    rows = [[r["method"], *(f"{100 * r['metrics'][m]:.2f}" for m in keep), f"{r['cpu_s']:,.0f}"] for r in runs]
    size = f"{name}, {runs[0]['classes']:,} classes" if runs else name
    return common.table([size, *keep, "training, CPU s"], rows)


def report(result: dict[str, Any]) -> str:
    """Markdown tables."""
    tables = [recommend_table(result)] if tests_of(result, RECOMMEND) else []
    return "\n\n".join(tables + [losses_table(result, name) for name in SETS if tests_of(result, name)])


def section(result: dict[str, Any], conditions: str) -> str:
    """The section of README.md."""
    peers = ", ".join(f"{name} {version}" for name, version in result.get("peers", {}).items())
    return (
        f"{report(result)}\n\n"
        "Gowalla: 29,858 users, 40,981 items, the published split; the first three rows are published figures. A\n"
        "number after a name is the length of a user's vector. ExactHead: a linear tower over the user's items, half\n"
        "of them left out at random, and weighted squared error over all pairs, started at the truncated SVD of the\n"
        "same matrix. Losses: the same tower of 128 numbers and as many epochs for each,\n"
        "rates tuned on a held-out part; of revdict the words with at least "
        f"{LEAST['revdict']} definitions. Measured with one\nthread on {conditions}; {peers}.\n"
        "`python bench/exact_quality.py` repeats it."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the sets' folders")
    parser.add_argument("--set", nargs="+", choices=[RECOMMEND, *SETS], default=[RECOMMEND, *SETS])
    parser.add_argument("--methods", nargs="+", choices=EVERY, default=EVERY)
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has implicit")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    args = parser.parse_args()
    log = Log()
    if args.peers:
        ask = "from importlib.metadata import version; print(version('implicit'))"
        run = subprocess.run([args.peers, "-c", ask], capture_output=True, text=True, check=True)
        log.result["peers"] = {"implicit": run.stdout.strip()}
    if not args.report:
        if args.data is None:
            parser.error("--data: expected the folder of the data sets")
        for name in args.set:
            if name == RECOMMEND:
                recommend(log, args.data / name, args.peers, args.methods)
            else:
                compare(log, args.data / name, args.methods)
    print(report(log.result))


if __name__ == "__main__":
    main()
