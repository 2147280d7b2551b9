"""Claims: verdicts follow their rules, results survive JSON and nothing else, runs resume, failures stay alone."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import claim_examples as examples
from dropkit import cli
from dropkit.claims import (
    CLAIMS,
    Chart,
    Measured,
    Results,
    Rule,
    Series,
    Setting,
    choose,
    data,
    judge,
    run_claims,
    runner,
    to_text,
    worker,
)
from dropkit.claims.claim import critical, weakest
from dropkit.claims.record import read_outcome, write_outcome
from dropkit.errors import ModelDirectoryError, OptionError, OutputError

numbers = st.floats(-1e6, 1e6, allow_nan=False)
errors = st.floats(0, 1e5)
measured = st.builds(
    Measured,
    st.floats(),
    st.floats(0),
    st.none() | st.floats(),
    st.integers(1, 50).map(float) | st.just(math.inf),
    st.floats(0, 10),
)
rules = st.builds(
    Rule,
    st.just("q"),
    st.just("a figure"),
    st.sampled_from(["equal", "above", "below"]),
    numbers,
    st.floats(0, 5),
    st.floats(0, 2),
)


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of claims find this folder, and no data that lie somewhere on this machine."""
    monkeypatch.setenv("DROPKIT_DATA", "nowhere")


# --- verdicts ------------------------------------------------------------------------------------------


@given(numbers, st.floats(1e-3, 1e3), st.integers(1, 30), numbers)
def test_a_difference_counts_as_seen_where_students_t_test_sees_it(value, error, degrees, bound):
    p = 2 * stats.t.sf(abs(value - bound) / error, degrees)
    found = Measured(value, error, degrees=degrees)
    above, below = (Rule("q", "", kind, bound).judge(found) == "holds" for kind in ("above", "below"))
    if abs(p - 0.05) > 1e-9:
        assert above == (value > bound and p < 0.05)
        assert below == (value < bound and p < 0.05)


@pytest.mark.parametrize(("degrees", "table"), [(4, 2.776445), (9, 2.262157), (math.inf, 1.959964)])
def test_intervals_are_those_of_the_tables(degrees, table):
    assert critical(degrees) == pytest.approx(table, abs=1e-6)


@given(rules, measured)
def test_a_reason_stands_where_a_rule_is_missed_or_barely_kept_and_nowhere_else(rule, found):
    verdict, reason = rule.judge(found), rule.reason(found)
    assert verdict in ("holds", "holds within", "does not hold here")
    assert bool(reason) == (verdict != "holds")
    if not math.isfinite(found.value):
        assert (verdict, reason) == ("does not hold here", "not a finite number")
    if reason.startswith("opposite"):
        flipped = dataclasses.replace(rule, kind={"above": "below", "below": "above"}[rule.kind])
        assert flipped.judge(found) == "holds"
    elif "(interval holds" in reason:
        assert abs(found.value - rule.bound) <= critical(found.degrees) * found.error


REASONS = [
    (Rule("q", "", "above"), Measured(0.1, 0.2), "no difference seen (interval holds 0)"),
    (Rule("q", "", "above", 0.5), Measured(0.6, 0.2), "not told apart (interval holds 0.5)"),
    (Rule("q", "", "above"), Measured(-2.0, 0.2), "opposite (interval lies below 0)"),
    (Rule("q", "", "below", 3), Measured(9.0, 0.2), "opposite (interval lies above 3)"),
    (Rule("q", "", "equal"), Measured(1.12, 0.01, 1.0), "off by 12 % (12 standard errors)"),
    (
        Rule("q", "", "equal"),
        Measured(300.0, 0.01, 1.0),
        "off by 29\u202f900 % (29\u202f900 standard errors)",
    ),
    (Rule("q", "", "equal"), Measured(0.3, 0.0, 0.0), "off by 0.3 (exact, without error)"),
    (Rule("q", "", "equal", relative=0.2), Measured(1.12, 0.01, 1.0), "off by 12 %, 20 % allowed"),
    (Rule("q", "", "equal"), Measured(1.0, 0.1, math.nan), "not a finite number"),
    (Rule("q", "", "equal"), Measured(1.0, 0.1, 1.2), ""),
    (Rule("q", "", "shown"), Measured(math.nan, 0.0), ""),
]


@pytest.mark.parametrize(("rule", "found", "reason"), REASONS)
def test_a_reason_says_how_a_rule_is_missed(rule, found, reason):
    assert rule.reason(found) == reason


@given(st.floats(-1e4, 1e4).filter(lambda p: abs(p) > 1e-3), st.floats(0.01, 0.9), st.floats(-2, 2))
def test_a_margin_is_a_share_of_the_prediction(predicted, margin, off):
    rule = Rule("q", "", "equal", relative=margin)
    found = Measured(predicted * (1 + off * margin), 1e-9 * abs(predicted), predicted)
    if 1e-6 < abs(off) and abs(abs(off) - 1) > 1e-6:
        assert rule.judge(found) == ("holds within" if abs(off) < 1 else "does not hold here")


def test_the_weakest_figure_decides_and_what_is_shown_does_not():
    verdict, judged = judge(examples.HOLDS, examples.findings())
    assert (verdict, [one.verdict for one in judged]) == ("holds", ["holds", "holds", None])
    within = examples.findings(examples.GOOD | {"law": Measured(1.0, 0.01, 1.12)})
    assert judge(examples.HOLDS, within)[0] == "holds within"
    both = examples.findings(examples.GOOD | {"law": Measured(1.0, 0.01, 1.12), "gain": Measured(0.0, 0.1)})
    verdict, judged = judge(examples.HOLDS, both)
    assert verdict == weakest(judged) == "does not hold here"


def test_findings_that_do_not_fit_their_rules_are_refused():
    with pytest.raises(OptionError, match=r"differ in \['law', 'published'\]"):
        judge(examples.MISFITS, examples.misfits(Setting()))
    with pytest.raises(OptionError, match="law has no prediction"):
        judge(examples.HOLDS, examples.findings(examples.GOOD | {"law": Measured(1.0, 0.1)}))
    shown = dataclasses.replace(examples.HOLDS, rules=(Rule("gain", "", "shown"),))
    with pytest.raises(OptionError, match="no rule that decides"):
        judge(shown, examples.findings({"gain": Measured(1.0, 0.1)}))


def line(**changes: object) -> Chart:
    return dataclasses.replace(examples.LINE, **changes)


@pytest.mark.parametrize(
    ("charts", "said"),
    [
        ((), "at least one is needed"),
        ((line(), line()), "each with a name"),
        ((line(name="a b"),), "letters, digits and dashes"),
        ((line(series=()),), "there is no series"),
        ((line(series=(Series("s", (1, 2), (1,)),)),), r"have lengths \[1, 2\]"),
        ((line(series=(Series("s", (1, 2), (1, 2), (1,)),)),), r"have lengths \[1, 2\]"),
        ((line(x_names=("one",), series=(Series("s", (0, 1), (1, 2)),)),), "places without a name"),
    ],
)
def test_a_chart_that_cannot_be_drawn_is_refused_before_it_is_kept(charts, said):
    with pytest.raises(OptionError, match=said):
        examples.made(examples.HOLDS, examples.findings(charts=charts))


# --- records -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(rules, measured), min_size=1, max_size=4))
def test_an_outcome_comes_back_from_json_with_the_same_verdict_and_bytes(pairs):
    named = [(dataclasses.replace(rule, quantity=f"q{i}"), found) for i, (rule, found) in enumerate(pairs)]
    named = [
        (
            rule,
            dataclasses.replace(found, predicted=found.predicted or 0.0) if rule.kind == "equal" else found,
        )
        for rule, found in named
    ]
    claim = dataclasses.replace(examples.HOLDS, rules=tuple(rule for rule, _ in named))
    findings = dataclasses.replace(
        examples.findings(), figures={rule.quantity: found for rule, found in named}
    )
    made = examples.made(claim, findings)
    again = read_outcome(write_outcome(made))
    assert again.verdict == made.verdict == judge(claim, findings)[0]
    assert write_outcome(again) == write_outcome(made)
    for before, after in zip(made.figures, again.figures, strict=True):
        assert (after.verdict, after.reason) == (before.verdict, before.reason)
        assert after.found.degrees == before.found.degrees


def test_numbers_of_numpy_and_torch_become_plain_numbers():
    figures = examples.GOOD | {"gain": Measured(np.float32(1.5), torch.tensor(0.25), degrees=np.int64(4))}
    chart = line(series=(Series("s", np.arange(3), torch.tensor([1.0, 2.0, math.nan])),))
    made = read_outcome(write_outcome(examples.made(examples.HOLDS, examples.findings(figures, (chart,)))))
    assert made.figures[0].found == Measured(1.5, 0.25, degrees=4.0)
    assert made.charts[0].series[0].x == (0.0, 1.0, 2.0)
    assert math.isnan(made.charts[0].series[0].y[2])


def altered(change: str) -> bytes:
    made = json.loads(write_outcome(examples.made(examples.HOLDS, examples.findings())))
    figure = made["figures"][0]
    match change:
        case "verdict":
            made["verdict"] = "does not hold here"
        case "figure":
            figure["found"]["value"] = -3.0
        case "reason that is none":
            figure["verdict"] = "holds within"
        case "unknown verdict":
            made["verdict"] = "holds beautifully"
        case "missing part":
            del made["setup"]
        case "unknown part":
            made["more"] = 1
        case "type":
            made["setting"]["seeds"] = "5"
        case "no figures":
            made["figures"] = []
        case "all shown":
            for one in made["figures"]:
                one["rule"]["kind"], one["verdict"] = "shown", None
        case "NaN":
            return write_outcome(examples.made(examples.HOLDS, examples.findings())).replace(
                b"1.2,", b"NaN,", 1
            )
        case "half":
            return json.dumps(made).encode()[:200]
        case "bytes":
            return b"\xff\xfe\x00"
    return json.dumps(made).encode()


CHANGES = [
    "verdict", "figure", "reason that is none", "unknown verdict", "missing part", "unknown part", "type",
    "no figures", "all shown", "NaN", "half", "bytes",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_that_was_altered_is_not_believed(change):
    assert read_outcome(altered("nothing")).verdict == "holds"
    with pytest.raises(ModelDirectoryError):
        read_outcome(altered(change))


def test_all_results_come_back_from_json():
    found = examples.results(hostile=True)
    again = Results.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert again.unfinished == found.unfinished
    assert [one.deciding.reason for one in again.outcomes] == [one.deciding.reason for one in found.outcomes]


# --- the table -----------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_claim_and_says_how_it_fell():
    text = to_text(examples.results(), width=100)
    rows = {line.split()[0]: line for line in text.splitlines() if line and not line.startswith(" ")}
    assert "✓ holds" in rows["holds_here"]
    assert "1.20 ± 0.20" in rows["holds_here"]
    assert "✗ does not hold here" in rows["falls"]
    assert "no difference seen (interval holds 0)" in text
    assert "off by 11 %, 20 % allowed" in text
    assert text.endswith(
        "6 claims: 1 holds, 1 holds within its margin, 2 do not hold here, 1 failed, 1 was not run. "
        "5 seeds from 0, short form.\n"
    )
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("6 claims"))


def test_few_claims_are_printed_with_all_their_figures():
    found = Results(Setting(full=True), examples.results().outcomes[:1])
    text = to_text(found)
    assert all(rule.says in text for rule in examples.RULES)
    assert "shown beside it" in text
    assert text.endswith("1 claim: 1 holds. 5 seeds from 0, long form.\n")


def test_a_table_without_claims_is_a_line():
    assert to_text(Results(Setting(), ())) == "\n0 claims. 5 seeds from 0, short form.\n"


# --- the run -------------------------------------------------------------------------------------------


class InProcess:
    """Stands for a claim's process where its being one does not matter: quick."""

    stdin = None

    def __init__(self, words, *, stdout, **options):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            self.returncode = worker.main(*words[3:])
        stdout.write(said.getvalue().encode())

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def quick(monkeypatch) -> Iterator[None]:
    """Claims run in the test's own process."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(runner.subprocess, "Popen", InProcess)
    yield
    torch.set_num_threads(threads)


def test_each_claim_runs_for_itself_and_what_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    tried = [examples.DIES, examples.RAISES, examples.PRINTS]
    seen: list[runner.Step] = []
    found = run_claims(tried, Setting(6, 3), out=tmp_path / "c", jobs=2, watch=seen.append)
    assert [(one.name, one.verdict) for one in found.outcomes] == [("prints", "holds")]
    lines = {one.name: (one.status, one.line) for one in found.unfinished}
    assert lines["raises"] == ("failed", "ValueError: the figures went astray")
    assert lines["dies"] == ("failed", "its process was ended by signal 9, as for want of memory")
    assert found.outcomes[0].setting == Setting(6, 3)
    _, seed, threads = (one.found for one in found.outcomes[0].figures)
    assert (threads.value, threads.standard_error, seed.value) == (1.0, 1.0, 3.0)
    assert [step.name for step in seen if step.state == "begun"] == ["prints", "raises", "dies"]
    assert "in raises" in (tmp_path / "c" / "results" / "raises.log").read_text()
    assert not (tmp_path / "c" / "results" / "prints.log").exists()
    kept = Results.from_json((tmp_path / "c" / "claims.json").read_text())
    assert [one.name for one in (*kept.outcomes, *kept.unfinished)] == ["prints", "dies", "raises"]
    assert "the figures went astray" in (tmp_path / "c" / "report.html").read_text()


def test_claims_that_cannot_be_tried_say_why(quick):
    found = run_claims([examples.LACKS, examples.IMPORTS, examples.MISFITS, examples.HOLDS])
    lines = {one.name: (one.status, one.line) for one in found.unfinished}
    assert lines["lacks"] == (
        "not run",
        "needs figment, which is not installed: pip install 'dropkit[figment]'",
    )
    assert lines["imports"][0] == "not run"
    assert lines["imports"][1].startswith(
        "needs no_such_package_anywhere, which is not installed: pip install 'dro"
    )
    assert lines["misfits"][0] == "failed"
    assert "rules and findings differ" in lines["misfits"][1]
    assert [one.name for one in found.outcomes] == ["holds_here"]


@pytest.fixture
def counter(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "counter"
    monkeypatch.setenv("CLAIM_COUNTER", str(path))
    return path


def test_only_what_is_missing_or_changed_runs_again(tmp_path, counter, quick, monkeypatch):
    def runs(*, force: bool = False, setting: Setting = Setting()) -> int:  # noqa: B008 - frozen
        before = len(counter.read_text()) if counter.exists() else 0
        found = run_claims([examples.COUNTS], setting, out=tmp_path / "c", force=force)
        assert len(found.outcomes) == 1
        return len(counter.read_text()) - before

    result = tmp_path / "c" / "results" / "counted.json"
    assert runs() == 1
    first = result.read_bytes()
    page = (tmp_path / "c" / "report.html").read_bytes()
    assert runs() == 0
    assert runs(force=True) == 1
    assert result.read_bytes() == first  # equal seeds give equal bytes: no clock is in them
    assert (tmp_path / "c" / "report.html").read_bytes() == page
    assert runs(setting=Setting(6)) == 1
    assert runs() == 1  # the other setting took its place
    result.write_bytes(first[:-40])
    assert runs() == 1  # a damaged result
    monkeypatch.setattr("dropkit.__version__", "9.9.9")
    found = runner.digest(examples.COUNTS, Setting(), "")
    monkeypatch.undo()
    assert found != runner.digest(examples.COUNTS, Setting(), "")


def test_the_report_keeps_what_earlier_runs_of_the_same_setting_found(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(runner, "CLAIMS", (examples.FALLS, examples.HOLDS))

    def shown() -> list[str]:
        return [one.name for one in Results.from_json((tmp_path / "c" / "claims.json").read_text()).outcomes]

    run_claims([examples.HOLDS], out=tmp_path / "c")
    assert shown() == ["holds_here"]
    found = run_claims([examples.FALLS], out=tmp_path / "c")
    assert [one.name for one in found.outcomes] == ["falls"]
    assert shown() == ["falls", "holds_here"]  # in the order of the article
    run_claims([examples.FALLS], Setting(seed=1), out=tmp_path / "c")
    assert shown() == ["falls"]


def test_a_digest_hangs_on_declaration_setting_and_data():
    def digest(claim=examples.HOLDS, setting=Setting(), seen="data") -> str:  # noqa: B008 - frozen
        return runner.digest(claim, setting, seen)

    louder = dataclasses.replace(examples.RULES[0], bound=0.1)
    others = [
        digest(dataclasses.replace(examples.HOLDS, rules=(louder, *examples.RULES[1:]))),
        digest(dataclasses.replace(examples.HOLDS, condition="")),
        digest(setting=Setting(seed=1)),
        digest(setting=Setting(full=True)),
        digest(seen="other data"),
        digest(dataclasses.replace(examples.HOLDS, experiment=CLAIMS[0].experiment)),
    ]
    assert len({digest(), *others}) == 1 + len(others)
    assert digest(dataclasses.replace(examples.HOLDS, seconds=99)) == digest()


def test_the_data_that_are_there_have_a_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DROPKIT_DATA", str(tmp_path / "data"))
    found = [data.fingerprint()]
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    found.append(data.fingerprint())
    assert found[0] == found[1]  # an empty folder is no data
    for content in (b"1", b"12"):
        (tmp_path / "data" / "mnist" / "a.npz").write_bytes(content)
        found.append(data.fingerprint())
    assert len(set(found)) == 3


def test_the_longest_claim_begins_first(quick):
    seen: list[runner.Step] = []
    tried = [dataclasses.replace(examples.HOLDS, name=f"c{k}", seconds=k) for k in (3, 1, 2)]
    run_claims(tried, jobs=1, watch=seen.append)  # none of them is a value of its module: they fail, in order
    assert [step.name for step in seen if step.state == "begun"] == ["c3", "c2", "c1"]
    assert "holds no claim 'c3'" in next(step.said for step in seen if step.state == "failed")


def test_without_a_folder_nothing_is_written(tmp_path, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_claims([examples.HOLDS]).outcomes[0].verdict == "holds"
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named_with_its_extra(quick, monkeypatch):
    asked = ['alpha-thing>=3.0; extra == "alpha"', 'dropkit[alpha]; extra == "all"', "numpy>=2",
             "pytest>=8; extra == 'fine'"]  # fmt: skip
    monkeypatch.setattr(runner.importlib.metadata, "requires", lambda name: asked)
    assert runner.missing_package(("fine",)) is None
    assert runner.missing_package(()) is None
    assert runner.missing_package(("fine", "all")) == "alpha-thing"
    claim = dataclasses.replace(examples.HOLDS, extras=("all",))
    (left,) = run_claims([claim]).unfinished
    assert (left.status, left.line) == (
        "not run",
        "holds_here needs alpha-thing, which is not installed: pip install 'dropkit[all]'",
    )


def test_bad_settings_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(OptionError, match="at least 5 repetitions"):
        run_claims([examples.HOLDS], Setting(seeds=4))
    with pytest.raises(OptionError, match="first seed is 0 or more"):
        run_claims([examples.HOLDS], Setting(seed=-1))
    with pytest.raises(OptionError, match="at least one process"):
        run_claims([examples.HOLDS], jobs=0)
    (tmp_path / "report.html").write_text("somebody else's")
    with pytest.raises(OutputError, match="nor one that dropkit claims made"):
        run_claims([examples.HOLDS], out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no folder can be made there"):
        run_claims([examples.HOLDS], out=tmp_path / "file" / "c")


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(asked, seconds: float = 60.0) -> bool:
    """Wait for something that another process does."""
    for _ in range(int(seconds / 0.05)):
        if asked():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_who_stops_the_run_stops_its_processes_and_keeps_what_is_finished(tmp_path, counter):
    out = tmp_path / "c"

    def stop(step: runner.Step) -> None:
        if step.state == "finished":  # beside it the other one sleeps
            assert until(lambda: counter.exists() and counter.read_text())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_claims([examples.SLEEPS, examples.HOLDS], out=out, jobs=2, watch=stop)
    assert not is_running(int(counter.read_text()))
    assert [path.name for path in (out / "results").iterdir()] == ["holds_here.json"]
    seen: list[runner.Step] = []
    run_claims([examples.HOLDS], out=out, watch=seen.append)
    assert [step.state for step in seen] == ["kept"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_process_ends_when_its_parent_is_gone(tmp_path, counter):
    (tmp_path / "results").mkdir()
    one = runner._start(examples.SLEEPS, Setting(), "0" * 64, tmp_path)
    assert until(lambda: counter.exists() and counter.read_text())
    assert is_running(one.process.pid)
    one.process.stdin.close()  # as the system does for a parent that is killed
    assert one.process.wait(60) == 130


# --- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def dropkit(tmp_path, quick, monkeypatch, capsys):
    """Run the command in an empty folder, over claims of this test's own."""
    monkeypatch.chdir(tmp_path)
    known = (examples.HOLDS, examples.FALLS, examples.RAISES, examples.LACKS)
    monkeypatch.setattr("dropkit.claims.choose", lambda names: choose(names, known))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dropkit", "claims", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def test_the_command_prints_the_table_and_goes_on_where_it_was(dropkit, tmp_path):
    status, out, err = dropkit("holds_here", "falls", "--jobs", "2")
    assert status == 0
    assert "✗ does not hold here" in out
    assert "2 claims: 1 holds, 1 does not hold here." in out
    assert {line.partition(",")[0] for line in err.splitlines()} == {
        "holds_here: holds",
        "falls: does not hold here",
    }
    assert {path.name for path in (tmp_path / "claims").iterdir()} == {
        "claims.json",
        "report.html",
        "results",
    }
    status, _, err = dropkit("holds_here", "raises", "lacks")
    assert status == 1
    assert "holds_here: holds, kept from an earlier run" in err
    assert "raises: failed: ValueError: the figures went astray" in err
    assert "lacks: not run: needs figment" in err
    status, out, _ = dropkit("holds_here", "--json")
    assert status == 0
    assert Results.from_json(out).outcomes[0].name == "holds_here"


def test_the_command_lists_the_claims_and_knows_their_names(dropkit, tmp_path):
    status, out, _ = dropkit("--list")
    assert (status, out.splitlines()[1]) == (0, "falls       A gain that is not seen")
    status, out, _ = dropkit("--list", "falls", "--json")
    assert [one["title"] for one in json.loads(out)] == ["A gain that is not seen"]
    status, _, err = dropkit("fails")
    assert status == 2
    assert err == (
        "dropkit: 'fails' was given. Did you mean falls? The claims are holds_here, falls, raises, lacks.\n"
    )
    assert dropkit("--seeds", "4")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_command_of_which_nothing_can_run_fails(dropkit):
    assert dropkit("lacks")[0] == 1


def test_a_command_that_is_interrupted_says_how_to_go_on(dropkit, monkeypatch):
    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dropkit.claims.run_claims", interrupted)
    status, _, err = dropkit("falls")
    assert status == 130
    assert err == (
        "dropkit: interrupted; finished claims are kept in claims, and the same command goes on from there.\n"
    )


def test_the_real_claims_are_declared_so_that_their_processes_find_them():
    from dropkit.claims.worker import find_claim

    names = [claim.name for claim in CLAIMS]
    assert len(set(names)) == len(names)
    for claim in CLAIMS:
        assert find_claim(runner.experiment_of(claim).__module__, claim.name) is claim
        assert claim.name.replace("_", "").isalnum()
        assert claim.name == claim.name.lower()
        assert claim.article
        assert claim.prediction
        assert any(rule.kind != "shown" for rule in claim.rules)
        assert len({rule.quantity for rule in claim.rules}) == len(claim.rules)
