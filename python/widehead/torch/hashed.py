"""hashed.py -- the hashed head as a module: softmax trained on the classes that hash tables find."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from widehead._core import BackendError, DtypeError
from widehead._hashed import shared_classes
from widehead.labels import check_range
from widehead.options import OF_ALL_HEADS, DenseOptions, HashedOptions
from widehead.sampling import IGNORED

from . import _device, ops
from ._hash_tables import HashTables
from ._hashed_ops import HashedLoss, Job, uniform_classes
from ._head import Head, TopK, check, checked_seed
from ._sampled import gather_rows
from ._target import Target, parse_exclude
from .heads import DenseHead


class HashedHead(DenseHead):
    """Softmax over very many classes whose training looks at few of them: those that hash tables over the weights find
    for each example, its targets, and some drawn uniformly for the batch (arXiv 1412.7479).

        head = HashedHead(128, 1_000_000, tables=50, hashes=4, candidates=1000, negatives=1000)
        optimizer = FusedSGD(head, lr=0.1)
        head(backbone(x), target).loss.backward()  # reads and moves the rows of the batch
        optimizer.step()  # hashes the rows again that have moved far

    Args:
        in_features, n_classes: d and D.
        family, tables, hashes, window, max_bucket: of the tables, see `widehead.numpy.HashIndex`. 64 to 256 rows a
            bucket, D / 2^(hashes log2(window)), are a good aim.
        candidates: retrieved classes an example; negatives: uniform draws a step.
        estimator: of the normaliser: "corrected" (unbiased), "restricted" (the paper's: over what is seen) or
            "importance" (by the odds that a class is seen, as its collisions tell).
        shared: one set of candidates for the whole batch, those with most collisions in all: a dense product.
        probes: further buckets a table, see `HashIndex.query`.
        drift: a row is hashed again when the lengths of its steps since then sum to this share of its own.
        rebuild_every: a fused optimiser's step() also hashes all rows every so many steps, or None; `rebuild_growth`:
            that number is multiplied by it each time.
        ignore_index, bias, reduction, dtype, seed: see `DenseHead`; dtype float32, bfloat16 or float64.

    Shape:
        weight `[D, d]`, bias `[D]`. hidden `[..., d]`; see `forward`.

    Raises:
        ShapeError, DtypeError, BackendError: an option out of range or of the wrong type; a GPU, which has no tables so
            far.

    In plain mode `weight.grad` is row-sparse, as nn.Embedding(sparse=True): for torch.optim.SGD, Adagrad, SparseAdam.
    Rows that such an optimiser may have moved are hashed again when they are many or 50 passes old. `FusedSGD` and
    `FusedAdam` update inside backward, and hash in step(). In eval() the loss is that over all classes.
    `scores`, `log_prob` and `lse` are exact; `topk` and `predict` look among candidates, unless `exact`.
    """

    kind: ClassVar[str] = "HashedHead"
    losses: ClassVar[tuple[str, ...]] = ("sampled_softmax",)
    option_tensors: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        family: str = "wta",
        tables: int = 50,
        hashes: int = 4,
        window: int = 8,
        candidates: int = 1000,
        negatives: int = 1000,
        estimator: str = "corrected",
        shared: bool = False,
        max_bucket: int | None = None,
        probes: int = 0,
        drift: float = 0.03,
        rebuild_every: int | None = None,
        rebuild_growth: float = 1.0,
        loss: str = "sampled_softmax",
        ignore_index: int = -100,
        bias: bool = True,
        reduction: str = "mean",
        device: Any = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        own = HashedOptions(
            family, tables, hashes, window, candidates, negatives, estimator, shared, max_bucket, probes, drift,
            rebuild_every, rebuild_growth,
        )  # fmt: skip
        check(probes <= hashes, f"probes: expected at most hashes = {hashes}, got {probes}")
        Head.__init__(self, in_features, n_classes, loss=loss, ignore_index=ignore_index, reduction=reduction)
        self.options = DenseOptions("softmax", ignore_index=ignore_index, reduction=reduction)
        self.hashing = own
        self.proposal, self._proposal_key = None, 0
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise DtypeError(f"dtype: expected float32, bfloat16 or float64 weights of a hashed head, got {dtype}")
        self.seed = checked_seed(seed)
        self._tables: HashTables | None = None
        HashTables(in_features, 1, bias, own, self.seed)  # its options are checked
        self.weight = nn.Parameter(torch.empty(n_classes, in_features, device=device, dtype=dtype))
        bias_dtype = torch.promote_types(dtype, torch.float32)
        self.bias = nn.Parameter(torch.zeros(n_classes, device=device, dtype=bias_dtype)) if bias else None
        if not self.weight.is_meta:
            self._move_options(self.weight.device)
            self.reset_parameters()

    def reset_parameters(self, seed: int | None = None) -> None:
        """See `DenseHead`; the tables are made anew, by the head's new seed."""
        super().reset_parameters(seed)
        self._tables = None

    def rebuild(self) -> None:
        """Hashes all the rows anew. Writing to the parameters is seen, but not through `.data`, nor in plain mode after
        a backward pass, where it is taken for the optimiser's: call it then.
        """
        self._made().build(self.weight.detach(), self._hashed_bias())

    def statistics(self) -> dict[str, int]:
        """Of the tables: see `widehead.numpy.HashIndex.statistics`; `rehashed` counts rows that were hashed again."""
        return self._made().statistics(self.weight.detach(), self._hashed_bias())

    @torch.no_grad()
    def candidates(self, hidden: Tensor, n: int | None = None) -> Tensor:
        """The classes `[..., n]` that share most buckets with each hidden state, most first; -1 where there are no
        more. n: the head's `candidates` if None.
        """
        rows, batch = self._rows(hidden)
        found = self._retrieved(rows, self.hashing.candidates if n is None else n)
        return found.reshape(*batch, -1)

    @torch.no_grad()
    def topk(  # type: ignore[override]
        self, hidden: Tensor, k: int, exclude: Any = None, *, exact: bool = False, candidates: int | None = None
    ) -> TopK:
        """The k best classes among each example's candidates.

        Args:
            hidden, k, exclude: see `DenseHead.topk`.
            exact: among all classes, in a stream. candidates: how many to look at, the head's own number if None.

        Returns:
            `TopK(scores, classes)`, `[..., k]`; -infinity and -1 where fewer than k were found.
        """
        if exact:
            return super().topk(hidden, k, exclude)
        rows, batch = self._rows(hidden)
        check(1 <= k <= self.n_classes, f"k: expected 1 .. {self.n_classes}, got {k}")
        ids = self._retrieved(rows, max(k, self.hashing.candidates if candidates is None else candidates))
        indptr, indices = parse_exclude(exclude, batch, self.n_classes, hidden.device)
        if indptr is not None and indices is not None:
            for i, own in enumerate(ids):
                own[torch.isin(own, indices[indptr[i] : indptr[i + 1]])] = -1
        ids = ids.sort(dim=-1).values  # of equal scores the lowest class first
        scores = ops.dense_scores(rows, self.weight, self.bias, 0.0, ids.clamp(min=0))
        scores = torch.where(ids < 0, -torch.inf, scores)
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
        scores, ids = scores.gather(-1, order), ids.gather(-1, order)
        return TopK(scores.reshape(*batch, k), torch.where(scores == -torch.inf, -1, ids).reshape(*batch, k))

    def predict(self, hidden: Tensor, *, exact: bool = False) -> Tensor:
        """The best class of each example among its candidates: int64 `[...]`; -1 where there is none."""
        return self.topk(hidden, 1, exact=exact).classes.squeeze(-1)

    @torch.no_grad()
    def recall(self, hidden: Tensor, k: int, *, candidates: int | None = None) -> float:
        """Which share of the k best classes `topk` finds: a pass over all classes."""
        exact = super().topk(hidden, k).classes.reshape(-1, k, 1)
        found = self.topk(hidden, k, candidates=candidates).classes.reshape(-1, 1, k)
        there = exact >= 0
        return float(((exact == found) & there).any(-1).sum() / there.sum().clamp(min=1))

    def after_step(self, applied: Tensor | None = None) -> None:
        """Hashes the rows that the step has moved far."""
        super().after_step(applied)
        if self._tables is not None:
            self._tables.close_step(self.weight.detach(), self._hashed_bias())

    def grow(self, n_classes: int) -> None:  # type: ignore[override]
        """See `DenseHead.grow`; the tables are made anew."""
        super().grow(n_classes)
        self._tables = None

    def _losses(self, rows: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        return self._seen_losses(rows, target) if self.training else super()._losses(rows, target)

    @torch.compiler.disable  # the tables are no tensors
    def _seen_losses(self, rows: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """Of training: over the classes that an example looks at."""
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        if self.hashing.shared:
            return self._shared_losses(rows, target, seed)
        owner = self._owner if torch.is_grad_enabled() else None
        job = Job(self._made(), target, self.ignore_index, seed, owner)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if owner is not None:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return HashedLoss.apply(rows, weight, bias, None if owner is None else self._anchor, job)

    def _shared_losses(self, rows: Tensor, target: Target, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """The losses over the same classes for all examples; their rows are gathered for a dense product."""
        o, tables = self.hashing, self._made()
        found = tables.retrieve(rows.detach().contiguous(), self.weight.detach(), self._hashed_bias(), o.candidates)
        labels = target.indices.numpy()
        check_range(labels, self.n_classes, "target", None if target.indptr is not None else self.ignore_index)
        ignored = labels == self.ignore_index if target.indptr is None else np.zeros(labels.shape, bool)
        draws = uniform_classes(self.n_classes, o.negatives, seed)
        sampled = shared_classes(
            (found[0].numpy(), found[1].numpy()),
            labels[~ignored],
            None if draws is None else draws.numpy(),
            self.n_classes,
            o.candidates,
            o.estimator,
        )
        positions = np.where(ignored, IGNORED, np.searchsorted(sampled.rows, labels))
        classes, count = torch.from_numpy(sampled.rows), torch.tensor(len(sampled.rows))
        if torch.is_grad_enabled():
            tables.note(classes)
        weight, bias = gather_rows(self.weight, self.bias, classes, count, self._anchor, self._control, True)
        local = Target(target.indptr, torch.from_numpy(positions), target.values)
        offset = torch.from_numpy(sampled.offset)
        return self._dense_losses(
            rows, weight, None if self.bias is None else bias, offset, local, None, None, None, IGNORED
        )

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._tables = None

    def _retrieved(self, rows: Tensor, n: int) -> Tensor:
        return self._made().retrieve(rows.contiguous(), self.weight.detach(), self._hashed_bias(), n)[0]

    def _made(self) -> HashTables:
        if self.weight.is_meta:
            raise BackendError("weight is on the meta device: call to_empty(device=...) first")
        if self.weight.device.type != "cpu" or _device.on_gpu(self.weight):
            raise BackendError(f"HashedHead: on the CPU so far, the weights are on {self.weight.device}")
        if self._tables is None or len(self._tables.drift) != self.n_classes:
            self._tables = HashTables(self.in_features, self.n_classes, self.bias is not None, self.hashing, self.seed)
        return self._tables

    def _hashed_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": None}

    def _config(self) -> dict[str, Any]:
        names = set(self.hashing.__dataclass_fields__) - OF_ALL_HEADS
        return {**{name: getattr(self.hashing, name) for name in sorted(names)}, "seed": self.seed}
