"""test_bag.py -- embedding bag: forward, step and every optimiser against dense float64 matrices"""

import numpy as np
import pytest
import scipy.sparse as sp

import widehead
from widehead.bag import EmbeddingBag
from widehead.numpy import from_bfloat16, to_bfloat16

V, B = 37, 11


def batch(seed, n_features=V, rows=B, density=0.2, index=np.int32):
    """Sparse rows with repeated columns, an empty first row, negative values, and a column that most rows have."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, max(2, int(2 * density * n_features)), rows)
    counts[0] = 0
    indptr = np.append(0, np.cumsum(counts))
    indices = rng.integers(0, n_features, indptr[-1])
    indices[::4] = n_features // 2
    values = rng.standard_normal(indptr[-1]).astype(np.float32)
    return sp.csr_array((values, indices.astype(index), indptr.astype(index)), shape=(rows, n_features))


def dense(X):
    return X.astype(np.float64).toarray()


def weights(bag):
    return from_bfloat16(bag.weight).astype(np.float64) if bag.dtype == "bfloat16" else bag.weight.astype(np.float64)


def output(X, W, normalise, scale):
    s = dense(X) @ W
    if not normalise:
        return s
    norm = np.linalg.norm(s, axis=1, keepdims=True)
    return np.divide(scale * s, norm, out=np.zeros_like(s), where=norm > 0)


def bound(X, W, dtype):
    """Error of a float32 sum of k products: k ulps of the sum of the terms' sizes, and some for the norm."""
    terms = np.abs(dense(X)) @ np.abs(W)
    return (
        (np.diff(X.indptr).max() + 8)
        * (2.0**-52 if dtype == "float64" else 2.0**-23)
        * terms.max(axis=1, keepdims=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 3, 8, 37, 130])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_forward_is_the_product(isa, dtype, dim, index):
    bag = EmbeddingBag(V, dim, dtype=dtype, seed=3)
    X = batch(dim, index=index)
    assert X.indices.dtype == index
    out = bag.forward(X)
    assert out.dtype == (np.float64 if dtype == "float64" else np.float32) and out.shape == (B, dim)
    W = weights(bag)
    assert np.all(np.abs(out - output(X, W, False, 1)) <= bound(X, W, dtype))
    np.testing.assert_array_equal(out[0], 0)
    assert np.abs(out).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_normalised_rows_have_the_length_of_scale(isa, dtype):
    bag = EmbeddingBag(V, 21, normalise=True, scale=5.0, dtype=dtype)
    X = batch(1)
    out = bag.forward(X)
    W = weights(bag)
    plain = output(X, W, False, 1)
    size = np.linalg.norm(plain, axis=1, keepdims=True)
    error = np.divide(5 * bound(X, W, dtype), size, out=np.zeros_like(size), where=size > 0) * 8
    assert np.all(np.abs(out - output(X, W, True, 5.0)) <= error)
    lengths = np.linalg.norm(out, axis=1)
    filled = np.diff(X.indptr) > 0
    np.testing.assert_allclose(lengths[filled], 5.0, rtol=1e-5)
    np.testing.assert_array_equal(lengths[~filled], 0)


def test_dense_input_and_other_formats_give_the_same():
    bag = EmbeddingBag(V, 9)
    X = batch(2)
    X.sum_duplicates()
    expected = bag.forward(X)
    for other in (X.toarray(), X.tocoo(), X.tocsc(), sp.csr_matrix(X)):
        np.testing.assert_array_equal(bag.forward(other), expected)
    np.testing.assert_allclose(bag.forward(X.astype(np.float64)), expected)


class Reference:
    """The optimisers of update.h in float64, on the rows that a batch touches."""

    def __init__(self, W, optimizer, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.W, self.optimizer, self.lr, self.betas, self.eps, self.decay = (
            W.copy(),
            optimizer,
            lr,
            betas,
            eps,
            weight_decay,
        )
        self.m, self.v, self.steps = np.zeros_like(W), np.zeros_like(W), 0

    def gradient(self, X, grad, normalise, scale):
        """dL/dW by the chain rule of out = scale s / |s|."""
        if normalise:
            s = dense(X) @ self.W
            norm = np.linalg.norm(s, axis=1, keepdims=True)
            u = np.divide(s, norm, out=np.zeros_like(s), where=norm > 0)
            grad = np.divide(
                scale * (grad - u * (u * grad).sum(1, keepdims=True)), norm, out=np.zeros_like(s), where=norm > 0
            )
        return dense(X).T @ grad

    def step(self, X, grad, normalise=False, scale=1.0):
        G = self.gradient(X, grad, normalise, scale)
        self.steps += 1
        for row in np.unique(X.indices):
            g, w = G[row], self.W[row].copy()
            if self.optimizer == "sgd":
                self.W[row] = w - self.lr * (g + self.decay * w)
            elif self.optimizer == "adagrad":
                self.v[row] += np.mean(g * g)
                self.W[row] = w - self.lr * self.decay * w - self.lr * g / (np.sqrt(self.v[row]) + self.eps)
            else:
                b1, b2 = self.betas
                self.m[row] = b1 * self.m[row] + (1 - b1) * g
                self.v[row] = b2 * self.v[row] + (1 - b2) * g * g
                m, v = self.m[row] / (1 - b1**self.steps), self.v[row] / (1 - b2**self.steps)
                self.W[row] = w - self.lr * self.decay * w - self.lr * m / (np.sqrt(v) + self.eps)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
# A unit vector of one dimension has no gradient: normalisation begins at two.
@pytest.mark.parametrize("normalise, dim", [(False, 1), (False, 5), (False, 24), (True, 2), (True, 5), (True, 24)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_follow_the_reference_in_float64(isa, optimizer, normalise, dim, decay):
    scale = 3.0 if normalise else 1.0
    bag = EmbeddingBag(V, dim, normalise=normalise, scale=scale, dtype="float64", seed=1)
    reference = Reference(bag.weight, optimizer, 0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    rng = np.random.default_rng(5)
    for i in range(4):
        X, grad = batch(10 + i), rng.standard_normal((B, dim))
        if i % 2:  # with and without what forward kept
            bag.forward(X)
        bag.step(X, grad, 0.1, optimizer, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
        reference.step(X, grad, normalise, scale)
        np.testing.assert_allclose(bag.weight, reference.W, rtol=0, atol=2e-13)
    assert bag.steps == 4
    assert np.abs(bag.weight - EmbeddingBag(V, dim, dtype="float64", seed=1).weight).max() > 0.01


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("normalise", [False, True])
def test_steps_in_float32(isa, optimizer, normalise):
    bag = EmbeddingBag(V, 40, normalise=normalise, scale=2.0, seed=1)
    reference = Reference(bag.weight.astype(np.float64), optimizer, 0.05, eps=1e-4)
    grad = np.random.default_rng(0).standard_normal((B, 40)).astype(np.float32)
    bag.step(batch(3), grad, 0.05, optimizer, eps=1e-4)
    reference.step(batch(3), grad.astype(np.float64), normalise, 2.0)
    np.testing.assert_allclose(bag.weight, reference.W, rtol=0, atol=3e-6)
    assert np.abs(bag.weight - EmbeddingBag(V, 40, seed=1).weight).max() > 0.01


def test_numeric_derivative_of_normalisation():
    bag = EmbeddingBag(V, 6, normalise=True, scale=4.0, dtype="float64")
    X, probe = batch(8), np.random.default_rng(1).standard_normal((B, 6))
    before = bag.weight.copy()
    bag.step(X, probe, 1.0, "sgd")
    gradient = before - bag.weight
    direction = np.random.default_rng(2).standard_normal(before.shape)
    values = []
    for h in (1e-6, -1e-6):
        bag.weight = before + h * direction
        values.append((bag.forward(X) * probe).sum())
    assert (
        abs((values[0] - values[1]) / 2e-6 - (gradient * direction).sum()) < 1e-6 * np.abs(gradient * direction).sum()
    )


def test_untouched_rows_keep_every_bit():
    bag = EmbeddingBag(V, 12, normalise=True)
    before = bag.weight.copy()
    X = sp.csr_array((np.ones(3, np.float32), [2, 5, 2], [0, 0, 3]), shape=(2, V))
    for _ in range(3):
        bag.step(X, np.ones((2, 12), np.float32), 0.1, "adam", weight_decay=0.5)
    same = np.flatnonzero((bag.weight == before).all(axis=1))
    assert same.tolist() == [i for i in range(V) if i not in (2, 5)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_same_bits_for_any_number_of_threads(isa, dtype, optimizer):
    # Enough entries for several chunks of the sort and many tasks, and columns that all rows share.
    rng = np.random.default_rng(4)
    n, rows = 5000, 600
    indices = rng.integers(0, n, (rows, 100))
    indices[:, :5] = np.arange(5)
    X = sp.csr_array(
        (rng.random(rows * 100, dtype=np.float32), indices.ravel(), np.arange(rows + 1) * 100), shape=(rows, n)
    )
    grad = rng.standard_normal((rows, 18)).astype(np.float32)
    results = []
    for threads in (1, 2, 4):
        widehead.set_num_threads(threads)
        bag = EmbeddingBag(n, 18, normalise=True, dtype=dtype)
        for _ in range(2):
            bag.step(X, grad, 0.1, optimizer)
        results.append((bag.weight.copy(), bag.forward(X)))
    for weight, out in results[1:]:
        np.testing.assert_array_equal(weight, results[0][0])
        np.testing.assert_array_equal(out, results[0][1])
    assert (results[0][0] != EmbeddingBag(n, 18, dtype=dtype).weight).any(axis=1).mean() > 0.99


def test_large_tables_sort_by_all_bits():
    n = 3_000_001
    rng = np.random.default_rng(6)
    bag = EmbeddingBag(n, 2, init=0.0)
    X = sp.csr_array((np.ones(900, np.float32), rng.integers(0, n, 900), np.arange(0, 901, 9)), shape=(100, n))
    X.indices[-1] = n - 1
    grad = rng.standard_normal((100, 2)).astype(np.float32)
    bag.step(X, grad, 1.0, "sgd")
    expected = -(X.T @ grad)
    np.testing.assert_allclose(bag.weight, expected, atol=1e-6)
    assert np.abs(bag.weight[-1]).max() > 0


def test_bfloat16_rounds_stochastically_without_bias():
    # Steps of a quarter ulp vanish under rounding to nearest; on average stochastic rounding keeps them.
    n, dim, steps = 64, 64, 40
    X = sp.csr_array(np.eye(n, dtype=np.float32))
    moved = {}
    for rounding in ("stochastic", "nearest", "kahan"):
        bag = EmbeddingBag(n, dim, dtype="bfloat16", seed=9)
        bag.weight = to_bfloat16(np.full((n, dim), 1.0, np.float32))
        for _ in range(steps):
            bag.step(X, np.full((n, dim), -1.0, np.float32), 2.0**-9, "sgd", rounding=rounding)
        moved[rounding] = from_bfloat16(bag.weight).astype(np.float64).mean() - 1
    assert moved["nearest"] == 0
    assert abs(moved["kahan"] - steps * 2.0**-9) <= 2.0**-7
    # Each step is a coin of variance below ulp^2 / 4 with ulp 2^-7, over 4096 weights.
    assert abs(moved["stochastic"] - steps * 2.0**-9) < 5 * 2.0**-8 * np.sqrt(steps / (n * dim))


def test_same_seed_same_bits_other_seed_other_bits():
    X, grad = batch(1), np.random.default_rng(1).standard_normal((B, 16)).astype(np.float32)

    def train(seed):
        bag = EmbeddingBag(V, 16, dtype="bfloat16", seed=seed)
        for _ in range(3):
            bag.step(X, grad, 0.01)
        return bag.weight

    np.testing.assert_array_equal(train(5), train(5))
    assert (train(5) != train(6)).mean() > 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_a_file_bit_for_bit(tmp_path, optimizer, dtype):
    grad = np.random.default_rng(1).standard_normal((B, 7)).astype(np.float32)
    bag = EmbeddingBag(V, 7, normalise=True, scale=2.0, dtype=dtype, seed=11)
    options = {"rounding": "kahan"} if optimizer == "sgd" else {}
    for i in range(6):
        if i == 3:
            bag.save(tmp_path / "bag", optimizer=True)
        bag.step(batch(i), grad, 0.1, optimizer, **options)
    again = EmbeddingBag.load(tmp_path / "bag")
    for i in range(3, 6):
        again.step(batch(i), grad, 0.1, optimizer, **options)
    np.testing.assert_array_equal(again.weight, bag.weight)
    np.testing.assert_array_equal(again.forward(batch(0)), bag.forward(batch(0)))
    assert again.steps == bag.steps and repr(again) == repr(bag)


def test_what_forward_kept_does_not_outlive_a_step():
    bag, fresh = (EmbeddingBag(V, 5, normalise=True, dtype="float64") for _ in range(2))
    X, grad = batch(4), np.ones((B, 5))
    bag.forward(X)[:] = np.nan  # the caller may write into his array
    for _ in range(2):
        bag.step(X, grad, 0.5, "sgd")
        fresh.step(X.copy(), grad, 0.5, "sgd")
    np.testing.assert_array_equal(bag.weight, fresh.weight)
    bag.forward(X)
    bag.weight = bag.weight * 2.0  # nor does it outlive other weights
    fresh.weight = fresh.weight * 2.0
    bag.step(X, grad, 0.5, "sgd")
    fresh.step(X.copy(), grad, 0.5, "sgd")
    np.testing.assert_array_equal(bag.weight, fresh.weight)


def test_empty_batches():
    bag = EmbeddingBag(V, 4, normalise=True)
    before = bag.weight.copy()
    for rows in (0, 3):
        nothing = sp.csr_array((rows, V), dtype=np.float32)
        np.testing.assert_array_equal(bag.forward(nothing), np.zeros((rows, 4)))
        bag.step(nothing, np.ones((rows, 4), np.float32), 0.1)
    np.testing.assert_array_equal(bag.weight, before)


def bad_csr(column):
    X = batch(1)
    X.indices[3] = column
    return X


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"X": np.ones((B, V + 1))}, widehead.ShapeError, "X: expected shape"),
        ({"X": bad_csr(V)}, widehead.LabelError, f"feature {V} at position 3"),
        ({"X": bad_csr(-1)}, widehead.LabelError, "feature -1 at position 3"),
        ({"X": np.array([["a"] * V])}, widehead.DtypeError, "X: expected"),
        ({"X": batch(1) * np.float32("nan")}, widehead.NonFiniteError, "input"),
        ({"grad": np.ones((B, 5), np.float32)}, widehead.ShapeError, "grad"),
        ({"grad": np.ones((B - 1, 4), np.float32)}, widehead.ShapeError, "grad"),
        ({"grad": np.ones((B, 4))}, widehead.DtypeError, "grad"),
        ({"grad": np.full((B, 4), np.inf, np.float32)}, widehead.NonFiniteError, "grad"),
        ({"lr": float("nan")}, widehead.ShapeError, "lr"),
        ({"optimizer": "momentum"}, widehead.ShapeError, "optimizer"),
        ({"rounding": "up"}, widehead.ShapeError, "rounding"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_and_changes_nothing(change, error, message):
    bag = EmbeddingBag(V, 4, normalise=True)
    good = {"X": batch(1), "grad": np.ones((B, 4), np.float32), "lr": 0.1, "optimizer": "adagrad"}
    bag.step(**good)
    weight, steps = bag.weight.copy(), bag.steps
    with pytest.raises(error, match=message):
        bag.step(**{**good, **change})
    np.testing.assert_array_equal(bag.weight, weight)
    assert bag.steps == steps
    bag.step(**good)
    assert (bag.weight != weight).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_features": 0}, "n_features"),
        ({"dim": 0}, "dim"),
        ({"dtype": "float16"}, "dtype"),
        ({"scale": 0.0, "normalise": True}, "scale"),
        ({"scale": float("inf"), "normalise": True}, "scale"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(widehead.Error, match=message):
        EmbeddingBag(**{"n_features": 5, "dim": 3, **arguments})
