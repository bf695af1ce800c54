"""losses_run.py -- one run of exact_quality.py's comparison of losses: a tower, a head; prints a line of JSON.

The tower is an embedding bag over the features, normalised (torch.nn.LayerNorm), of `dim` numbers, the same for all; it
learns by Adam. Sets are those of quality_data.py; of `revdict` the words with at least `LEAST` training definitions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common
import numpy as np
import quality_data
import scipy.sparse as sp
import torch
from exact_quality import LEAST

import widehead
from widehead.data import Dataset
from widehead.data.files import line_blocks
from widehead.metrics import MetricAccumulator
from widehead.torch import DenseHead, ExactHead, FusedAdam, FusedRMSprop, FusedSGD

SERVE = 1024
OPTIMIZERS: dict[str, Any] = {"sgd": FusedSGD, "adam": FusedAdam, "rmsprop": FusedRMSprop}


def parts(folder: Path, validation: bool) -> tuple[Dataset, Dataset]:
    """What a run trains on and what it is measured on."""
    train, test = dictionary(folder, LEAST[folder.name]) if folder.name in LEAST else quality_data.load(folder)
    return train.split(quality_data.VALIDATION, quality_data.SPLIT_SEED) if validation else (train, test)


def dictionary(folder: Path, least: int) -> tuple[Dataset, Dataset]:
    """Lines `source<TAB>definition<TAB>word|word`: texts to the words with at least `least` training definitions. What
    is not such a line (some definitions hold line breaks) is left out."""
    rows = {
        part: [
            (text, words.split("|"))
            for block in line_blocks(next(folder.glob(f"{part}.tsv*")))
            for _, text, words in (line.split("\t") for line in block.decode().split("\n") if line.count("\t") == 2)
        ]
        for part in ("train", "test")
    }
    counts = Counter(word for _, words in rows["train"] for word in set(words))
    number = {word: i for i, word in enumerate(sorted(word for word, n in counts.items() if n >= least))}
    found = []
    for part in rows.values():
        labels = [(text, sorted({number[word] for word in words if word in number})) for text, words in part]
        kept = [row for row in labels if row[1]]
        indptr = np.cumsum([0, *(len(classes) for _, classes in kept)])
        indices = np.array([i for _, classes in kept for i in classes], np.int32)
        matrix = sp.csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=(len(kept), len(number)))
        found.append(Dataset(labels=matrix, texts=[text for text, _ in kept]))
    return quality_data.of_words(*found)


class Tower(torch.nn.Module):
    """Sparse rows to normalised vectors."""

    def __init__(self, n_features: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(n_features, dim, mode="sum", sparse=True)
        self.bag.weight.data.mul_(0.1)
        self.norm = torch.nn.LayerNorm(dim)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, rows: sp.csr_array) -> torch.Tensor:
        indices, offsets = (torch.from_numpy(part.astype(np.int64)) for part in (rows.indices, rows.indptr[:-1]))
        bag = self.bag(indices, offsets, per_sample_weights=torch.from_numpy(rows.data.astype(np.float32)))
        return self.dropout(self.norm(bag))


def head_of(settings: dict[str, Any], dim: int, n_classes: int) -> tuple[DenseHead | ExactHead, Any]:
    kind = {"dense": DenseHead, "exact": ExactHead}[settings["head"]]
    head = kind(dim, n_classes, loss=settings["loss"], bias=True, seed=0, **settings.get("options", {}))
    with torch.no_grad():  # most classes want 0 of squared error, at most -1 of the hinge
        head.weight.mul_(settings.get("start", 1.0))
        if settings["loss"] == "squared_hinge":
            head.bias.fill_(-1.0)
    more = {"momentum": 0.9} if settings["optimizer"] == "sgd" else {}
    return head, OPTIMIZERS[settings["optimizer"]]([head], lr=settings["lr"], **more)


def train(settings: dict[str, Any], part: Dataset, test: Dataset) -> dict[str, Any]:
    """Trains on one thread; rates fall to 0 linearly; the evaluation is in no time."""
    widehead.set_num_threads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, size, losses = np.random.default_rng(0), settings["batch_size"], []
    assert part.features is not None and test.features is not None
    wall, cpu = time.perf_counter(), time.process_time()
    tower = Tower(part.n_features, settings["dim"], settings["dropout"])
    head, optimizer = head_of(settings, settings["dim"], part.n_labels)
    optimizers = [
        optimizer,
        torch.optim.SparseAdam(tower.bag.parameters(), lr=settings["tower_lr"]),
        torch.optim.Adam(tower.norm.parameters(), lr=settings["tower_lr"]),
    ]
    first = [o.param_groups[0]["lr"] for o in optimizers]
    steps, done = -(-len(part) // size) * settings["epochs"], 0
    for _ in range(settings["epochs"]):
        order, total = rng.permutation(len(part)), 0.0
        for at in range(0, len(part), size):
            some = order[at : at + size]
            loss = head(tower(part.features[some]), widehead.Labels.from_csr(part.labels[some])).loss
            loss.backward()
            for o, lr in zip(optimizers, first, strict=True):
                o.param_groups[0]["lr"] = lr * (1 - done / steps)
                o.step()
                o.zero_grad()
            total += float(loss.detach()) * len(some)
            done += 1
        losses.append(total / len(part))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "metrics": measure(tower.eval(), head, test, settings["ks"]),
        "epoch_loss": losses,
        "cpu_s": cpu,
        "wall_s": wall,
    }


@torch.no_grad()
def measure(tower: Tower, head: DenseHead | ExactHead, test: Dataset, ks: list[int]) -> dict[str, float]:
    """P@k and hit@k."""
    assert test.features is not None
    found = MetricAccumulator(tuple(ks))
    for at in range(0, len(test), SERVE):
        classes = head.topk(tower(test.features[at : at + SERVE]), max(ks))[1]
        found.update(classes.numpy(), test.labels[at : at + SERVE])
    return {name: value for name, value in found.result().items() if name.startswith(("P@", "hit@"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--validation", action="store_true")
    args = parser.parse_args()
    part, test = parts(args.folder, args.validation)
    found = train(args.settings, part, test)
    print(json.dumps({**found, "examples": len(part), "classes": part.n_labels, "peak_mib": common.peak_mib()}))


if __name__ == "__main__":
    main()
