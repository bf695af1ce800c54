"""implicit_feedback.py -- a recommender from implicit feedback: squared error over all items, without negative samples.

    python examples/implicit_feedback.py DIR                all users
    python examples/implicit_feedback.py DIR --sample 8000  the first 8000 lines, half a minute on one thread

DIR holds `train.txt` and `test.txt`, perhaps compressed (.xz): a line is the number of a user and those of his items,
as in the published splits of Gowalla, Yelp and Amazon. All pairs count, those observed more (Hu, Koren, Volinsky 2008):

    alpha * sum over all items of o^2 + sum over the user's items of (o - 1)^2

The outputs o of a million items are never computed: the head knows the sum of their squares. So the tower before it can
be any network. This one is a bag of item vectors, some left out at random, so that it learns to find the others.
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

import widehead
from widehead.torch import ExactHead, FusedSGD


def read(folder: Path, part: str, sample: int | None) -> list[list[int]]:
    """Items of each user, one line a user."""
    path = next(folder.glob(f"{part}.txt*"))
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        return [[int(word) for word in line.split()[1:]] for line in islice(lines, sample)]


def matrix(rows: Sequence[Sequence[int]], n_items: int) -> sp.csr_array:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    indices = np.array([item for row in rows for item in row], np.int64)
    return sp.csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=(len(rows), n_items))


class Tower(torch.nn.Module):
    """A user's items to a vector; frequent items say less, and so count less."""

    def __init__(self, train: sp.csr_array, dim: int, dropout: float) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(train.shape[1], dim, mode="sum", sparse=True)
        self.norm = torch.nn.LayerNorm(dim)
        degree = np.maximum(np.bincount(train.indices, minlength=train.shape[1]), 1)
        self.register_buffer("share", torch.from_numpy(degree**-0.5).float())
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, rows: sp.csr_array) -> torch.Tensor:
        indices, offsets = (torch.from_numpy(part.astype(np.int64)) for part in (rows.indices, rows.indptr[:-1]))
        return self.norm(self.bag(indices, offsets, per_sample_weights=self.dropout(self.share[indices])))


def fit(tower: Tower, head: ExactHead, train: sp.csr_array, args: argparse.Namespace) -> list[float]:
    """Mean loss of each epoch."""
    optimizers = [
        FusedSGD([head], lr=args.lr, momentum=0.9),
        torch.optim.SparseAdam(tower.bag.parameters(), lr=0.003),
        torch.optim.Adam(tower.norm.parameters(), lr=0.003),
    ]
    rng, history = np.random.default_rng(0), []
    for epoch in range(args.epochs):
        total, order = 0.0, rng.permutation(train.shape[0])
        for some in np.split(order, range(args.batch_size, len(order), args.batch_size)):
            labels = widehead.Labels.from_csr(train[some])
            A, q, _ = head.statistics(tower(train[some]), labels)  # outputs at the user's items, sum of all squares
            loss = (args.alpha * q.sum() + ((A - 1) ** 2).sum()) / len(some)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            total += float(loss.detach()) * len(some)
        history.append(total / len(order))
        print(f"epoch {epoch + 1}: loss {history[-1]:.4f}", flush=True)
    return history


@torch.no_grad()
def recall(tower: Tower, head: ExactHead, train: sp.csr_array, test: sp.csr_array, k: int = 20) -> tuple[float, float]:
    """Recall at k of the model, and of the k most popular items, both without the items that a user has already."""
    tower.eval()
    popular = np.bincount(train.indices, minlength=train.shape[1]).astype(np.float32)
    found, users = np.zeros(2), np.flatnonzero(np.diff(test.indptr))
    for some in np.split(users, range(512, len(users), 512)):
        known, wanted = train[some], test[some]
        model = head.topk(tower(known), k, exclude=widehead.Labels.from_csr(known))[1].numpy()
        rest = np.where(known.toarray() > 0, -1, popular)
        for which, best in enumerate((model, np.argsort(-rest, axis=1, kind="stable")[:, :k])):
            hits = np.take_along_axis(wanted.toarray(), best, 1).sum(1)
            found[which] += (hits / np.diff(wanted.indptr)).sum()
    ours, theirs = found / len(users)
    return float(ours), float(theirs)


def main(words: Sequence[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, help="users, from the first on")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--alpha", type=float, default=0.2, help="what a pair that was not observed counts")
    parser.add_argument("--lr", type=float, default=0.01, help="of the head")
    parser.add_argument(
        "--dropout", type=float, default=0.5, help="share of a user's items that the tower does not see"
    )
    args = parser.parse_args(words)
    torch.manual_seed(0)
    train_rows, test_rows = (read(args.folder, part, args.sample) for part in ("train", "test"))
    n_items = 1 + max(item for row in [*train_rows, *test_rows] for item in row)
    train, test = matrix(train_rows, n_items), matrix(test_rows, n_items)
    tower, head = Tower(train, args.dim, args.dropout), ExactHead(args.dim, n_items)
    torch.nn.init.normal_(head.weight, std=0.01)  # near 0, which is what most pairs want
    fit(tower, head, train, args)
    ours, popular = recall(tower, head, train, test)
    print(
        f"{len(train_rows):,} users, {n_items:,} items: recall@20 {ours:.4f}, of the most popular items {popular:.4f}"
    )
    return ours, popular


if __name__ == "__main__":
    main()
