"""recommend_run.py -- implicit feedback for exact_quality.py: the published split, its metrics, a run of the model.

A folder holds `train.txt`, `valid.txt` and `test.txt`, perhaps compressed; a line is a user and his items. Tuning
trains on `train` and measures on `valid`; the final run trains on both and measures on `test`. Recall@20 and NDCG@20 as
in LightGCN (arXiv 2002.02126): a user's training items are left out of his list, recall is hits over all his held-out
items, the ideal of NDCG has min(20, held-out items) hits; the mean over users who have held-out items.

The model: with degrees du, di and x_ui = du^-a di^-b for the observed pairs, 0 else, a linear tower h_u = E' x_u,
dropout before it, and outputs o = W h. The loss is sum over all pairs of o^2, but (1 + w) (o - x)^2 for the observed
ones. In scores z = o / (du^-a di^-b) that is a weight du^-2a di^-2b for every pair, and 1 + w times it for the observed
ones, whose goal is 1. Items are ranked by di^p o. `"start": "svd"` begins at the singular vectors of x, the optimum
for w = 0 without dropout (Eckart-Young); `"random"` knows nothing of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import scipy.sparse as sp

from widehead.data.files import line_blocks

K, USERS, TUNED_ON = 20, 1024, 10_000
GAIN = 1 / np.log2(np.arange(2, K + 2))


def read(path: Path) -> list[tuple[int, list[int]]]:
    numbers = [[int(word) for word in line.split()] for block in line_blocks(path) for line in block.splitlines()]
    return [(row[0], row[1:]) for row in numbers if row]


def matrix(rows: list[tuple[int, list[int]]], shape: tuple[int, int]) -> sp.csr_array:
    """Ones where a user has an item."""
    users = np.repeat([user for user, _ in rows], [len(items) for _, items in rows])
    items = np.array([item for _, items in rows for item in items], np.int64)
    return sp.csr_array((np.ones(len(items), np.float32), (users, items)), shape=shape)


def split(folder: Path, validation: bool) -> tuple[sp.csr_array, sp.csr_array]:
    """What a run trains on and what it is measured on."""
    parts = {part: read(next(folder.glob(f"{part}.txt*"))) for part in ("train", "valid", "test")}
    rows = [row for part in parts.values() for row in part]
    shape = (1 + max(user for user, _ in rows), 1 + max(max(items, default=0) for _, items in rows))
    train, valid, test = (matrix(part, shape) for part in parts.values())
    return (train, valid) if validation else (sp.csr_array(train + valid), test)


def measure(
    scores: Any, train: sp.csr_array, held: sp.csr_array, factors: Sequence[np.ndarray], most: int | None = None
) -> list[dict[str, float]]:
    """Recall and NDCG at 20, for each of the factors.

    Args:
        scores: users `[n]` to a float array `[n, items]`.
        factors: of the items' scores.
        most: number of users, drawn by a fixed seed; None: all.
    """
    users = np.flatnonzero(np.diff(held.indptr))
    if most is not None and most < len(users):
        users = np.sort(np.random.default_rng(0).permutation(users)[:most])
    sums = np.zeros((len(factors), 2))
    for at in range(0, len(users), USERS):
        some = users[at : at + USERS]
        z, known, wanted = scores(some), train[some].tocoo(), held[some]
        has, count = wanted.toarray(), np.diff(wanted.indptr)
        for total, factor in zip(sums, factors, strict=True):
            scaled = z * factor
            scaled[known.row, known.col] = -np.inf
            best = np.argpartition(-scaled, K, axis=1)[:, :K]
            order = np.argsort(-np.take_along_axis(scaled, best, 1), axis=1, kind="stable")
            hit = np.take_along_axis(has, np.take_along_axis(best, order, 1), 1) > 0
            total += (hit.sum(1) / count).sum(), ((hit * GAIN).sum(1) / np.cumsum(GAIN)[np.minimum(count, K) - 1]).sum()
    return [dict(zip(("Recall@20", "NDCG@20"), (total / len(users)).tolist(), strict=True)) for total in sums]


def by_power(
    scores: Any, train: sp.csr_array, held: sp.csr_array, powers: list[float], validation: bool
) -> dict[str, dict[str, float]]:
    """The metrics for each power of the items' degrees; of some users only, in tuning."""
    factors = [(degree(train, 0) ** power).astype(np.float32) for power in powers]
    found = measure(scores, train, held, factors, TUNED_ON if validation else None)
    return dict(zip(map(str, powers), found, strict=True))


def degree(train: sp.csr_array, axis: int) -> np.ndarray:
    return np.maximum(np.asarray(train.sum(axis)).ravel(), 1)


def subspace(x: sp.csr_array, dim: int, seed: int, rounds: int = 2) -> np.ndarray:
    """The first right singular vectors `[items, dim]`, by randomised subspace iteration (arXiv 0909.4061)."""
    basis = np.random.default_rng(seed).standard_normal((x.shape[1], dim + 16)).astype(np.float32)
    for _ in range(rounds):
        basis = np.linalg.qr(x.T @ (x @ basis))[0]
    _, _, right = np.linalg.svd(x @ basis, full_matrices=False)
    return np.ascontiguousarray((basis @ right.T)[:, :dim])


class Model:
    """The tower E `[items, dim]` and an exact head."""

    def __init__(self, settings: dict[str, Any], train: sp.csr_array) -> None:
        import torch

        from widehead.torch import ExactHead, FusedSGD

        self.settings, self.train, items = settings, train, train.shape[1]
        user, item = (sp.diags_array(d ** -settings[p]) for d, p in ((degree(train, 1), "a"), (degree(train, 0), "b")))
        self.x = sp.csr_array(user @ train @ item).astype(np.float32)
        self.rng = np.random.default_rng(settings["seed"])
        torch.manual_seed(settings["seed"])
        if settings["start"] == "svd":
            first = torch.from_numpy(subspace(self.x, settings["dim"], settings["seed"]))
        else:
            first = torch.randn(items, settings["dim"]) / items**0.5
        self.tower = torch.nn.Parameter(first.clone())
        self.head = ExactHead(settings["dim"], items)
        self.head.load_state_dict({"weight": first})
        self.optimizers = [FusedSGD([self.head], lr=0.0), torch.optim.SGD([self.tower], lr=0.0)]

    def hidden(self, rows: sp.csr_array) -> Any:
        import torch

        values = rows.data
        if self.settings["dropout"]:
            kept = self.rng.random(len(values)) >= self.settings["dropout"]
            values = (values * kept / (1 - self.settings["dropout"])).astype(np.float32)
        indices, offsets = (torch.from_numpy(part.astype(np.int64)) for part in (rows.indices, rows.indptr[:-1]))
        weights = torch.from_numpy(values)
        return torch.nn.functional.embedding_bag(indices, self.tower, offsets, mode="sum", per_sample_weights=weights)

    def step(self, rows: sp.csr_array, lr: float) -> float:
        import torch

        import widehead
        from widehead.torch import clip_grad_norm_

        y, w = torch.from_numpy(rows.data), self.settings["w"]
        A, q, _ = self.head.statistics(self.hidden(rows), widehead.Labels.from_csr(rows))
        loss = (q.sum() - (A * A).sum() + (1 + w) * ((A - y) ** 2).sum()) / rows.shape[0]
        loss.backward()
        if self.settings["clip"]:
            clip_grad_norm_([self.tower], [self.head], self.settings["clip"])
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)

    def fit(self) -> list[float]:
        """Mean loss of each epoch; the rate falls to 0 linearly in the last third."""
        users, size, losses = self.x.shape[0], self.settings["batch_size"], []
        steps = -(-users // size) * self.settings["epochs"]
        done = 0
        for _ in range(self.settings["epochs"]):
            order, total = self.rng.permutation(users), 0.0
            for at in range(0, users, size):
                some = order[at : at + size]
                total += self.step(self.x[some], self.settings["lr"] * min(1.0, 3 * (1 - done / steps))) * len(some)
                done += 1
            losses.append(total / users)
        return losses

    def scores(self, users: np.ndarray) -> np.ndarray:
        tower, weight = self.tower.detach().numpy(), self.head.weight.detach().numpy()
        return (self.x[users] @ tower) @ weight.T


def run(settings: dict[str, Any], train: sp.csr_array, held: sp.csr_array, validation: bool) -> dict[str, Any]:
    """Trains on one thread; the metrics for each power p of the ranking."""
    import torch

    import widehead

    widehead.set_num_threads(1)
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    model = Model(settings, train)
    began = time.process_time() - cpu
    losses = model.fit()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = by_power(model.scores, train, held, settings["powers"], validation)
    return {"by_power": found, "epoch_loss": losses, "cpu_s": cpu, "wall_s": wall, "start_cpu_s": began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--validation", action="store_true")
    args = parser.parse_args()
    found = run(args.settings, *split(args.folder, args.validation), args.validation)
    print(json.dumps({**found, "peak_mib": common.peak_mib()}))


if __name__ == "__main__":
    main()
