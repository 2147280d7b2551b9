"""The habits of the project, checked: public names, what an import costs, documentation, forbidden things."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.nn import Module
from typer.testing import CliRunner

import dropkit

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "dropkit").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def distribution_names(requirements: list[str]) -> set[str]:
    """Names in a list of requirements, as pip normalises them."""
    return {re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0].lower().replace("_", "-") for line in requirements}


# --- the public names ----------------------------------------------------------------------------------


def test_every_public_name_can_be_had_and_is_listed_once() -> None:
    assert sorted(set(dropkit.__all__)) == sorted(dropkit.__all__)
    for name in dropkit.__all__:
        assert getattr(dropkit, name) is not None, name
    assert set(dropkit.__all__) <= set(dir(dropkit))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dropkit.no_such_name


def test_every_public_name_stands_on_the_page_of_the_interface() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in dropkit.__all__ if not re.search(rf"\b{re.escape(name)}\b", page)]
    assert not missing, f"docs/api.md does not name {missing}"


def test_the_version_is_the_one_of_the_installed_package() -> None:
    assert dropkit.__version__ == PROJECT["project"]["version"]


LATE = (
    "pandas",
    "pyarrow",
    "sklearn",
    "scipy",
    "matplotlib",
    "jinja2",
    "rich",
    "typer",
    "triton",
    "torchmetrics",
    "onnx",
    "ray",
    "safetensors",
)


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running the code."""
    script = f"import sys; {code}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_dropkit_loads_torch_numpy_and_numba_alone() -> None:
    extra = modules_after("import dropkit, dropkit.nn, dropkit.functional") & set(LATE)
    # What torch, numpy and numba load themselves is not ours to answer for.
    assert not extra - modules_after("import torch, numpy, numba")


def test_the_check_above_would_see_a_late_package() -> None:
    assert {"rich", "jinja2"} <= modules_after("import rich, jinja2")


def test_importing_dropkit_says_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import dropkit"], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# --- the code ------------------------------------------------------------------------------------------


def test_nothing_imports_pickle_or_what_unpickles() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    guilty = {
        str(path.relative_to(ROOT)): found
        for path in SOURCES
        if (found := imported_packages(path) & forbidden)
    }
    assert not guilty


@pytest.mark.parametrize("call", ["torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle"])
def test_nothing_reads_or_writes_pickled_files(call: str) -> None:
    guilty = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == call:
                allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if allowed.get("allow_pickle") != "False":
                    guilty.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not guilty


# The name under which a package is imported, where it differs from the name under which pip knows it.
IMPORTED_AS = {"sklearn": "scikit-learn"}
STANDARD = set(sys.stdlib_module_names) | {"dropkit", "__future__"}
WITH_TORCH = {"triton"}  # comes with torch's builds for GPUs, and is loaded with the first tensor on one


def undeclared(paths: list[Path], declared: set[str]) -> dict[str, set[str]]:
    """Packages that files import and pyproject.toml does not ask for, by file."""
    neighbours = {path.stem for path in paths} | {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir()
    }
    found = {}
    for path in paths:
        names = {IMPORTED_AS.get(name, name) for name in imported_packages(path) - STANDARD - neighbours}
        if missing := {name for name in names if name.lower().replace("_", "-") not in declared}:
            found[str(path.relative_to(ROOT))] = missing
    return found


def test_what_the_package_imports_it_asks_for() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [
        line for name, lines in extras.items() if name not in ("test", "docs", "dev") for line in lines
    ]
    asked = distribution_names(PROJECT["project"]["dependencies"] + optional)
    assert not undeclared(SOURCES, asked | WITH_TORCH)


def test_what_the_tests_import_the_test_extra_asks_for() -> None:
    extra = PROJECT["project"]["optional-dependencies"]["test"]
    assert not undeclared(TESTS, distribution_names(PROJECT["project"]["dependencies"] + extra))


def test_annotations_are_never_evaluated() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if re.search(r"^\s*(def|class) ", path.read_text(), flags=re.MULTILINE)
        and "from __future__ import annotations" not in path.read_text()
    ]
    assert not guilty


# --- the files -----------------------------------------------------------------------------------------

# Each is written so that this file does not contain it.
FORBIDDEN = {
    "a path of one machine": re.compile("/(" + "|".join(["w[o]rk", "t[m]p", "r[o]ot", "h[o]me"]) + r")/\w"),
    "a package index": re.compile(
        r"py[p]i\.|pythonh[o]sted|(--|_|-)index[-_]url|find[-_]l[i]nks|download\.pyt[o]rch"
    ),
    "unfinished work": re.compile(r"\bTO[D]O\b|\bFIX[M]E\b|\bX[X]X\b"),
}


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Name and text of every file that git tracks or would track; binary files are left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        path = ROOT / name
        if path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                yield name, content.decode("utf-8")


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_contains(what: str) -> None:
    guilty = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if FORBIDDEN[what].search(line)
    ]
    assert not guilty, f"{what}: {guilty}"


def test_a_path_of_one_machine_would_be_found() -> None:
    assert FORBIDDEN["a path of one machine"].search("/wor" + "k/main")


FRAGMENT = re.compile(r"^(\d+|\+[\w-]+)\.(added|changed|fixed|removed)(\.\d+)?\.md$")


def test_changelog_fragments_are_well_formed() -> None:
    fragments = [path for path in (ROOT / "changelog.d").iterdir() if path.name != ".gitignore"]
    for path in fragments:
        assert FRAGMENT.match(path.name), f"{path.name}: name it ISSUE.KIND.md, KIND as in pyproject.toml"
        text = path.read_text().strip()
        assert text.endswith("."), f"{path.name} is not a sentence"
    released = (ROOT / "CHANGELOG.md").read_text()
    assert fragments or f"## {PROJECT['project']['version']}" in released


# --- the command line and its page ---------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """Every command of the command line, by the words that call it."""
    from dropkit.cli import app

    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for name, child in getattr(command, "commands", {}).items():
            found[" ".join((*words, name))] = child
            walk(child, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def option_names(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


def test_the_main_commands_are_there() -> None:
    assert {"fit", "predict"} <= set(commands())


def test_every_command_has_help_for_itself_and_each_option() -> None:
    from dropkit.cli import app

    for words, command in commands().items():
        shown = CliRunner().invoke(app, [*words.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, words
        assert (command.help or "").strip(), f"dropkit {words} has no help"
        silent = [p.opts for p in command.params if not (p.help or "").strip() and "--help" not in p.opts]
        assert not silent, f"dropkit {words}: no help for {silent}"


def test_every_command_stands_on_the_page_of_commands() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    for words in commands():
        assert f"```{{command}} {words}\n" in page, f"docs/commands.md has no block for dropkit {words}"


def documented_calls() -> list[tuple[str, str]]:
    """Every call of dropkit in a shell block of README and docs: the page and the line."""
    found = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]:
        for block in re.findall(r"```(?:console|sh|bash)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").partition("#")[0].strip()
                if line.startswith("dropkit "):
                    found.append((page.name, line))
    return found


def test_documented_calls_use_options_that_exist() -> None:
    known = commands()
    calls = documented_calls()
    assert len(calls) >= 4
    for page, line in calls:
        words = shlex.split(line)[1:]
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), None)
        assert name is not None, f"{page}: {line}: no such command"
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= option_names(known[name]), f"{page}: {line}: {given - option_names(known[name])}"


def test_both_commands_stand_on_the_first_screen_of_the_readme() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for wanted in ("make demo", "make test", "dropkit fit", "dropkit predict"):
        assert wanted in first_screen


# --- the checks themselves -----------------------------------------------------------------------------


def load_check_torch() -> Any:
    spec = importlib.util.spec_from_file_location("check_torch", ROOT / ".ci" / "check_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_check_of_torch_names_another_version_and_cuda_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = load_check_torch()
    version = check.torch.__version__.partition("+")[0]
    pins = tmp_path / "constraints.txt"
    pins.write_text(f"numpy==2.4.6\ntorch=={version}\n")
    monkeypatch.setattr(check, "distributions", list)
    monkeypatch.setattr(check.torch.version, "cuda", None)
    assert check.complaints(pins, cpu=True) == []

    class Stray:
        name = "nvidia-cublas-cu12"

    monkeypatch.setattr(check, "distributions", lambda: [Stray])
    assert "nvidia-cublas-cu12" in check.complaints(pins, cpu=False)[0]
    monkeypatch.setattr(check.torch.version, "cuda", "12.6")
    assert check.complaints(pins, cpu=False) == []  # a CUDA build brings its own libraries, rightly
    assert "CUDA build" in check.complaints(pins, cpu=True)[0]
    pins.write_text("torch==1.0.0\n")
    assert "pins 1.0.0" in check.complaints(pins, cpu=False)[0]


def test_torch_is_pinned_for_the_checks_and_ranged_for_users() -> None:
    assert "\ntorch==2.13.0\n" in (ROOT / "constraints.txt").read_text()
    assert "torch>=2.6" in PROJECT["project"]["dependencies"]


SKIPPING = """
import pytest
def test_passes(): pass
@pytest.mark.skip(reason="on purpose")
def test_skips(): pass
"""


@pytest.mark.parametrize(("ci", "data_there", "code"), [("true", True, 1), ("true", False, 0), ("", True, 0)])
def test_a_skip_fails_the_run_where_nothing_may_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str, data_there: bool, code: int
) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "skip_watch.py").read_text())
    (tmp_path / "test_it.py").write_text(SKIPPING)
    data = tmp_path / "data"
    if data_there:
        data.mkdir()
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("DROPKIT_DATA", str(data))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == code, run.stdout + run.stderr
    assert ("skipped where nothing may be skipped" in run.stdout) == bool(code)


def test_the_page_of_kinds_names_every_layer():
    page = (ROOT / "docs" / "family.md").read_text()
    layers = {
        name
        for name in dropkit.nn.__all__
        if isinstance(getattr(dropkit.nn, name), type) and issubclass(getattr(dropkit.nn, name), Module)
    }
    named = set(re.findall(r"`(\w+)`", page)) | {f"ChannelDropout{n}d" for n in (1, 2, 3)}
    assert layers <= named
