"""estimator.py -- scikit-learn classifier for very many classes: embedding bag, normalisation, output head."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from . import _checkpoint, _core
from ._checks import check_parameters, checked_weights
from ._linear import LinearLayer
from ._training import Examples, Targets, drop_features, encode, log_odds, order_of, progress, rate_at
from ._validation import Validation
from .bag import EmbeddingBag
from .numpy import DenseHead, SparseHead
from .order import named_order

if TYPE_CHECKING:
    from typing_extensions import Self

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
except ImportError:  # without scikit-learn the class does all but take part in its pipelines and searches
    from ._params import Params as BaseEstimator

    class ClassifierMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's."""


__all__ = ["Classifier"]

_HEADS: dict[str, Any] = {"dense": DenseHead, "sparse": SparseHead}
_SERVE = 1024  # examples at a time in predictions


class Classifier(ClassifierMixin, BaseEstimator):
    """Classifier over sparse features for very many classes, by the conventions of scikit-learn.

    ``X`` -> embedding bag -> unit length x ``scale`` (``normalise``) -> head; or, with ``intermediate``, ``X`` ->
    dropout -> ReLU layer of that width -> head, the model of arXiv 2306.03725. With ``dictionary`` a linear layer
    comes before the head. All layers are trained together by a fused optimiser, on batches in an order drawn anew for
    every epoch. The same data, parameters and seed give the same model, bit for bit, on any number of threads.

    Args:
        head: kind of output layer: ``"dense"`` or ``"sparse"``.
        dim: length of the hidden vectors.
        intermediate: width of a ReLU layer in their place, which has no unit length; a sparse head wants thousands.
        dictionary: width of a linear layer before the head. A sparse head's classes are then combinations of ``fan_in``
            of so many directions: a full layer of ``dim`` in a fraction of its memory, below a ``dim`` of some hundred
            instead of an ``intermediate`` layer of thousands.
        dropout: share of each example's features that training leaves out, drawn anew each time; the others grow
            accordingly.
        loss: ``"sampled_softmax"`` (dense), ``"softmax"``, ``"bce"`` or ``"squared_hinge"``; None: the first of a dense
            head, the last of a sparse one. ``"bce"`` starts with each class's bias at its log-odds among the examples.
        negatives: classes that sampled softmax draws for a batch.
        epochs, batch_size: passes over the data, examples a step.
        lr: highest learning rate.
        optimizer: ``"adagrad"``, ``"adam"`` or ``"sgd"``.
        schedule: the rate falls to 0 by ``"linear"`` or ``"cosine"``, stays (``"constant"``), or halves whenever the
            validation figure has not improved for ``patience`` epochs (``"plateau"``).
        warmup: share of the steps over which the rate first rises, 0 to 1.
        weight_decay: of all layers.
        early_stopping: end the training when the validation figure has not improved for ``n_iter_no_change`` epochs.
        validation_fraction: share of the examples, drawn by the seed, that :meth:`fit` does not train on but measures
            the model with after every epoch; only with ``early_stopping`` or the schedule ``"plateau"``. The model is
            that of the best epoch in the end, for which a second copy of its weights is kept.
        validation_metric: that figure: ``"P@k"``, ``"nDCG@k"``, ``"hit@k"`` or ``"recall@k"``.
        n_iter_no_change, patience: epochs, see above.
        normalise, scale: hidden vectors have length ``scale``.
        dtype: of all layers' weights: ``"float32"`` or ``"bfloat16"``.
        n_classes: number of classes, for integer ``Y``; by default the classes are the distinct values of ``Y``.
        features: what makes features of ``X``: an ``NGramHasher`` for a list of strings, or any fitted transformer.
        transform: ``transform(X, epoch)`` gives the examples of an epoch, as many and in the same order: say, with
            typing errors. ``X`` is then what ``features.prepare`` made of the strings, or the matrix.
        head_options: more arguments of the head, by name. A sparse head's ``class_order`` may be ``"cooccurrence"``:
            what ``order_classes`` makes of the training data (by features where an example has one class), or
            ``"frequency"``: the most frequent classes first, as ``dense_head`` wants them.
        seed: of weights, order, negatives, rounding.
        checkpoint: a file into which all state goes every ``checkpoint_every`` seconds and at the end.
        resume: go on from ``checkpoint`` if it is there: the model is then the same, bit for bit, as without the
            interruption.
        callback: ``callback(classifier, epoch, loss)`` after every epoch.
        verbose: show a progress bar.

    Attributes:
        classes_: ``[n_classes]`` values of ``Y`` by class.
        n_classes_, n_features_in_: numbers of classes and of columns.
        bag_, dictionary_, head_: the layers; ``dictionary_`` may be None.
        history_: a dict for every epoch: ``epoch``, ``loss`` (mean over its examples), ``seconds``; ``validation``
            where there is such a figure.
        best_epoch_, best_validation_score_: of the epoch whose weights the model has; None without validation.
    """

    def __init__(
        self,
        head: str = "dense",
        *,
        dim: int = 128,
        intermediate: int | None = None,
        dictionary: int | None = None,
        dropout: float = 0.0,
        loss: str | None = None,
        negatives: int = 512,
        epochs: int = 5,
        batch_size: int = 512,
        lr: float = 0.1,
        optimizer: str = "adagrad",
        schedule: str = "linear",
        warmup: float = 0.0,
        weight_decay: float = 0.0,
        early_stopping: bool = False,
        validation_fraction: float | None = 0.1,
        validation_metric: str = "P@3",
        n_iter_no_change: int = 5,
        patience: int = 2,
        normalise: bool = True,
        scale: float = 8.0,
        dtype: str = "float32",
        n_classes: int | None = None,
        features: Any | None = None,
        transform: Callable[[Any, int], Any] | None = None,
        head_options: dict[str, Any] | None = None,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 60.0,
        resume: bool = False,
        callback: Callable[[Classifier, int, float], None] | None = None,
        verbose: bool = False,
    ) -> None:
        self.head = head
        self.dim = dim
        self.intermediate = intermediate
        self.dictionary = dictionary
        self.dropout = dropout
        self.loss = loss
        self.negatives = negatives
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.validation_metric = validation_metric
        self.n_iter_no_change = n_iter_no_change
        self.patience = patience
        self.normalise = normalise
        self.scale = scale
        self.dtype = dtype
        self.n_classes = n_classes
        self.features = features
        self.transform = transform
        self.head_options = head_options
        self.seed = seed
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.resume = resume
        self.callback = callback
        self.verbose = verbose

    def fit(self, X: Any, Y: Any, sample_weight: Any | None = None) -> Self:
        """Trains from the start.

        Args:
            X: ``[n, n_features]`` sparse or dense numbers, or what ``features`` takes.
            Y: ``[n]`` classes (integers or any sortable values); for several labels an example a CSR matrix
                ``[n, n_classes]`` (its values are weights), ``widehead.Labels``, or a list of lists of class ids.
            sample_weight: ``[n]`` weights of the examples, at least 0.

        Raises:
            ShapeError, DtypeError, LabelError, NonFiniteError: bad parameters or data, before anything is trained.
            FileError: ``resume`` with a checkpoint of other data or parameters.
        """
        check_parameters(self, tuple(_HEADS))
        examples, targets, classes = self._data(X, Y, None)
        weight = checked_weights(sample_weight, len(examples))
        validation = Validation(self, examples, targets)
        self._build(examples, validation.training_targets, classes)
        self.history_: list[dict[str, float]] = []
        keeper = _checkpoint.Keeper(self, examples, targets, weight, validation)
        start = keeper.restore() if self.resume else 0
        training = validation.training
        per_epoch = -(-len(training) // self.batch_size)
        total = per_epoch * self.epochs
        with progress(self.verbose, total, start) as advance:
            for epoch in range(start // per_epoch, self.epochs):
                if validation.stop:
                    break
                began = time.perf_counter()
                source = examples.epoch(epoch, self.transform)
                order = order_of(len(training), self.seed, epoch)
                for step in range(max(start, epoch * per_epoch), (epoch + 1) * per_epoch):
                    at = (step - epoch * per_epoch) * self.batch_size
                    rows = training[order[at : at + self.batch_size]]
                    rate = self.lr * validation.factor * rate_at(self.schedule, self.warmup, step, total)
                    loss = self._step(
                        source.rows(rows), targets.take(rows), rate, None if weight is None else weight[rows]
                    )
                    keeper.add(loss, len(rows))
                    advance(f"epoch {epoch + 1}/{self.epochs} loss {keeper.mean:.4f}")
                    if (step + 1) % per_epoch:
                        keeper.tick(step + 1)
                self.history_.append({"epoch": epoch, "loss": keeper.mean, "seconds": time.perf_counter() - began})
                keeper.reset()
                validation.judge(self.history_[-1])
                if self.callback is not None:
                    self.callback(self, epoch, self.history_[-1]["loss"])
                keeper.tick((epoch + 1) * per_epoch, last=epoch + 1 == self.epochs or validation.stop)
        validation.finish()
        return self

    def partial_fit(self, X: Any, Y: Any, classes: Any | None = None, sample_weight: Any | None = None) -> Self:
        """One pass over some examples at the constant rate ``lr``; the first call makes the layers.

        Args:
            X, Y, sample_weight: as for :meth:`fit`.
            classes: all values that ``Y`` will ever have; needed in the first call unless ``n_classes`` is given or
                ``Y`` is a matrix.
        """
        check_parameters(self, tuple(_HEADS))
        if self.early_stopping:
            raise _core.ShapeError("early_stopping: expected False for partial_fit, which makes one pass, got True")
        first = not hasattr(self, "head_")
        known = None if first else self._names
        if first and classes is not None:
            known = np.unique(np.asarray(classes))
        examples, targets, names = self._data(X, Y, known)
        weight = checked_weights(sample_weight, len(examples))
        if first:
            self._build(examples, targets, names)
            self.history_ = []
        elif targets.n_classes != self.n_classes_:
            raise _core.ShapeError(f"Y: expected {self.n_classes_} classes as before, got {targets.n_classes}")
        epoch = len(self.history_)
        source = examples.epoch(epoch, self.transform)
        order = order_of(len(examples), self.seed, epoch)
        began, total = time.perf_counter(), 0.0
        for at in range(0, len(order), self.batch_size):
            rows = order[at : at + self.batch_size]
            part = None if weight is None else weight[rows]
            total += self._step(source.rows(rows), targets.take(rows), self.lr, part) * len(rows)
        seconds = time.perf_counter() - began
        self.history_.append({"epoch": epoch, "loss": total / max(1, len(order)), "seconds": seconds})
        return self

    def predict_topk(self, X: Any, k: int = 5) -> tuple[NDArray[Any], NDArray[Any]]:
        """The ``k`` best classes of every example, best first: ``(scores, classes)``, both ``[n, min(k, n_classes)]``.

        Scores are the head's logits. Memory is O(n k), whatever the number of classes.
        """
        if k < 1:
            raise _core.ShapeError(f"k: expected at least 1, got {k}")
        k = min(k, self._fitted().n_classes_)
        parts = [self.head_.topk(hidden, k) for hidden in self._hidden(X)]
        if not parts:
            return np.zeros((0, k), np.float32), self.classes_[np.zeros((0, k), np.int64)]
        scores, ids = (np.concatenate(p) for p in zip(*parts, strict=True))
        return scores, self.classes_[ids]

    def predict(self, X: Any) -> NDArray[Any]:
        """The best class of every example, ``[n]``, also for a model of several labels an example."""
        return self.predict_topk(X, 1)[1][:, 0]

    def decision_function(self, X: Any) -> NDArray[Any]:
        """Logits of all classes, ``[n, n_classes]``: only for few classes or few examples."""
        self._fitted()
        return np.concatenate([self.head_.scores(h) for h in self._hidden(X)] or [np.zeros((0, self.n_classes_))])

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Probabilities of all classes, ``[n, n_classes]``; not for ``squared_hinge``. As big as the logits."""
        self._fitted()
        return np.exp(
            np.concatenate([self.head_.log_prob(h) for h in self._hidden(X)] or [np.zeros((0, self.n_classes_))])
        )

    def score(self, X: Any, Y: Any, sample_weight: Any | None = None) -> float:
        """Share of the examples whose best class is (one of) theirs: accuracy, or precision at 1."""
        self._fitted()
        examples = Examples(X, self.features)
        targets, _ = encode(Y, self.n_classes_ if self._names is None else None, self._names, strict=False)
        if len(targets) != len(examples):
            raise _core.ShapeError(f"Y: expected as many rows as X, {len(examples)}, got {len(targets)}")
        weight = checked_weights(sample_weight, len(examples))
        best = [self.head_.topk(hidden, 1)[1][:, 0] for hidden in self._hidden(X)]
        hits = targets.hits(np.concatenate(best) if best else np.zeros(0, np.int64))
        return float(np.average(hits, weights=weight)) if len(hits) else float("nan")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to one safetensors file, which appears only when it is complete.

        Optimiser state is left out. ``features`` is kept when it is an ``NGramHasher`` without a callable.
        """
        _checkpoint.save_model(self._fitted(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, features: Any | None = None) -> Self:
        """Reads a model that :meth:`save` wrote; give ``features`` where the file has none.

        Raises:
            FileError: damaged, foreign, newer, or not a classifier.
        """
        return _checkpoint.load_model(cls, Path(path), features)

    @property
    def classes_(self) -> NDArray[Any]:
        """``[n_classes]`` values of ``Y`` by class."""
        return np.arange(self._fitted().n_classes_) if self._names is None else self._names

    def _fitted(self) -> Self:
        if hasattr(self, "head_"):
            return self
        message = "this Classifier is not fitted yet; call fit first"
        try:
            from sklearn.exceptions import NotFittedError
        except ImportError:
            raise _core.Error(message) from None
        raise NotFittedError(message)

    def _data(self, X: Any, Y: Any, known: NDArray[Any] | None) -> tuple[Examples, Targets, NDArray[Any] | None]:
        examples = Examples(X, self.features)
        targets, names = encode(Y, self.n_classes if known is None else None, known)
        if len(targets) != len(examples):
            raise _core.ShapeError(f"Y: expected as many rows as X, {len(examples)}, got {len(targets)}")
        if not len(examples):
            raise _core.ShapeError("X: expected at least one example, got none")
        return examples, targets, names

    def _build(self, examples: Examples, targets: Targets, names: NDArray[Any] | None) -> None:
        self._names, self.n_classes_ = names, targets.n_classes
        self.n_features_in_ = examples.epoch(0, None).rows(slice(0, 1)).shape[1]
        options = named_order(self.head_options or {}, examples, targets, self.seed)
        loss = self.loss or ("squared_hinge" if self.head == "sparse" else "sampled_softmax")
        if loss == "sampled_softmax" and self.head == "dense":
            options["negatives"] = min(self.negatives, self.n_classes_)
        shared: dict[str, Any] = {"dtype": self.dtype, "seed": self.seed}
        # The bag has random numbers of its own: with the head's, its first rows would be the head's first rows.
        width = self.intermediate or self.dim
        self.bag_ = EmbeddingBag(
            self.n_features_in_,
            width,
            normalise=self.normalise and self.intermediate is None,
            scale=self.scale,
            dtype=self.dtype,
            seed=self.seed + 1,
        )
        self.dictionary_ = None
        if self.dictionary is not None:
            self.dictionary_ = LinearLayer(width, self.dictionary, dtype=self.dtype, seed=self.seed + 2)
            width = self.dictionary
        self.head_ = _HEADS[self.head](width, self.n_classes_, loss=loss, **shared, **options)
        if loss == "bce" and self.head_.bias is not None:
            self.head_.set_bias(log_odds(targets))

    def _step(self, X: sp.csr_array, target: Any, rate: float, weight: NDArray[Any] | None) -> float:
        options: dict[str, Any] = {"optimizer": self.optimizer, "weight_decay": self.weight_decay}
        try:
            X = drop_features(X, self.dropout, self.seed, self.bag_.steps)
            hidden = self._activate(self.bag_.forward(X))
            loss, grad = self.head_.step(self._expand(hidden), target, rate, sample_weight=weight, **options)
            if self.dictionary_ is not None:
                grad = self.dictionary_.step(hidden, grad, rate, **options)
            if self.intermediate is not None:
                grad *= hidden > 0
            self.bag_.step(X, grad, rate, **options)
        except _core.NonFiniteError as error:
            raise _core.NonFiniteError(f"training runs away at step {self.bag_.steps + 1}: {error}; lower lr") from None
        return float(loss)

    def _hidden(self, X: Any) -> Iterator[NDArray[Any]]:
        self._fitted()
        examples = Examples(X, self.features)
        source = examples.epoch(0, None)
        for first in range(0, len(examples), _SERVE):
            yield self._represent(source.rows(slice(first, first + _SERVE)))

    def _represent(self, X: sp.csr_array) -> NDArray[Any]:
        """What the head sees of some examples."""
        return self._expand(self._activate(self.bag_.forward(X)))

    def _expand(self, hidden: NDArray[Any]) -> NDArray[Any]:
        return hidden if self.dictionary_ is None else self.dictionary_.forward(hidden)

    def _activate(self, hidden: NDArray[Any]) -> NDArray[Any]:
        return hidden if self.intermediate is None else np.maximum(hidden, 0, out=hidden)
