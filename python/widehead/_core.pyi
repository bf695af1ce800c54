# The private extension module. Arrays come in through DLPack (numpy arrays, or the capsules of torch.utils.dlpack);
# outputs are written into arrays of the caller. `None` stands for "not given". Every argument is keyword-only.
# Nothing is copied or converted: rows may be strided, the last axis is contiguous, all arrays lie on one device,
# outputs are writable. NumPy has no bfloat16, so an array of uint16 is read as bfloat16 wherever bfloat16 is taken.
#
# On a GPU `gpu` is a dict: "stream", a cudaStream_t as an integer; "scratch", called with n, returns an int64 array [n]
# in the device's memory to work in; "faults", int64 [5] or None, takes the first bad value (see raise_fault);
# "refused", int32 [1] or None: not 0 beforehand, the call changes no weights; 1 afterwards, it met a bad value. Nothing
# waits.
from collections.abc import Callable
from typing import Any, TypedDict

Array = Any

class Gpu(TypedDict):
    stream: int
    scratch: Callable[[int], Array]
    faults: Array | None
    refused: Array | None

__version__: str
cuda_built: bool
cuda_emulated: bool

class Error(RuntimeError): ...
class ShapeError(Error, ValueError): ...
class DtypeError(Error, TypeError): ...
class LabelError(Error, ValueError): ...
class NonFiniteError(Error, ValueError): ...
class CapacityError(Error, MemoryError): ...
class BackendError(Error): ...

# First numbers of a record: a number that is not finite, a label out of range.
NON_FINITE: int
LABEL_RANGE: int

# Throws what the five numbers of a record in `faults`, copied back from the device, say; nothing for zeros.
def raise_fault(record: list[int]) -> None: ...
# The file of cuBLAS, for when neither the process nor the loader has one.
def set_cublas_path(path: str) -> None: ...

def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def set_isa(name: str) -> None: ...
def current_isa() -> str: ...
def supported_isas() -> list[str]: ...

# Targets: indptr None means one class an example. loss: "softmax" | "bce" | "squared_hinge". With first_class the layer
# holds the classes from there on of n_classes, and class_weight is of all: see ranges.h for what its losses are.
def dense_forward(
    *, hidden: Array, weight: Array, bias: Array | None, offset: Array | None = None,
    indptr: Array | None, indices: Array, values: Array | None, n_classes: int | None = None,
    first_class: int | None = None,
    loss: str, label_smoothing: float = 0.0, lse_penalty: float = 0.0, softcap: float = 0.0,
    class_weight: Array | None = None, ignore_index: int = -100,
    losses: Array | None, output: Array | None, lse: Array | None,
    tf32: bool = False, gpu: Gpu | None = None,
) -> None: ...

# update: None, or a dict with optimizer ("sgd" | "adam" | "adagrad"), rounding ("nearest" | "stochastic" | "kahan"),
# lr, momentum, beta1, beta2, eps, weight_decay, step, seed, first_row, and the arrays first, second, compensation,
# bias_first, bias_second (each may be absent); on a GPU device_lr float32 [1] and device_step int64 [1] (steps done so
# far) take the place of lr and step. Returns the number of tiles skipped by the gradient filter; on a GPU the number is
# added to `filtered`, int64 [1].
def dense_backward(
    *, hidden: Array, weight: Array, bias: Array | None, offset: Array | None = None,
    indptr: Array | None, indices: Array, values: Array | None, n_classes: int | None = None,
    first_class: int | None = None,
    loss: str, label_smoothing: float = 0.0, lse_penalty: float = 0.0, softcap: float = 0.0,
    class_weight: Array | None = None, ignore_index: int = -100,
    lse: Array | None, grad_losses: Array, grad_output: Array | None = None, grad_lse: Array | None = None,
    grad_hidden: Array | None = None, grad_weight: Array | None = None, grad_bias: Array | None = None,
    update: dict[str, Any] | None = None,
    losses: Array | None = None, output: Array | None = None,
    filter_eps: float = 0.0, filtered: Array | None = None, tf32: bool = False, gpu: Gpu | None = None,
) -> int: ...

def dense_logits(
    *, hidden: Array, weight: Array, bias: Array | None, offset: Array | None = None, softcap: float = 0.0,
    logits: Array, gpu: Gpu | None = None,
) -> None: ...
def dense_scores(
    *, hidden: Array, weight: Array, bias: Array | None, softcap: float = 0.0, classes: Array, scores: Array,
    gpu: Gpu | None = None,
) -> None: ...
def dense_topk(
    *, hidden: Array, weight: Array, bias: Array | None, offset: Array | None = None, softcap: float = 0.0, k: int,
    exclude_indptr: Array | None = None, exclude_indices: Array | None = None,
    scores: Array, classes: Array, lse: Array | None = None, gpu: Gpu | None = None,
) -> None: ...

# Softmax over several ranges of classes: adds the terms of the joint lse to the sums of the ranges' losses and output.
def join_softmax(
    *, indptr: Array | None, indices: Array, values: Array | None, n_classes: int, label_smoothing: float = 0.0,
    lse_penalty: float = 0.0, class_weight: Array | None = None, ignore_index: int = -100,
    lse: Array, losses: Array | None, output: Array | None = None, gpu: Gpu | None = None,
) -> None: ...

# Row updates of a weight matrix from row gradients: rows[i] of weight gets the step with grad[i]. Rows are distinct; on
# a GPU they ascend, and rows of -1, which come last, are passed over (gather_rows gives zeros for them).
def update_rows(
    *, weight: Array, rows: Array, grad: Array, bias: Array | None = None, grad_bias: Array | None = None,
    update: dict[str, Any], gpu: Gpu | None = None,
) -> None: ...
# out[i] = weight[rows[i]] (same dtype); bias likewise.
def gather_rows(*, weight: Array, rows: Array, out: Array, gpu: Gpu | None = None) -> None: ...

# Shared negatives of sampled softmax: n draws with replacement keyed by (seed, step). Fills `draws` [n] int64.
# proposal: "uniform" | "log_uniform" | "alias" (with the alias table's arrays threshold [D] float32, alias [D] int64).
def sample_classes(
    *, draws: Array, n_classes: int, proposal: str, threshold: Array | None = None, alias: Array | None = None,
    seed: int, step: int, device_seed: Array | None = None, gpu: Gpu | None = None,
) -> None: ...
# Walker's table of the distribution weight / sum(weight): weight [D] float64, finite and positive -> threshold, alias.
def alias_table(*, weight: Array, threshold: Array, alias: Array) -> None: ...
# Fills `out` [rows, cols] with uniform numbers in [low, high) keyed by (seed, row): the initial weights, the same on
# every shard.
def init_uniform(
    *, out: Array, low: float, high: float, seed: int, first_row: int = 0, gpu: Gpu | None = None
) -> None: ...

# Test hooks for the generator: Philox4x32-10 of a counter and a key.
def philox(*, counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]: ...

# Strings are pairs (text [length] int32 code points, offsets [n + 1] int64). Strings and rows come back as new arrays.
Strings = tuple[Array, Array]

def ngrams(
    *, text: Strings, romanised: Strings | None, n_features: int, min_n: int, max_n: int, words: bool,
    whole_words: bool, separate: bool, binary: bool, norm: str,
) -> tuple[Array, Array, Array]: ...  # indptr int64, indices int32, values float32
# String c of the table replaces code point c; code points past it stay.
def transliterate(*, text: Strings, table: Strings) -> Strings: ...
def typos(*, text: Strings, rate: float, second: float, seed: int, step: int, first_row: int) -> Strings: ...

# Embedding bag: out[b] = sum_j values[j] table[indices[j]], or that scaled to length `scale`. `norms`, and `out` of the
# step, serve `normalise` only.
def bag_forward(
    *, indptr: Array, indices: Array, values: Array | None, table: Array, normalise: bool, scale: float, out: Array,
    norms: Array | None = None,
) -> None: ...
def bag_step(
    *, indptr: Array, indices: Array, values: Array | None, table: Array, normalise: bool, scale: float,
    out: Array | None = None, norms: Array | None = None, grad: Array, update: dict[str, Any],
) -> None: ...

# The sparse head. index [ceil(n_classes / group_size), fan_in], uint16 or int32, distinct and ascending in a row (as
# draw_index makes it; check_index says so of one that comes from outside); weight, grad_weight and the state arrays of
# an update are [n_classes, fan_in]; hidden [batch, in_features]. Everything else as in the dense head's functions.
def sparse_forward(
    *, hidden: Array, weight: Array, index: Array, bias: Array | None, group_size: int = 1,
    indptr: Array | None, indices: Array, values: Array | None, n_classes: int | None = None,
    first_class: int | None = None,
    loss: str, label_smoothing: float = 0.0, lse_penalty: float = 0.0,
    class_weight: Array | None = None, ignore_index: int = -100,
    losses: Array | None, output: Array | None, lse: Array | None, gpu: Gpu | None = None,
) -> None: ...
def sparse_backward(
    *, hidden: Array, weight: Array, index: Array, bias: Array | None, group_size: int = 1,
    indptr: Array | None, indices: Array, values: Array | None, n_classes: int | None = None,
    first_class: int | None = None,
    loss: str, label_smoothing: float = 0.0, lse_penalty: float = 0.0,
    class_weight: Array | None = None, ignore_index: int = -100,
    lse: Array | None, grad_losses: Array, grad_output: Array | None = None, grad_lse: Array | None = None,
    grad_hidden: Array | None = None, grad_weight: Array | None = None, grad_bias: Array | None = None,
    update: dict[str, Any] | None = None, losses: Array | None = None, output: Array | None = None,
    gpu: Gpu | None = None,
) -> None: ...
def sparse_logits(
    *, hidden: Array, weight: Array, index: Array, bias: Array | None, group_size: int = 1, logits: Array,
    gpu: Gpu | None = None,
) -> None: ...
def sparse_scores(
    *, hidden: Array, weight: Array, index: Array, bias: Array | None, group_size: int = 1, classes: Array,
    scores: Array, gpu: Gpu | None = None,
) -> None: ...
def sparse_topk(
    *, hidden: Array, weight: Array, index: Array, bias: Array | None, group_size: int = 1, k: int,
    exclude_indptr: Array | None = None, exclude_indices: Array | None = None,
    scores: Array, classes: Array, lse: Array | None = None, gpu: Gpu | None = None,
) -> None: ...
def draw_index(
    *, index: Array, in_features: int, seed: int, first_row: int = 0, gpu: Gpu | None = None
) -> None: ...

# On a GPU a bad row is recorded in "faults" and sets "refused".
def check_index(*, index: Array, in_features: int, gpu: Gpu | None = None) -> None: ...

# Moves the weakest connections to other inputs; weight, index and the state arrays change in place. mode:
# "magnitude_global" | "magnitude_row" | "threshold". Returns how many moved; None on a GPU, where moved, int64 [1],
# takes the number, and device_step, int64 [1], takes the place of step.
def rewire(
    *, weight: Array, index: Array, group_size: int = 1, in_features: int,
    first: Array | None = None, second: Array | None = None, compensation: Array | None = None,
    mode: str = "magnitude_global", fraction: float = 0.1, threshold: float = 0.0, keep_value: bool = False,
    seed: int, step: int, first_row: int = 0, device_step: Array | None = None, moved: Array | None = None,
    gpu: Gpu | None = None,
) -> Any: ...

class ExactBatch:
    """What a forward pass of the exact head keeps for its backward pass."""

class HashIndex:
    """Hash tables over the rows of a matrix; see hash_index.h. family: "wta" | "dwta" | "simhash"."""

    def __init__(
        self, features: int, *, bias: bool = False, family: str = "wta", tables: int = 50, hashes: int = 4,
        window: int = 8, max_bucket: int = 0, seed: int = 0,
    ) -> None: ...
    def build(self, weight: Array, bias: Array | None = None) -> None: ...
    # The number of entries that have moved. ids int64 [n].
    def update(self, ids: Array, weight: Array, bias: Array | None = None) -> int: ...
    # ids int64 and counts int32, both [batch, candidates]; -1 and 0 where there are no more.
    def query(
        self, hidden: Array, *, ids: Array, counts: Array | None = None, probes: int = 0, ranked: bool = True
    ) -> None: ...
    # out int32 [n, tables]; -1: in no table.
    def keys(self, rows: Array, bias: Array | None = None, *, out: Array) -> None: ...
    def statistics(self) -> dict[str, int]: ...
    @property
    def rows(self) -> int: ...

class HashedBatch:
    """What a forward pass of the hashed head keeps."""

    @property
    def pairs(self) -> int: ...
    @property
    def rows(self) -> int: ...
    # The distinct classes, ascending; out int64 [rows].
    def copy_rows(self, out: Array) -> None: ...

# Softmax over candidates (int64 [batch, n], -1: none), targets and negatives (int64 [n], for the whole batch). losses,
# lse, output float64 [batch]. estimator: "restricted" | "corrected" | "importance" (wants counts int32 and tables).
def hashed_forward(
    *, hidden: Array, weight: Array, bias: Array | None = None, indptr: Array | None, indices: Array,
    values: Array | None = None, ignore_index: int = -100, estimator: str = "corrected",
    candidates: Array | None = None, counts: Array | None = None, tables: int = 1, negatives: Array | None = None,
    losses: Array, lse: Array | None = None, output: Array | None = None,
) -> HashedBatch: ...
# grad_losses float64 [batch]. drift float32 [n_classes] grows by what rows of the update move; returns how many passed
# drift_limit, which are in moved (int64, room for all rows of the batch).
def hashed_backward(
    batch: HashedBatch, *, grad_losses: Array, weight: Array, bias: Array | None = None,
    grad_hidden: Array | None = None, update: dict[str, Any] | None = None, drift: Array | None = None,
    drift_limit: float = 0.03, moved: Array | None = None, grad_rows: Array | None = None,
    grad_bias: Array | None = None,
) -> int: ...

class ExactState:
    """State of the exact head beside its weight [n_classes, in_features], float32 or float64, whose memory it keeps
    and uses; between calls of consolidate() that holds a factor of the weights. velocity: the same, for momentum."""

    def __init__(
        self,
        weight: Array,
        velocity: Array | None = None,
        *,
        method: str = "blocked",
        wide: bool = False,
        block_steps: int = 4,
        radix: int = 8,
        max_kappa: float = 4.0,
    ) -> None: ...
    # A [nnz], q [batch] and s [batch], float64, are written.
    def forward(
        self,
        *,
        hidden: Array,
        indptr: Array | None,
        indices: Array,
        values: Array | None = None,
        train: bool,
        A: Array,
        q: Array,
        s: Array,
    ) -> ExactBatch: ...
    def backward(
        self, batch: ExactBatch, *, grad_A: Array, grad_q: Array, grad_s: Array, grad_hidden: Array | None = None
    ) -> None: ...
    def step(
        self, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.0, column_scale: Array | None = None
    ) -> None: ...
    def rows(self, ids: Array, out: Array) -> None: ...
    def grad_norm2(self) -> float: ...
    def grad_columns(self, out: Array) -> None: ...
    def scale_grad(self, factor: float) -> None: ...
    def zero_grad(self) -> None: ...
    def pending(self) -> int: ...
    def consolidate(self) -> None: ...
    def refresh(self) -> None: ...
    def diagnostics(self) -> dict[str, float]: ...

# loss: "squared_error" | "spherical_softmax" | "taylor_softmax" | "z_loss"; all arrays float64. ignore_index: on a GPU
# only, of single labels that are none.
def spherical_loss(
    *,
    loss: str,
    eps: float,
    a: float,
    b: float,
    n_classes: int,
    indptr: Array | None,
    indices: Array,
    values: Array | None = None,
    A: Array,
    q: Array,
    s: Array,
    losses: Array | None = None,
    grad_A: Array | None = None,
    grad_q: Array | None = None,
    grad_s: Array | None = None,
    ignore_index: int | None = None,
    gpu: Gpu | None = None,
) -> None: ...

# The exact head's blocked method on a GPU; a block is one step there. weight [n_classes, in_features] float32 or
# float64, velocity the same for momentum, state int64 [exact_state_bytes / 8] with zeros before exact_init, batch int64
# [exact_batch_bytes / 8]; both begin at multiples of 256 bytes. A, q, s and their gradients are float64. Nothing waits,
# and a graph may capture a step. exact_init: also after writing to consolidated weights. exact_backward takes the
# gradients in the place of earlier ones of the batch. A step changes nothing if its batch, or the caller's flag, was
# refused, or if the weights have taken a step since the batch's exact_forward.
def exact_state_bytes(
    *, weight: Array, velocity: Array | None = None, wide: bool = False, gpu: Gpu | None = None
) -> int: ...
def exact_batch_bytes(
    *, weight: Array, velocity: Array | None = None, wide: bool = False, examples: int, targets: int,
    gpu: Gpu | None = None,
) -> int: ...
def exact_init(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, gpu: Gpu | None = None
) -> None: ...
def exact_forward(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, batch: Array, hidden: Array,
    indptr: Array | None, indices: Array, ignore_index: int | None = None, A: Array, q: Array, s: Array,
    gpu: Gpu | None = None,
) -> None: ...
def exact_backward(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, batch: Array, grad_A: Array,
    grad_q: Array, grad_s: Array, grad_hidden: Array | None = None, gpu: Gpu | None = None,
) -> None: ...
# norm2 [1]: |dL/dweight|^2; columns [in_features]: mean squares of its columns. float64.
def exact_gradient(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, batch: Array, examples: int,
    targets: int, norm2: Array | None = None, columns: Array | None = None, gpu: Gpu | None = None,
) -> None: ...
# device_lr float32 [1] takes the place of lr; grad_scale [1] and column_scale [in_features] float64.
def exact_step(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, batch: Array, examples: int,
    targets: int, lr: float, weight_decay: float = 0.0, momentum: float = 0.0, device_lr: Array | None = None,
    grad_scale: Array | None = None, column_scale: Array | None = None, gpu: Gpu | None = None,
) -> None: ...
def exact_rows(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, ids: Array, out: Array,
    gpu: Gpu | None = None,
) -> None: ...
# Whatever "refused" says: the weights stay the same.
def exact_consolidate(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, gpu: Gpu | None = None
) -> None: ...
# squares [width * width] = R'R and sums [width] = R'1 of R = [weight | velocity], float64.
def exact_gram(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, squares: Array | None = None,
    sums: Array | None = None, gpu: Gpu | None = None,
) -> None: ...
# out float64 [6]: steps since the rows were together, steps since exact_init, matrices of the log, rows fetched by
# steps, rows that the log has multiplied, |weight|^2.
def exact_diagnostics(
    *, weight: Array, velocity: Array | None = None, state: Array, wide: bool = False, out: Array,
    gpu: Gpu | None = None,
) -> None: ...
