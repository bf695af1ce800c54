"""gpu_cells.py -- the GPU benchmark's grid, the order it is measured in, its time budget and the floors of each cell.

No PyTorch here: what decides what gets measured can be tested anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

GIB = 2**30
EXPS_PER_CLOCK = 16  # a multiprocessor's special-function units, compute capability 5.0 to 10.x

FUSED, PLAIN = "widehead fused", "widehead plain"
TORCH, COMPILED, CHUNKED = "torch", "torch.compile", "torch linear_cross_entropy"
CCE, CCE_FILTERED, LIGER = "cut_cross_entropy", "cut_cross_entropy filtered", "liger_kernel"
METHODS = (FUSED, PLAIN, TORCH, CHUNKED, LIGER, CCE, CCE_FILTERED, COMPILED)
# A new shape costs them seconds of compilation: outside the leading cells they would eat the others' time.
SLOW_TO_START = (COMPILED, CCE_FILTERED, CCE)


@dataclass(frozen=True)
class Cell:
    classes: int
    features: int
    batch: int

    @property
    def label(self) -> str:
        return f"{human(self.classes)} x {self.features}, batch {self.batch}"

    @property
    def weight_bytes(self) -> int:
        """bfloat16."""
        return 2 * self.classes * self.features

    @property
    def flops(self) -> int:
        """What any method must do: logits, dH and dW."""
        return 6 * self.batch * self.classes * self.features


def human(n: int) -> str:
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return f"{n:,}"


# These have every method, and come first whatever the budget: a language model's head, then the sizes that this library
# is for.
LEADING = (Cell(2**17, 4096, 8192), Cell(2**20, 256, 8192), Cell(2**20, 64, 8192), Cell(2**22, 64, 8192))
NEXT = (Cell(2**22, 64, 1024),)
FEATURES = {2**17: (64, 256, 1024, 4096), 2**20: (64, 256, 1024), 2**22: (64, 256, 1024)}
BATCHES = (8192, 1024)


def grid() -> list[Cell]:
    """Every cell, the most telling first, then by rising number of classes."""
    cells = [Cell(D, d, B) for D, widths in FEATURES.items() for B in BATCHES for d in reversed(widths)]
    first = (*LEADING, *NEXT)
    return [*first, *(cell for cell in cells if cell not in first)]


def rehearsal() -> list[Cell]:
    """Sizes that a CPU does in no time, for a dry run."""
    return [Cell(1000, 16, 32), Cell(2000, 8, 16)]


def methods_of(cell: Cell, chosen: Iterable[str], everywhere: bool) -> list[str]:
    """The methods that a cell measures."""
    return [name for name in chosen if everywhere or cell in LEADING or name not in SLOW_TO_START]


class Budget:
    """Seconds to spend; `clock` is time.monotonic unless a test brings its own."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def allows(self, seconds: float) -> bool:
        return self.left() >= seconds


def least_seconds(cell: Cell, names: list[str], gemm_flops: float) -> float:
    """What the cell takes at the very least: making its weights, and each method twice at a third of the GEMM rate."""
    slow = sum(name in SLOW_TO_START for name in names)
    return 0.5 + 2 * slow + 2 * len(names) * cell.flops / (gemm_flops / 3)


def floors(cell: Cell, ceilings: dict[str, float]) -> dict[str, float]:
    """Seconds below which no step can go, one for each resource, and the largest.

    `ceilings`: gemm_flops and copy_bytes a second as measured in the same run, exps a second.
    Bytes: the log-sum-exp needs the whole row of logits before the first gradient, so W is read twice, and written
    once. Flops: with the logits recomputed, four products. Exponentials: each logit's in both passes.
    """
    work = cell.batch * cell.classes
    found = {
        "bytes_s": 3 * cell.weight_bytes / ceilings["copy_bytes"],
        "flops_s": 8 * work * cell.features / ceilings["gemm_flops"],
        "exps_s": 2 * work / ceilings["exps"] if ceilings["exps"] else 0.0,  # 0: the clock is not known
    }
    return found | {"floor_s": max(found.values())}


def exps_per_second(multiprocessors: int, clock_mhz: float) -> float:
    return EXPS_PER_CLOCK * multiprocessors * clock_mhz * 1e6


def runs_for(seconds: float, share: float) -> tuple[int, int]:
    """(turns, runs in each) for a method of so many seconds that may use `share` seconds; turns alternate among
    methods.
    """
    if seconds > share / 3:
        return 1, 1
    turns = 3
    return turns, max(1, min(7, int(share / (turns * seconds)) - 1))


def headline_classes(free_bytes: int, features: int, wanted: int = 100_000_000, share: float = 0.72) -> int:
    """How many classes of bfloat16 weights fit `share` of the free memory, at most `wanted`, in whole millions where
    there are any.
    """
    fit = int(share * free_bytes) // (2 * features)
    whole = fit // 1_000_000 * 1_000_000
    return min(wanted, whole or max(fit, 1))


def done_cells(result: dict[str, Any]) -> set[Cell]:
    """The cells that a result holds already."""
    return {Cell(cell["classes"], cell["features"], cell["batch"]) for cell in result["cells"]}


def remaining(cells: list[Cell], result: dict[str, Any]) -> list[Cell]:
    done = done_cells(result)
    return [cell for cell in cells if cell not in done]


def record_of(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """The cell's record to fill: a new one, or the one that the last process left unfinished.

    Of that one only the failures stay: what ran is measured again, side by side with the rest.
    """
    fresh = {**asdict(cell), "dtype": "bfloat16", "methods": {}}
    at = result.get("at")
    if at is not None and all(at[key] == fresh[key] for key in ("classes", "features", "batch")):
        fresh["methods"] = {name: found for name, found in at["methods"].items() if "failed" in found}
    return fresh


def blame(result: dict[str, Any], how: str) -> None:
    """After the process died: what it was at fails, and the cell goes on without it.

    `result["at"]` is the unfinished cell as far as it got, with the method it was at in "running".
    """
    at = result.get("at")
    if at is None:
        return
    name = at.pop("running", None)
    if name is None:
        # It died between methods: the cell itself is at fault, and would kill the next process too.
        at["failed"] = how
        result["cells"].append(at)
        result["at"] = None
    else:
        at["methods"][name] = {"failed": how}


def keep_unfinished(result: dict[str, Any]) -> None:
    """At the end: what was measured of a cell that was cut short counts."""
    at = result.pop("at", None)
    if at is not None and any("step_ms" in found for found in at["methods"].values()):
        at.pop("running", None)
        result["cells"].append(at)


def summary(laps: dict[str, list[float]]) -> dict[str, float]:
    """`<lap>_ms`: medians; `spread`: of the steps, largest over smallest; `runs`."""
    times = {f"{name}_ms": statistics.median(seconds) * 1e3 for name, seconds in laps.items()}
    steps = laps["step"]
    return times | {"spread": max(steps) / min(steps), "runs": len(steps)}
