"""steps.py -- runs steps one after the other under one deadline: a limit for each, logs, and a table at the end.

A step that fails or hangs takes none of the time that is kept for those after it. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

PASSED, FAILED, TIMEOUT, SKIPPED = "passed", "FAILED", "TIMEOUT", "skipped"


@dataclass
class Outcome:
    result: str
    detail: str = ""
    shown: str = ""  # printed below the step's line


@dataclass(frozen=True)
class Step:
    """`limit`: seconds at most; `keep`: seconds that no step before it may touch; `least`: below that it is skipped."""

    name: str
    run: Callable[[Runner, float], Outcome]
    limit: float
    keep: float = 0.0
    least: float = 5.0
    needs: str = ""  # a step that must have passed

    def scaled(self, factor: float) -> Step:
        return replace(self, limit=self.limit * factor, keep=self.keep * factor, least=self.least * factor)


@dataclass(frozen=True)
class Finished:
    """A command that ran: `code` is None when its time was up."""

    code: int | None
    seconds: float
    text: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def result(self) -> str:
        return PASSED if self.ok else TIMEOUT if self.code is None else FAILED


def limit_of(steps: Sequence[Step], at: int, left: float) -> float:
    """Seconds that step `at` may take when `left` remain for it and all those after it."""
    return min(steps[at].limit, left - sum(step.keep for step in steps[at + 1 :]))


def _heed_interrupts() -> None:
    """A shell's background job ignores interrupts, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Runner:
    folder: Path  # of the logs
    seconds: float  # for everything
    out: Path | None = None  # gets a copy of all logs, in one file, and of the table
    clock: Callable[[], float] = time.monotonic
    rows: list[tuple[str, Outcome, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = self.clock() + self.seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._step = "log"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("*.log"):
            old.unlink()
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "gpu.log").unlink(missing_ok=True)

    def left(self) -> float:
        return self._end - self.clock()

    def run(self, steps: Sequence[Step]) -> int:
        """All the steps and the table; exit code 1 if one failed or did not end in time."""
        try:
            for at, step in enumerate(steps):
                self._step = step.name
                limit = limit_of(steps, at, self.left())
                begin = self.clock()
                outcome = self._one(step, limit)
                self._close(step, outcome, self.clock() - begin)
        finally:
            self.stop()
            print("\n" + self.table(), flush=True)
        return int(any(outcome.result in (FAILED, TIMEOUT) for _, outcome, _ in self.rows))

    def _one(self, step: Step, limit: float) -> Outcome:
        passed = {name for name, outcome, _ in self.rows if outcome.result == PASSED}
        ran = {name for name, _, _ in self.rows}
        if step.needs in ran - passed:
            return Outcome(SKIPPED, f"{step.needs} did not pass")
        if limit < step.least:
            return Outcome(SKIPPED, "no time left")
        print(f"==> {step.name} (at most {limit:.0f} s)", flush=True)
        try:
            return step.run(self, limit)
        except Exception as error:  # a fault of the script must not cost the other steps
            return Outcome(FAILED, f"{type(error).__name__}: {error}")

    def _close(self, step: Step, outcome: Outcome, seconds: float) -> None:
        self.rows.append((step.name, outcome, seconds))
        if outcome.shown:
            print(outcome.shown.rstrip(), flush=True)
        print(f"    {outcome.result} in {seconds:.0f} s: {outcome.detail}", flush=True)
        (self.folder / "summary.txt").write_text(self.table() + "\n")
        if self.out is not None:
            (self.out / "summary.txt").write_text(self.table() + "\n")

    def table(self) -> str:
        width = max([len("step"), *(len(name) for name, _, _ in self.rows)])
        lines = [f"{'step':<{width}}  result   seconds  detail"]
        lines += [f"{name:<{width}}  {o.result:<7}  {s:7.0f}  {o.detail}" for name, o, s in self.rows]
        return "\n".join(lines)

    def command(
        self, words: Sequence[object], limit: float, env: Mapping[str, str] | None = None, grace: float = 0.0
    ) -> Finished:
        """Runs a command, its output in the step's log; at the limit it and all its children are ended.

        With `grace` it is interrupted that many seconds earlier, so that it may say how far it came.
        """
        log = self.folder / f"{self._step}.log"
        begin = self.clock()
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(map(str, words))}\n"[:2000])
            file.flush()
            start = file.tell()
            code = self._wait([str(word) for word in words], file, limit, env, grace)
        text = log.read_bytes()[start:].decode("utf-8", "replace")
        if self.out is not None:
            with open(self.out / "gpu.log", "a", encoding="utf-8") as file:
                file.write(f"\n#### {self._step}: {' '.join(map(str, words))[:300]}\n{clip(text, 3_000_000)}")
        return Finished(code, self.clock() - begin, text)

    def _wait(
        self, words: list[str], file: TextIO, limit: float, env: Mapping[str, str] | None, grace: float
    ) -> int | None:
        everything = {**os.environ, **(env or {})}
        try:
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=everything,
                start_new_session=True, preexec_fn=_heed_interrupts,
            )  # fmt: skip
        except OSError as error:
            file.write(f"{words[0]}: {error}\n")
            return 127
        self._child = child
        try:
            return child.wait(max(0.1, limit - grace))
        except subprocess.TimeoutExpired:
            if grace:
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(grace)
            return None
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends the command that runs, and its children."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)  # one stuck in the driver may not even die


def clip(text: str, size: int) -> str:
    """The end of a text that is too long."""
    return text if len(text) <= size else "[...]\n" + text[-size:]
