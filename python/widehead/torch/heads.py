"""heads.py -- the heads as modules."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from widehead.options import LOSSES, DenseOptions
from widehead.sampling import IGNORED

from . import _device, ops
from ._head import Head, check, checked_class_weight, checked_seed, checked_weight_dtype
from ._sampled import checked_proposal, gather_rows, register_proposal, sample_rows
from ._sampled_gpu import tables_on
from ._target import Target


class DenseHead(Head):
    """Exact output layer: every class is scored, and the `[B, n_classes]` logits never exist in memory.

    z = W h + b; softmax: loss = lse(z) - z_target, by an online log-sum-exp over tiles of classes (arXiv 1805.02867),
    its gradient recomputed tile by tile (arXiv 2411.09009).

    Args:
        in_features: size d of the hidden states. n_classes: number of classes D.
        loss: "softmax"; "sampled_softmax": in training the softmax over the batch's targets and `negatives` drawn
            classes, with log-q correction (arXiv 1412.2007), in eval mode the full one; "bce" or "squared_hinge": every
            class by itself, summed over classes, for multi-label targets.
        label_smoothing: in [0, 1], softmax. ignore_index: target of examples without one.
        class_weight: `[D]` weight of each class in the loss, as `weight` of F.cross_entropy; with softmax `mean`
            divides by the targets' weights.
        lse_penalty: adds lse_penalty * lse^2 (the "z-loss" of language models). softcap: z becomes softcap * tanh(z /
            softcap).
        filter_eps: gradient filtering: tiles whose every |dL/dz| stays below filter_eps times the largest incoming
            gradient are skipped; each skipped entry errs by less than that. None: exact.
        negatives: number of draws of sampled softmax; the whole batch shares them.
        proposal: where they come from: "uniform", "log_uniform" (classes sorted by falling frequency), or positive
            weights `[D]`.
        bias: add a learned bias. reduction: "none", "mean" (over examples that have a target; 0 when their weights sum
            to 0), "sum".
        dtype: float32, bfloat16 or float16 (trained by stochastic rounding in fused mode; the bias stays float32), or
            float64 (checks). float16 is for GPUs.
        seed: of the initial weights; None draws one from torch's generator.

    Shape:
        weight `[D, d]`, bias `[D]`. hidden `[..., d]`; see `forward`.

    Raises:
        ShapeError, DtypeError: an option out of range or of the wrong type.

    Training in plain mode gives `weight.grad` and `bias.grad` for any torch optimiser (with sampled softmax
    `weight.grad` is row-sparse, as nn.Embedding(sparse=True); dense under torch.compile); `FusedSGD` and `FusedAdam`
    update inside backward.
    """

    kind: ClassVar[str] = "DenseHead"
    losses: ClassVar[tuple[str, ...]] = LOSSES
    option_tensors: ClassVar[frozenset[str]] = frozenset({"class_weight", "proposal"})

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        loss: str = "softmax",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        lse_penalty: float = 0.0,
        softcap: float | None = None,
        filter_eps: float | None = None,
        negatives: int | None = None,
        proposal: Any = "uniform",
        bias: bool = True,
        reduction: str = "mean",
        device: Any = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        options = DenseOptions(
            loss, label_smoothing, ignore_index, lse_penalty, softcap, filter_eps, negatives, reduction
        )
        super().__init__(
            in_features,
            n_classes,
            loss=loss,
            ignore_index=ignore_index,
            class_weight=class_weight,
            reduction=reduction,
        )
        self.options = options
        self.proposal = checked_proposal(proposal, n_classes) if loss == "sampled_softmax" else None
        self._proposal_key = 0 if self.proposal is None else register_proposal(self.proposal)
        dtype = checked_weight_dtype(dtype, torch.empty(0, device=device))
        self.seed = checked_seed(seed)
        self.weight = nn.Parameter(torch.empty(n_classes, in_features, device=device, dtype=dtype))
        bias_dtype = torch.promote_types(dtype, torch.float32)
        self.bias = nn.Parameter(torch.zeros(n_classes, device=device, dtype=bias_dtype)) if bias else None
        if not self.weight.is_meta:
            self._move_options(self.weight.device)
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Weights uniform in [-1, 1) / sqrt(in_features), the same for the same seed in every face and on every
        machine; bias 0.

        Args:
            seed: None keeps the head's own.
        """
        self.seed = self.seed if seed is None else checked_seed(seed)
        self._fill(self.weight, 0)
        if self.bias is not None:
            self.bias.zero_()

    def _losses(self, rows: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        anchor, control = (self._anchor, self._control) if self.training else (None, None)
        if self.loss == "sampled_softmax" and self.training:
            return self._sampled_losses(rows, target, anchor, control)
        return self._dense_losses(
            rows, self.weight, self.bias, None, target, self.class_weight, anchor, control, self.ignore_index
        )

    def _dense_losses(self, rows: Tensor, weight: Tensor, bias: Any, offset: Any, target: Target, class_weight: Any,
                      anchor: Any, control: Any, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        o = self.options
        return ops.dense_loss(
            rows, weight, bias, offset, *target, class_weight, anchor, control,
            o.core_loss, o.label_smoothing, o.lse_penalty, o.softcap or 0.0, ignore_index, o.filter_eps or 0.0,
        )  # fmt: skip

    def _sampled_losses(
        self, rows: Tensor, target: Target, anchor: Tensor | None, control: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        fixed = torch.compiler.is_compiling() or _device.on_gpu(rows)  # shapes that no data decides
        # A sparse gradient has one that data decides: compiled and captured graphs take a dense one.
        sparse = not torch.compiler.is_compiling() and not _device.capturing(rows.device)
        seed = torch.randint(2**63 - 1, (), device=rows.device if _device.on_gpu(rows) else "cpu")
        ignore = self.ignore_index if target.indptr is None else None
        classes, offset, positions, count = sample_rows(
            target.indices, seed, self._proposal_key, self.options.negatives, ignore, fixed
        )
        weight, bias = gather_rows(self.weight, self.bias, classes, count, anchor, control, sparse)
        class_weight = None if self.class_weight is None else self.class_weight[classes.clamp(min=0)]
        local = Target(target.indptr, positions, target.values)
        return self._dense_losses(
            rows, weight, None if self.bias is None else bias, offset, local, class_weight, None, None, IGNORED
        )

    def _topk_rows(
        self, rows: Tensor, k: int, exclude_indptr: Tensor | None, exclude_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        softcap = self.options.softcap or 0.0
        return ops.dense_topk(rows, self.weight, self.bias, softcap, k, exclude_indptr, exclude_indices)

    def _score_rows(self, rows: Tensor, classes: Tensor | None) -> Tensor:
        return ops.dense_scores(rows, self.weight, self.bias, self.options.softcap or 0.0, classes)

    def _lse_rows(self, rows: Tensor) -> Tensor:
        nothing = torch.full((rows.shape[0],), self.ignore_index, dtype=torch.int64, device=rows.device)
        softcap = self.options.softcap or 0.0
        return ops.dense_loss(
            rows, self.weight, self.bias, None, None, nothing, None, None, None, None,
            "softmax", 0.0, 0.0, softcap, self.ignore_index, 0.0,
        )[2]  # fmt: skip

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        """A head over the very parameters of a linear layer (shared, not copied); `options` as in the constructor."""
        check(isinstance(linear, nn.Linear), f"linear: expected torch.nn.Linear, got {type(linear).__name__}")
        dtype = checked_weight_dtype(linear.weight.dtype, linear.weight)
        head = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta", dtype=dtype, **options
        )
        head.weight = cast("nn.Parameter", linear.weight)
        head.bias = cast("nn.Parameter | None", linear.bias)
        head._move_options(linear.weight.device)
        return head

    def to_linear(self) -> nn.Linear:
        """A linear layer over the very parameters of this head (shared, not copied); it computes the logits."""
        linear = nn.Linear(self.in_features, self.n_classes, bias=self.bias is not None, device="meta")
        linear.weight = self.weight
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    @torch.no_grad()
    def grow(self, n_classes: int, *, class_weight: Tensor | None = None, proposal: Any = None) -> None:
        """Add classes at the end, up to `n_classes`; those that were there keep their numbers and weights.

        New weights are what a head of the new size would have had from the start. Parameters stay the same objects, and
        the state of a fused optimiser that owns them grows along; that of a plain torch optimiser does not: make a new
        one.

        Args:
            class_weight, proposal: new ones for all `[n_classes]`, exactly when the head has one given as numbers.

        Raises:
            ShapeError: fewer classes than now, or one of the arguments missing.
        """
        self.check()
        check(n_classes >= self.n_classes, f"n_classes: expected at least {self.n_classes}, got {n_classes}")
        for name, new in (("class_weight", class_weight), ("proposal", proposal)):
            check(
                new is not None or name not in self._option_tensors(),
                f"{name}: expected numbers for all the classes, as the head has them, got None",
            )
        weights = checked_class_weight(class_weight, n_classes)
        if self.proposal is not None:
            self._adopt_proposal(checked_proposal(self.proposal.name if proposal is None else proposal, n_classes))
        self.class_weight = None if weights is None else weights.to(self.weight.device)
        self._grow_parameters(n_classes)

    def _move_options(self, device: torch.device) -> None:
        super()._move_options(device)
        if self.proposal is not None and _device.on_gpu(self.weight):
            tables_on(self.proposal, self.weight.device)

    def _adopt_proposal(self, proposal: Any) -> None:
        self.proposal = proposal
        self._proposal_key = 0 if proposal is None else register_proposal(proposal)
        self._move_options(self._option_device())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt_proposal(self.proposal)

    def _config(self) -> dict[str, Any]:
        names = ("label_smoothing", "lse_penalty", "softcap", "filter_eps", "negatives")
        proposal = {} if self.proposal is None else {"proposal": self.proposal.name}
        return {**{name: getattr(self.options, name) for name in names}, **proposal, "seed": self.seed}

    def _option_tensors(self) -> dict[str, Tensor]:
        weights = None if self.proposal is None else self.proposal.weight
        return super()._option_tensors() | ({} if weights is None else {"proposal": torch.from_numpy(weights)})
