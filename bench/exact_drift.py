"""exact_drift.py -- rounding of the exact head over long runs, beside that of dense float32 SGD.

python bench/exact_drift.py          10,000 steps of every loss and method, 100,000 of the blocked one; draws
                                     docs/exact_drift.svg
python bench/exact_drift.py --quick  400 steps, prints and writes nothing
python bench/exact_drift.py --case 6 runs the seventh case alone and puts it into the results that are there
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

from widehead import _core

ROOT = Path(__file__).resolve().parent.parent
CLASSES, FEATURES, BATCH = 4000, 64, 32
LOSS_OPTIONS = {"eps": 1e-2, "a": 1.0, "b": 10.0}
# A rate is 2 lr lambda_1 of squared error, lambda_1 the largest eigenvalue of the batches' mean H'H: stable below 2.
CASES = [
    {"loss": "squared_error", "rate": 0.02},
    {"loss": "squared_error", "rate": 0.2},
    {"loss": "squared_error", "rate": 1.0},
    {"loss": "spherical_softmax", "lr": 0.005},
    {"loss": "taylor_softmax", "lr": 0.02},
    {"loss": "z_loss", "lr": 0.02},
    {"loss": "taylor_softmax", "lr": 0.02, "weight_decay": 0.05},
    {"loss": "squared_error", "rate": 0.02, "weight_decay": 0.05, "momentum": 0.9},
]
MORE = {"decay": "weight_decay", "momentum": "momentum"}
LONG = [CASES[1], CASES[3]]
METHODS: dict[str, dict[str, Any]] = {
    "blocked": {},
    "blocked, float64 factors": {"wide": True},
    "woodbury": {"method": "woodbury"},
    "woodbury, float64 factors": {"method": "woodbury", "wide": True},
}


class Problem:
    """Batches of one label an example, its class drawn by Zipf's law, hidden near a point of the class.

    The spectrum falls, in directions that no axis has.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        share = 1 / np.arange(1, CLASSES + 1)
        self.cumulative = np.cumsum(share / share.sum())
        turned = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0]
        self.spread = 0.7 * np.arange(1, FEATURES + 1)[:, None] ** -0.5 * turned
        self.points = rng.standard_normal((CLASSES, FEATURES)) @ self.spread
        self.weight = (rng.standard_normal((CLASSES, FEATURES)) * 0.1).astype(np.float32)
        self.seed = seed
        sample = np.concatenate([hidden for hidden, _ in self.batches(200)]).astype(np.float64)
        self.top = float(np.linalg.eigvalsh(sample.T @ sample / 200)[-1])

    def batches(self, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(self.seed + 1)
        for _ in range(steps):
            target = np.minimum(np.searchsorted(self.cumulative, rng.random(BATCH)), CLASSES - 1)
            noise = rng.standard_normal((BATCH, FEATURES)) @ self.spread
            yield (self.points[target] + noise).astype(np.float32), target


def derivatives(loss: str, A: np.ndarray, q: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By A, q and s, of one label an example with value 1, in the type of the statistics."""
    n, eps, a, b = A.dtype.type(CLASSES), *(A.dtype.type(LOSS_OPTIONS[k]) for k in ("eps", "a", "b"))
    if loss == "squared_error":
        return np.full_like(A, -2), np.ones_like(q), np.zeros_like(s)
    if loss == "spherical_softmax":
        return -2 * A / (A * A + eps), 1 / (q + n * eps), np.zeros_like(s)
    if loss == "taylor_softmax":
        norm = n + s + q / 2
        return -(1 + A) / (1 + A + A * A / 2), 1 / (2 * norm), 1 / norm
    mean = s / n
    variance = q / n - mean * mean
    deviation = np.sqrt(variance)
    z = (A - mean) / deviation
    by_z = -1 / (1 + np.exp(-a * (b - z)))
    return (
        by_z / deviation,
        -by_z * z / (2 * variance * n),
        by_z * (z * mean / variance - 1 / deviation) / n,
    )


class Dense:
    """SGD on the whole matrix, all of it in the type of `weight`."""

    def __init__(self, weight: np.ndarray, weight_decay: float, momentum: float) -> None:
        self.weight = weight
        self.velocity = np.zeros_like(weight) if momentum else None
        self.decay, self.momentum = weight.dtype.type(weight_decay), weight.dtype.type(momentum)

    def step(self, loss: str, hidden: np.ndarray, target: np.ndarray, lr: float) -> None:
        hidden = hidden.astype(self.weight.dtype)
        output = hidden @ self.weight.T
        each = np.arange(len(target))
        gA, gq, gs = derivatives(loss, output[each, target], np.einsum("ij,ij->i", output, output), output.sum(1))
        output *= (2 * gq)[:, None]
        output += gs[:, None]
        output[each, target] += gA
        if self.velocity is None and not self.decay:
            self.weight -= (self.weight.dtype.type(lr) * output).T @ hidden
            return
        gradient = output.T @ hidden + self.decay * self.weight
        if self.velocity is not None:
            self.velocity *= self.momentum
            self.velocity += gradient
            gradient = self.velocity
        self.weight -= self.weight.dtype.type(lr) * gradient

    def read(self) -> np.ndarray:
        return self.weight


class Exact:
    """The core on float32 rows."""

    def __init__(self, weight: np.ndarray, options: dict[str, Any], weight_decay: float, momentum: float) -> None:
        self.update = {"weight_decay": weight_decay, "momentum": momentum}
        self.state = _core.ExactState(weight, np.zeros_like(weight) if momentum else None, **options)

    def step(self, loss: str, hidden: np.ndarray, target: np.ndarray, lr: float) -> None:
        A, q, s = np.empty(len(target)), np.empty(len(target)), np.empty(len(target))
        labels: dict[str, Any] = {"indptr": None, "indices": target}
        batch = self.state.forward(hidden=hidden, **labels, train=True, A=A, q=q, s=s)
        gA, gq, gs = np.empty_like(A), np.empty_like(q), np.empty_like(s)
        _core.spherical_loss(
            loss=loss, **LOSS_OPTIONS, n_classes=CLASSES, **labels, A=A, q=q, s=s, grad_A=gA, grad_q=gq, grad_s=gs
        )
        self.state.backward(batch, grad_A=gA, grad_q=gq, grad_s=gs)
        self.state.step(lr=lr, **self.update)

    def read(self) -> np.ndarray:
        out = np.empty((CLASSES, FEATURES))
        self.state.rows(np.arange(CLASSES), out)
        return out


def offered(case: dict[str, Any], methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The published method has no momentum."""
    return {name: o for name, o in methods.items() if not ("momentum" in case and o.get("method") == "woodbury")}


def checkpoints(steps: int) -> list[int]:
    """1, 2 and 5 times the powers of ten from 100 on, and the last step."""
    marks = {b * 10**e for e in range(2, 7) for b in (1, 2, 5)}
    return sorted({mark for mark in marks if mark < steps} | {steps})


def run(case: dict[str, Any], steps: int, methods: dict[str, dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Relative errors of W at the checkpoints, of every method on the same batches."""
    problem = Problem(seed)
    lr = case["lr"] if "lr" in case else case["rate"] / (2 * problem.top)
    update = case.get("weight_decay", 0.0), case.get("momentum", 0.0)
    truth = Dense(problem.weight.astype(np.float64), *update)
    heads: dict[str, Dense | Exact] = {"dense float32": Dense(problem.weight.copy(), *update)}
    heads |= {name: Exact(problem.weight.copy(), options, *update) for name, options in offered(case, methods).items()}
    errors: dict[str, list[float]] = {name: [] for name in heads}
    seconds = dict.fromkeys(heads, 0.0)
    trace: list[dict[str, Any]] = []
    marks = checkpoints(steps)
    for done, (hidden, target) in enumerate(problem.batches(steps), 1):
        truth.step(case["loss"], hidden, target, lr)
        for name, head in heads.items():
            start = time.process_time()
            head.step(case["loss"], hidden, target, lr)
            seconds[name] += time.process_time() - start
        if done not in marks:
            continue
        size = np.linalg.norm(truth.weight)
        for name, head in heads.items():
            errors[name].append(float(np.linalg.norm(head.read() - truth.weight) / size))
        mark: dict[str, Any] = {"step": done, "resident_mib": round(common.resident_mib(), 1), "norm": float(size)}
        for name, head in heads.items():
            if isinstance(head, Exact):
                found = head.state.diagnostics()
                mark[name] = {key: found[key] for key in ("matrices", "blocks", "row_products", "gram_error")}
        trace.append(mark)
    machine = common.machine(_core.get_num_threads())
    return {**case, "lr": lr, "steps": marks, "errors": errors, "cpu_s": seconds, "trace": trace, "machine": machine}


def title(result: dict[str, Any]) -> str:
    rate = f"rate {result['rate']}" if "rate" in result else f"lr {result['lr']}"
    more = "".join(f", {name} {result[key]}" for name, key in MORE.items() if key in result)
    return f"{result['loss'].replace('_', ' ')}, {rate}{more}"


def describe(result: dict[str, Any]) -> str:
    own = result["errors"]["dense float32"][-1]
    last = ", ".join(f"{name} {e[-1]:.1e} ({e[-1] / own:.1f}x)" for name, e in result["errors"].items())
    return f"{title(result)}, {result['steps'][-1]:,} steps: {last}"


def figure(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "widehead", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    columns = 4
    rows = -(-len(results) // columns)
    plot, grid = plt.subplots(rows, columns, figsize=(10.4, 2.4 * rows), sharex=True, sharey=True, squeeze=False)
    for axes, result in zip(grid.flat, results, strict=False):
        for name, errors in result["errors"].items():
            if name == "dense float32":
                axes.loglog(result["steps"], errors, "k--", linewidth=1, label=name)
            else:
                axes.loglog(result["steps"], errors, ".-", linewidth=1, markersize=4, label=name)
        axes.set_title(title(result).replace(", decay", ",\ndecay"), fontsize=7)
        axes.tick_params(labelsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(results) :]:
        axes.set_visible(False)
    for axes in list(grid.flat)[len(results) - columns : len(results)]:
        axes.set_xlabel("steps", fontsize=8)
        axes.tick_params(labelbottom=True)
    for line in grid:
        line[0].set_ylabel("relative error of W", fontsize=8)
    handles = {}
    for axes in grid.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    plot.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=7)
    plot.tight_layout(rect=(0, 0.5 / (2.4 * rows), 1, 1))
    path.parent.mkdir(exist_ok=True)
    plot.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--long-steps", type=int, default=100_000, help="of the blocked method; 0: none")
    parser.add_argument("--case", type=int, nargs="*", help="numbers from 0")
    parser.add_argument("--plot", action="store_true", help="only draw what bench/results holds")
    args = parser.parse_args()
    if args.plot:
        stored = common.read("exact_drift")
        assert stored is not None, "bench/results/exact_drift.json: not there yet"
        figure([*stored["cases"], *stored["long"]], ROOT / "docs" / "exact_drift.svg")
        return
    steps = 400 if args.quick else args.steps
    result: dict[str, Any] = {
        "machine": common.machine(_core.get_num_threads()),
        "classes": CLASSES,
        "features": FEATURES,
        "batch": BATCH,
        "loss_options": LOSS_OPTIONS,
        "cases": [],
        "long": [],
    }
    if args.case is not None:
        result = common.read("exact_drift") or result
    for at in range(len(CASES)) if args.case is None else args.case:
        found = run(CASES[at], steps, METHODS)
        result["cases"][at : at + 1] = [found]
        print(describe(found), flush=True)
    if args.quick:
        return
    common.write("exact_drift", result)
    for case in LONG if args.long_steps and args.case is None else []:
        result["long"].append(run(case, args.long_steps, {"blocked": METHODS["blocked"]}))
        print(describe(result["long"][-1]), flush=True)
        common.write("exact_drift", result)
    figure([*result["cases"], *result["long"]], ROOT / "docs" / "exact_drift.svg")


if __name__ == "__main__":
    main()
