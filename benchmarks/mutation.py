"""Mutation: change the mask kernels in one place at a time, and see whether a test notices.

    python benchmarks/mutation.py                        every mutant of every file; takes hours
    python benchmarks/mutation.py --sample 300 --seed 1  300 of them, drawn from a seed
    python benchmarks/mutation.py --only philox.py       one file
    python benchmarks/mutation.py --list                 the mutants, and nothing is run

A mutant is the package, copied into a folder of its own, with one constant, comparison, operator, condition or
statement changed. It first meets quick tests with the kernels run as plain Python, in a process forked from one that
has torch loaded; who survives these meets the whole files of tests with the kernels compiled. A mutant is killed when a
test fails or nothing comes back in time. Those that change no behaviour stand in mutation_equivalent.txt, with the
reason.

Ends with status 1 where fewer than 97 % of the others are killed, or a test fails on the unchanged package.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import copy
import ctypes
import os
import py_compile
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MASKS_FOLDER = Path("src", "dropkit", "masks")
SNAPSHOT = (
    "src",
    "tests",
    "conftest.py",
    "pyproject.toml",
)  # what is copied, so that work may go on beside a run
EQUIVALENT = Path(__file__).with_name("mutation_equivalent.txt")
TARGET = 0.97

MASKS = (
    "tests/test_philox.py",
    "tests/test_masks.py",
    "tests/test_address.py",
    "tests/test_trust_equality.py",
)
# The quick tests of each file, first what kills most, and the files of tests behind them.
QUICK = {
    "philox.py": ["tests/test_masks.py::test_golden_masks", "tests/test_philox.py"],
    "cpu.py": [
        "tests/test_masks.py::test_golden_masks",
        "tests/test_masks.py::test_the_mean_is_kept_exactly_over_all_lane_values",
        "tests/test_trust_equality.py::test_a_call_is_the_definition[1]",
        "tests/test_trust_equality.py::test_several_networks_at_once_are_one_after_another[1]",
        "tests/test_trust_kernels.py",
    ],
    "runs_cpu.py": ["tests/test_trust_kernels.py"],
    "threads.py": ["tests/test_trust_kernels.py"],
    "pages.py": ["tests/test_masks.py::test_golden_masks"],
    "ops.py": [
        "tests/test_trust_equality.py::test_a_call_is_the_definition[1]",
        "tests/test_trust_equality.py::test_several_networks_at_once_are_one_after_another[1]",
        "tests/test_masks.py::test_nested_vmap_of_members_and_rows",
        "tests/test_masks.py::test_vmap_over_members_is_a_loop_over_members",
        "tests/test_masks.py::test_vmap_over_rates_shares_the_bits",
        "tests/test_masks.py::test_vmap_outside_a_context_follows_torchs_randomness",
        "tests/test_masks.py::test_derivatives_of_first_and_second_order",
        "tests/test_masks.py::test_nothing_is_kept_for_backward",
        "tests/test_masks.py::test_errors_say_what_is_allowed",
        "tests/test_masks.py::test_many_dims_that_alternate_fall_back_and_agree",
        "tests/test_address.py",
        "tests/test_transforms.py::test_meta_and_fake_tensors_have_shapes_and_no_values",
        "tests/test_transforms.py::test_every_operator_keeps_torchs_contract",
    ],
    "noise.py": [
        "tests/test_noise.py::test_golden_noise",
        "tests/test_noise.py::test_the_kernel_is_the_definition",
    ],
    "noise_cpu.py": [
        "tests/test_noise.py::test_golden_noise",
        "tests/test_noise.py::test_the_kernel_is_the_definition",
    ],
    "residual_cpu.py": [
        "tests/test_trust_kernels.py::test_a_lane_at_the_threshold_stays_and_one_below_falls",
        "tests/test_residual.py::test_fused_is_separate_with_the_same_mask",
    ],
}
WHOLE = {
    "philox.py": [*MASKS, "tests/test_noise.py"],
    "cpu.py": [
        *MASKS,
        "tests/test_trust_kernels.py",
        "tests/test_attention.py::test_threads_change_no_number",
    ],
    "runs_cpu.py": ["tests/test_trust_kernels.py", "tests/test_attention.py"],
    "threads.py": ["tests/test_trust_kernels.py", "tests/test_attention.py::test_threads_change_no_number"],
    "pages.py": [*MASKS],
    "ops.py": [*MASKS],
    "noise.py": ["tests/test_noise.py"],
    "noise_cpu.py": ["tests/test_noise.py", "tests/test_trust_kernels.py"],
    "residual_cpu.py": ["tests/test_residual.py", "tests/test_trust_kernels.py"],
}
INLINED = ("philox.py", "noise.py", "cpu.py")
PRELOADED = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # the modules were imported before the fork
# Seconds of a processor, so that a busy machine kills nobody; by the clock, only what waits for ever is ended.
QUICK_SECONDS, WHOLE_SECONDS, CLOCK_SECONDS = 100, 600, 1800

BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr, ast.Pow: ast.Mult,
}  # fmt: skip
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """One change: of which node, in the order of `ast.walk`, and which of the changes that fit it."""

    file: str
    node: int
    change: int
    line: int
    text: str
    what: str

    @property
    def name(self) -> str:
        """What identifies it for as long as its line stays as it is."""
        return f"{self.file}: {self.text} :: {self.what}"


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """All changes that fit a node: what is done, and the node in its place (None: the statement goes)."""

    def edited(**fields: object) -> ast.AST:
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    match node:
        case ast.Constant(value=bool() as value):
            yield f"{value} at {node.col_offset} becomes {not value}", edited(value=not value)
        case ast.Constant(value=int() | float() as value):
            yield f"{value} at {node.col_offset} becomes {value + 1}", edited(value=value + 1)
            if value > 0:
                yield f"{value} at {node.col_offset} becomes {value - 1}", edited(value=value - 1)
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in BINARY:
            other = BINARY[type(op)]
            yield f"{type(op).__name__} becomes {other.__name__} in {ast.unparse(node)}", edited(op=other())
        case ast.Compare(ops=[op]):
            other = COMPARE[type(op)]
            yield (
                f"{type(op).__name__} becomes {other.__name__} in {ast.unparse(node)}",
                edited(ops=[other()]),
            )
        case ast.BoolOp(op=op):
            other = ast.Or if isinstance(op, ast.And) else ast.And
            yield f"{type(op).__name__} becomes {other.__name__} in {ast.unparse(node)}", edited(op=other())
        case ast.UnaryOp(operand=operand):
            yield f"{type(node.op).__name__} goes from {ast.unparse(node)}", operand
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            yield f"{name} becomes {CALLS[name]}", edited(func=ast.Name(CALLS[name], ast.Load()))
    match node:
        case ast.If(test=test) | ast.IfExp(test=test):
            yield (
                f"the condition {ast.unparse(test)} is turned round",
                edited(test=ast.UnaryOp(ast.Not(), test)),
            )
        case ast.AugAssign() | ast.Assign(targets=[ast.Subscript()]):
            yield f"{ast.unparse(node)} goes", None
        case ast.Expr(value=ast.Call()):
            yield f"{ast.unparse(node)} goes", None


def _says_nothing(node: ast.AST) -> bool:
    """A docstring, a registration with torch, or a name for types."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or "_library" in ast.unparse(node)
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("T", "Array", "_library")


def _left_alone(tree: ast.Module) -> set[int]:
    """Ids of nodes that are no computation: annotations, decorators, imports, what is said in errors, schemas."""
    alone: set[int] = set()

    def leave(node: ast.AST | None) -> None:
        if node is not None:
            alone.update(id(inner) for inner in ast.walk(node))

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                leave(decorator)
            leave(node.returns)
        elif (
            isinstance(node, ast.keyword) and node.arg == "strict"
        ):  # of zip, over what is of one length anyway
            leave(node)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            leave(node.annotation)
        elif isinstance(node, ast.Raise | ast.JoinedStr) or _says_nothing(node):
            leave(node)
    return alone


def mutants(file: str, root: Path) -> list[Mutant]:
    """Every mutant of a file of `masks`."""
    source = (root / MASKS_FOLDER / file).read_text()
    tree, lines = ast.parse(source), source.splitlines()
    alone, found, line = _left_alone(tree), [], 0
    for index, node in enumerate(ast.walk(tree)):
        line = getattr(node, "lineno", line)
        if id(node) not in alone:
            for number, (what, _) in enumerate(_changes(node)):
                found.append(Mutant(file, index, number, line, lines[line - 1].strip(), what))
    return sorted(found, key=lambda mutant: mutant.line)


def mutated(mutant: Mutant, source: str) -> str:
    """The source with the change made."""
    tree = ast.parse(source)
    target = list(ast.walk(tree))[mutant.node]
    replacement = list(_changes(target))[mutant.change][1]
    gone = ast.copy_location(ast.Pass(), target)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            if node is target:
                return gone if replacement is None else ast.copy_location(replacement, target)
            return self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))


def equivalents() -> dict[str, str]:
    """Mutants that change no behaviour, by name, with the reason: lines NAME, then an indented reason."""
    reasons, name = {}, ""
    for line in EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else ():
        if line.startswith("    "):
            reasons[name] = line.strip()
        elif line and not line.startswith("#"):
            name = line
    return reasons


# The search for a smaller example that fails as well is left out: one is enough to kill.
PROFILE = """
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "mutation", deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
)
"""


def _take_snapshot(folder: Path) -> None:
    (folder / "src").mkdir()
    (folder / "src" / "mutation_profile.py").write_text(PROFILE)
    for name in SNAPSHOT:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        else:
            shutil.copy2(ROOT / name, folder / name)
    # Valid for as long as the source is the same: the time of a change tells mutants apart by the second alone.
    compileall.compile_dir(
        folder / "src", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
    )


def _preload() -> None:
    """Import, before forking, what every run of the tests imports, but for the package itself."""
    import hypothesis.strategies
    import numba
    import pytest
    import randomgen
    import scipy.stats
    import sybil
    import torch.func
    import torch.utils.checkpoint

    del hypothesis, numba, pytest, randomgen, scipy, sybil, torch


def _as_plain_python() -> None:
    """What the compiler alone can do, done by numpy: raw memory, bits that change their type, numbers that wrap."""
    from dropkit.masks import cpu

    def array(address: int, shape: Any, dtype: Any) -> Any:
        count = int(np.prod(shape))
        memory = (
            (ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(int(address)) if count else b""
        )
        return np.frombuffer(memory, dtype).reshape(shape)

    plain: Any = cpu
    plain._pointer, plain.carray = int, array
    plain._as_float = lambda bits: np.uint32(bits).view(np.float32)
    plain._as_bits = lambda value: np.float32(value).view(np.uint32)
    plain._U = lambda value: np.uint64(int(value) % 2**64)


def run_quickly(folder: Path, tests: list[str], *, keep_bytecode: bool = False) -> bool | None:
    """Whether the tests pass on the package in `folder`, kernels run as plain Python; None: no end in time."""
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (QUICK_SECONDS, QUICK_SECONDS + 5))
        code = 99
        try:
            with open(os.devnull, "w") as nothing, (folder / "quick.log").open("w") as log:  # noqa: PTH123
                os.dup2(nothing.fileno(), 0)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.path.insert(0, str(folder / "src"))
            os.environ.update(CI="true", PYTHONPATH=str(folder / "src"))
            os.chdir(folder)
            sys.dont_write_bytecode = not keep_bytecode
            import pytest

            _as_plain_python()
            code = int(pytest.main([*_options(), "-W", "ignore::RuntimeWarning", *tests]))
            import dropkit

            if not Path(dropkit.__file__).is_relative_to(folder):
                code = 98
        except BaseException:  # nothing may leave the child but its status
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = _wait(child, CLOCK_SECONDS)
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return None
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 98:
        raise SystemExit("mutation: the tests ran on another copy of the package.")
    return status == 0


def run_wholly(folder: Path, tests: list[str], compiled: Path) -> bool | None:
    """The same with compiled kernels, in a fresh process that keeps them in the folder `compiled`."""
    environment = os.environ | {
        "PYTHONPATH": str(folder / "src"),
        "NUMBA_CACHE_DIR": str(compiled),
        "CI": "true",
    }
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_DISABLE_JIT", None)
    there = [test for test in tests if (folder / test.partition("::")[0]).exists()]
    limit = ["prlimit", f"--cpu={WHOLE_SECONDS}"]
    command = [*limit, sys.executable, "-m", "pytest", *_options(), *there]
    with (folder / "whole.log").open("w") as log:
        run = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = run.wait(CLOCK_SECONDS)
            return None if code < 0 else code == 0
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            return None


def _options() -> list[str]:
    profile = ["-p", "mutation_profile", "--hypothesis-profile", "mutation", *PRELOADED]
    return ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *profile]


def _wait(child: int, seconds: float) -> int | None:
    """The status of a child, or None where it was ended for taking too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Judge:
    """Tells for one mutant after another whether it is killed.

    Args:
        folder: holds the snapshot, of which one file at a time is changed.
        only_quick: whether to leave out the compiled kernels and the whole files of tests.
    """

    def __init__(self, folder: Path, only_quick: bool) -> None:
        self.folder, self.compiled, self.only_quick = folder, folder / "compiled", only_quick
        self.checked: set[str] = set()  # files whose whole tests pass while nothing is changed

    def __call__(self, mutant: Mutant) -> str:
        """`killed` and by what, or `survived`."""
        with self._changed(mutant):
            if run_quickly(self.folder, QUICK[mutant.file]) is False:
                return "killed, quick"
        if self.only_quick:
            return "survived"
        if mutant.file not in self.checked:
            check_whole_tests(self.folder, mutant.file, self.compiled)
            self.checked.add(mutant.file)
        # Kernels of files beside the mutant's are taken from `compiled`, unless constants or functions of this file are
        # inlined in them. What is compiled here is never used again: it may hold a piece of the mutant.
        own = self.folder / "compiled-mutant"
        if mutant.file not in INLINED:
            shutil.copytree(self.compiled, own)
        with self._changed(mutant):
            passed = run_wholly(self.folder, WHOLE[mutant.file], own)
        shutil.rmtree(own, ignore_errors=True)
        return "survived" if passed else "killed, whole" if passed is False else "killed, no end"

    @contextlib.contextmanager
    def _changed(self, mutant: Mutant) -> Iterator[None]:
        target = self.folder / MASKS_FOLDER / mutant.file
        original, times = target.read_text(), target.stat()
        target.write_text(mutated(mutant, original))
        try:
            yield
        finally:
            target.write_text(original)
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))


def check_quick_tests(folder: Path, files: list[str]) -> None:
    """The unchanged package must pass, or no mutant's death means anything."""
    for tests in {tuple(QUICK[file]) for file in files}:
        if not run_quickly(folder, list(tests), keep_bytecode=True):
            print((folder / "quick.log").read_text()[-4000:])
            raise SystemExit(f"mutation: {' '.join(tests)} does not pass, run as plain Python.")


def check_whole_tests(folder: Path, file: str, compiled: Path) -> None:
    """The same for the whole files of tests, which fills `compiled` too."""
    if not run_wholly(folder, WHOLE[file], compiled):
        print((folder / "whole.log").read_text()[-4000:])
        raise SystemExit(f"mutation: {' '.join(WHOLE[file])} does not pass.")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(QUICK), default=list(QUICK))
    parser.add_argument("--sample", type=int, default=0, help="so many, drawn from all; 0 is all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the quick tests alone; more survive")
    parser.add_argument("--out", type=Path, help="where the report goes")
    parser.add_argument("--list", action="store_true", dest="only_list", help="print the mutants")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        return work(given, Path(name))


def work(given: argparse.Namespace, folder: Path) -> int:
    """What was asked for, in a folder that is removed afterwards."""
    _take_snapshot(folder)
    every = [mutant for file in given.only for mutant in mutants(file, folder)]
    chosen = every
    if given.sample and given.sample < len(every):
        chosen = sorted(random.Random(given.seed).sample(every, given.sample), key=lambda m: (m.file, m.line))
    if given.only_list:
        print("\n".join(f"{mutant.line:4} {mutant.name}" for mutant in chosen))
        print(f"{len(chosen)} of {len(every)}")
        return 0

    os.environ["NUMBA_DISABLE_JIT"] = "1"
    _preload()
    known, verdicts = equivalents(), {}
    began, judge = time.monotonic(), Judge(folder, given.quick)
    check_quick_tests(folder, given.only)
    print(f"the unchanged package passes, {time.monotonic() - began:.0f} s", flush=True)
    for number, mutant in enumerate(chosen, 1):
        verdicts[mutant] = "equivalent" if mutant.name in known else judge(mutant)
        print(f"{number}/{len(chosen)} {verdicts[mutant]:14} {mutant.line:4} {mutant.name}", flush=True)
    counts = {verdict: list(verdicts.values()).count(verdict) for verdict in sorted(set(verdicts.values()))}
    tried = len(chosen) - counts.get("equivalent", 0)
    killed = tried - counts.get("survived", 0)
    drawn = f"drawn from {len(every)} with seed {given.seed}" if len(chosen) < len(every) else "all there are"
    lines = [
        f"{len(chosen)} mutants, {drawn}; {time.monotonic() - began:.0f} s",
        ", ".join(f"{verdict}: {count}" for verdict, count in counts.items()),
        f"killed {killed} of {tried} that change something, {killed / max(tried, 1):.1%}",
        *(
            f"survived: {mutant.line:4} {mutant.name}"
            for mutant, verdict in verdicts.items()
            if verdict == "survived"
        ),
    ]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")
    return int(killed < TARGET * tried)


if __name__ == "__main__":
    sys.exit(main())
