"""The public checks: each planted fault is caught by the check named for it, and what is right passes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import dropkit as dk
import faulty_dropouts as faulty
from dropkit.errors import BrokenContractError, DropkitError, OptionError, ProbabilityError, ShapeError
from dropkit.testing import CHECKS, Outcome, Report, check_dropout, compare
from dropkit.testing.__main__ import main, others
from dropkit.testing.chance import bernstein_p_value, binomial_p_value

ROOT = Path(__file__).resolve().parent.parent
SLOW = [name for name, check in CHECKS.items() if check.slow]

# Fault -> the checks that must catch it.
FAULTS = {
    faulty.ForgetsTheScale: ["survivors_have_one_exact_scale", "mean_is_as_promised", "dtype_is_kept"],
    faulty.DropsWhatItShouldKeep: ["rate_is_p", "tiny_rate_drops"],
    faulty.EightBitThreshold: ["rate_is_p", "tiny_rate_drops"],
    faulty.SixteenBitThreshold: ["tiny_rate_drops"],
    faulty.SparesTheLastColumn: ["rate_holds_at_every_position"],
    faulty.SparesTheFirstRow: ["rate_holds_at_every_position"],
    faulty.ScalesByTheKeptShare: ["survivors_have_one_exact_scale"],
    faulty.DropsHalfAsOften: ["variance_is_as_promised", "survivors_have_one_exact_scale"],
    faulty.DropsWholeRows: ["mask_is_shared_as_stated", "neighbours_in_a_row_are_independent"],
    faulty.OneMaskForAllRows: ["mask_is_shared_as_stated", "rows_are_independent"],
    faulty.ScalesALittleAtZero: ["p_zero_is_the_identity"],
    faulty.DividesByZeroAtOne: ["p_one_drops_everything"],
    faulty.TakesAnyRate: ["rate_outside_is_refused"],
    faulty.MultipliesByZero: ["dropped_nan_and_infinity_are_gone", "dropped_element_stops_any_gradient"],
    faulty.SparesTheNegative: ["mask_ignores_the_values"],
    faulty.DrawsAnewForEachRate: ["higher_rate_drops_more_of_the_same"],
    faulty.IgnoresEval: ["evaluation_is_the_identity", "training_switch_is_obeyed"],
    faulty.DetachesInEval: ["evaluation_passes_gradients_through"],
    faulty.DrawsInEval: ["evaluation_leaves_the_generator_alone"],
    faulty.RestsWithoutGradients: ["drops_without_gradients_too"],
    faulty.DrawsTwiceForGradients: ["mask_is_the_same_with_and_without_gradients"],
    faulty.LowersUnderAutocast: ["autocast_keeps_the_dtype"],
    faulty.DrawsAnewInBackward: [
        "backward_uses_the_mask_of_forward",
        "second_backward_uses_it_too",
        "gradcheck_passes",
        "checkpoint_gives_the_plain_gradient",
        "forward_mode_is_right",
    ],
    faulty.KeepsNothing: [  # reverse mode, once, is all it can
        "double_backward_is_right",
        "forward_mode_is_right",
        "func_grad_is_right",
        "func_jvp_is_right",
        "vmap_same_shares_one_mask",
        "vmap_of_the_gradient_is_right",
    ],
    faulty.SavesItsMask: ["nothing_is_kept_for_backward"],
    faulty.HidesItsMask: ["nothing_is_kept_for_backward"],
    faulty.RemembersItsInput: ["nothing_is_kept_for_backward"],
    faulty.DropsAFinishedNaN: ["dropped_nan_has_no_gradient"],
    faulty.OwnGenerator: [
        "manual_seed_reproduces",
        "checkpoint_gives_the_plain_gradient",
        "reentrant_checkpoint_gives_the_plain_gradient",
        "vmap_different_draws_anew",
    ],
    faulty.ReturnsFloat32: ["dtype_is_kept"],
    faulty.DropsRealAndImaginaryApart: ["complex_is_kept"],
    faulty.DrawsInTheInputsPrecision: ["rate_holds_in_half_precision", "mask_is_the_same_in_every_dtype"],
    faulty.NeedsMemory: ["device_is_kept"],
    faulty.ReturnsContiguous: ["shape_and_memory_format_are_kept"],
    faulty.FollowsStrides: ["mask_follows_logical_order"],
    faulty.TakesMemoryForContiguous: ["non_contiguous_input_is_right"],
    faulty.NeedsTwoDims: ["scalar_and_empty_inputs_work"],
    faulty.IgnoresInplace: ["inplace_writes_into_its_input"],
    faulty.WritesNeighbours: ["inplace_on_a_part_leaves_the_rest"],
    faulty.WritesItsInput: ["input_is_left_alone"],
    faulty.SameMaskForEver: ["two_calls_differ", "calls_are_independent", "seeds_are_independent"],
    faulty.KeepsLeftoverBits: ["fork_rng_restores", "generator_state_can_be_put_back"],
    faulty.GroupsOfFour: ["neighbours_in_a_row_are_independent", "row_totals_vary_as_they_should"],
    faulty.PairsOfRows: ["rows_are_independent"],
    faulty.HalfOfTheLastMask: ["calls_are_independent"],
    faulty.HalvesTheSeed: ["seeds_are_independent"],
    faulty.FixedCountInEachRow: ["row_totals_vary_as_they_should"],
    faulty.HasABuffer: ["state_dict_stays_empty", "moving_and_casting_the_model_works"],
    faulty.CannotBeCopied: ["deepcopy_works"],
    faulty.HoldsALambda: ["nothing_in_it_resists_pickling"],
    faulty.SaysNothing: ["repr_shows_the_rate"],
}
FAULTS_OF_ADDRESS = {
    faulty.CountsFromTheBatch: ["split_changes_nothing", "every_field_of_the_address_matters"],
    faulty.KnowsPositionsOnly: ["shuffle_changes_nothing"],
    faulty.RemembersHistory: ["history_changes_nothing", "split_changes_nothing"],
    faulty.DrawsBesideTheAddress: ["address_leaves_the_generator_alone"],
    faulty.ForgetsTheStep: ["every_field_of_the_address_matters"],
    faulty.ForgetsTheCall: ["every_field_of_the_address_matters"],
    faulty.NoisyUnderAnyAddress: ["noise_can_be_had_in_evaluation_only_if_asked"],
    faulty.LooksUpTheAddressInBackward: ["backward_needs_no_open_address"],
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small; threads would wait for each other on a busy machine
    yield
    torch.set_num_threads(before)


def pairs(table):
    return [
        pytest.param(kind, name, id=f"{kind.__name__}-{name}")
        for kind, names in table.items()
        for name in names
    ]


@pytest.mark.parametrize(("kind", "name"), pairs(FAULTS))
def test_a_planted_fault_is_caught_by_the_check_named_for_it(kind, name):
    assert check_dropout(kind, select=[name]).failed == (name,)


@pytest.mark.parametrize(("kind", "name"), pairs(FAULTS_OF_ADDRESS))
def test_a_planted_fault_of_the_address_is_caught_too(kind, name):
    assert check_dropout(kind, select=[name], context=faulty.toy_address).failed == (name,)


def test_a_stack_of_addresses_that_threads_share_is_caught():
    name = "threads_do_not_disturb_each_other"  # the toy's open addresses are one list for all threads
    assert check_dropout(faulty.Addressed, select=[name], context=faulty.toy_address).failed == (name,)


def test_what_is_plain_and_right_passes_all_but_what_it_does_not_try():
    report = check_dropout(faulty.Sound)
    assert report.failed == ("nothing_is_kept_for_backward",)
    assert check_dropout(faulty.KeepsNothing, select=report.failed).passed == report.failed


def test_what_has_an_address_and_is_right_passes():
    laws = [
        "addresses",
        "checkpoint_under_an_address_is_never_silently_wrong",
        "noise_can_be_had_in_evaluation_only_if_asked",
    ]
    report = check_dropout(
        faulty.Addressed, select=laws, skip=["threads_do_not_disturb_each_other"], context=faulty.toy_address
    )
    # The toy knows no members, and a checkpoint counts its calls anew: which is what the check is there to say.
    assert report.failed == ("checkpoint_under_an_address_is_never_silently_wrong",)
    assert report.not_applicable == ("member_is_one_function",)


def test_every_check_has_seen_its_fault():
    caught = {name for table in (FAULTS, FAULTS_OF_ADDRESS) for names in table.values() for name in names}
    elsewhere = {"threads_do_not_disturb_each_other", "checkpoint_under_an_address_is_never_silently_wrong"}
    not_planted = {"functional_call_works", "member_is_one_function"}
    assert set(CHECKS) - caught - elsewhere - not_planted == set(SLOW)


# --- dropkit's own, and torch's -----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.99])
def test_our_layer_keeps_every_law(p):
    report = check_dropout(dk.nn.Dropout(p))
    report.raise_on_failure()
    assert report.not_applicable == ()


def test_our_layer_keeps_the_laws_of_compilers():
    report = check_dropout(dk.nn.Dropout, select=SLOW)
    report.raise_on_failure()
    assert set(report.passed) == set(SLOW)


def test_our_function_keeps_every_law_that_applies():
    report = check_dropout(dk.functional.dropout)
    assert report.failed == ()
    assert {report[name].reason for name in report.not_applicable} == {"it is a function"}


TORCH_BREAKS = {
    "dropped_nan_and_infinity_are_gone",
    "dropped_element_stops_any_gradient",
    "nothing_is_kept_for_backward",
    "complex_is_kept",
    "mask_follows_logical_order",
}


@pytest.mark.parametrize(
    "thing", [nn.Dropout(0.01), nn.Dropout(0.99), F.dropout], ids=["rare", "nearly all", "function"]
)
def test_torchs_own_breaks_just_what_is_known(thing):
    assert set(check_dropout(thing).failed) == TORCH_BREAKS


@pytest.mark.parametrize(
    "kind", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
)
def test_the_promises_of_torchs_other_layers_are_known(kind):
    report = check_dropout(
        kind, select=["values", "dtype_is_kept", "backward_uses_the_mask_of_forward", "rows_are_independent"]
    )
    assert report.failed == ("dropped_nan_and_infinity_are_gone",)


def test_a_wrong_promise_is_noticed():
    assert (
        "mask_is_shared_as_stated"
        in check_dropout(nn.Dropout2d, kind="elementwise", select=["values"]).failed
    )
    assert "mask_is_shared_as_stated" in check_dropout(nn.Dropout, kind="rows", select=["values"]).failed
    assert "mean_is_as_promised" in check_dropout(nn.AlphaDropout, law="inverted", select=["values"]).failed


def test_shared_dims_are_found_by_trial():
    report = check_dropout(
        faulty.DropsWholeRows, kind="auto", select=["mask_is_shared_as_stated", "rate_is_p"]
    )
    assert report.failed == ()
    assert "dims [1]" in report.contract
    assert (
        check_dropout(faulty.OneMaskForAllRows, kind="auto", select=["rate_is_p"]).contract.count("dims [0]")
        == 1
    )


def test_a_function_of_the_input_alone_is_checked_at_its_own_rate():
    report = check_dropout(lambda x: F.dropout(x, 0.25), p=0.25, name="mine")
    assert report.subject == "mine"
    assert report["rate_is_p"].result == "passed"
    assert report["p_zero_is_the_identity"].reason == "its rate cannot be set"
    assert report["evaluation_is_the_identity"].reason == "it has no training flag"
    assert "rate_is_p" in check_dropout(lambda x: F.dropout(x, 0.25), p=0.3).failed


def test_other_names_for_the_rate_are_known():
    def drop_path(x, drop_prob=0.0, train=True):
        return F.dropout(torch.ones(len(x), 1), drop_prob, train) * x

    report = check_dropout(drop_path, kind="rows", select=["values", "evaluation_is_the_identity", "draws"])
    assert set(report.failed) == {"dropped_nan_and_infinity_are_gone"}


def test_classic_dropout_is_scaled_in_evaluation():
    def classic(x, p, training):
        return torch.where(torch.rand(x.shape) >= p, x, 0.0) if training else x * (1 - p)

    laws = ["values", "evaluation_is_the_identity", "evaluation_passes_gradients_through"]
    # At p = 0 and p = 1, and wherever it is in between.
    assert check_dropout(classic, law="classic", select=laws).failed == ("rate_outside_is_refused",)


# --- the run -------------------------------------------------------------------------------------------


def test_a_run_leaves_torchs_generator_as_it_was():
    before = torch.get_rng_state()
    check_dropout(nn.Dropout, select=["draws"])
    assert torch.equal(before, torch.get_rng_state())


def test_a_check_finds_the_same_alone_and_in_company():
    # The count in the message depends on the masks, so equal messages mean equal masks.
    together = check_dropout(faulty.EightBitThreshold, select=["values"])["rate_is_p"]
    assert check_dropout(faulty.EightBitThreshold, select=["rate_is_p"])["rate_is_p"] == together
    assert check_dropout(faulty.EightBitThreshold, select=["rate_is_p"], seed=1)["rate_is_p"] != together


def test_false_alarms_are_as_rare_as_said():
    # At a false alarm of 0.4 the checks of a right dropout may cry at most so often: 12 runs of 5 checks, each
    # with bits of its own. They must also cry at all, or the rate would mean nothing. False alarm of this test: 1e-9.
    laws = [
        "rate_is_p",
        "rate_holds_in_half_precision",
        "rows_are_independent",
        "calls_are_independent",
        "tiny_rate_drops",
    ]
    cries = sum(
        len(check_dropout(dk.nn.Dropout, select=laws, seed=seed, false_alarm=0.4).failed)
        for seed in range(12)
    )
    assert 0 < cries <= stats.binom.isf(1e-9, 60, 0.4)
    assert check_dropout(dk.nn.Dropout, select=laws, false_alarm=1e-9).false_alarm == pytest.approx(5e-9)


@pytest.mark.parametrize(
    ("count", "trials", "p"),
    [
        (0, 40, 0.1),
        (12, 40, 0.1),
        (300, 1000, 0.3),
        (350, 1000, 0.3),
        (24, 25_000_000, 1e-6),
        (60, 25_000_000, 1e-6),
        (40, 40, 0.9),
    ],
)
def test_binomial_tails_are_exact(count, trials, p):
    law = stats.binom(trials, p)
    tail = law.sf(count - 1) if count >= trials * p else law.cdf(count)
    assert binomial_p_value(count, trials, p) == pytest.approx(min(1.0, 2 * tail), rel=1e-5)


def test_bernsteins_bound_is_never_below_the_exact_tail():
    n, p = 400, 0.2
    for count in range(81, 160):
        exact = stats.binom.sf(count - 1, n, p)
        assert bernstein_p_value(count - n * p, n * p * (1 - p), 1 - p) >= exact
    assert bernstein_p_value(0.0, 0.0, 0.0) == 1.0
    assert bernstein_p_value(80.0, 64.0, 0.8) < 1e-9


# --- the record ----------------------------------------------------------------------------------------

REPORT = Report("mine", "inverted", 1e-8, (
    Outcome("one", "values", "One law.", "passed", ""),
    Outcome("two", "values", "Two laws.", "failed", "saw | that"),
    Outcome("three", "draws", "Three laws.", "not applicable", "it is a function"),
))  # fmt: skip


def test_the_record_says_what_was_found():
    assert (REPORT.passed, REPORT.failed, REPORT.not_applicable) == (("one",), ("two",), ("three",))
    assert "1 passed, 1 failed, 1 not applicable" in REPORT.text()
    assert r"| `two` | Two laws. | **no** | saw \| that |" in REPORT.to_markdown()
    assert compare([REPORT, REPORT]).splitlines()[-1] == "| | kept, of those that apply | 1 of 2 | 1 of 2 |"
    with pytest.raises(BrokenContractError, match=r"mine breaks 1 of 3 laws:\n  two: Two laws\. But: saw"):
        REPORT.raise_on_failure()
    with pytest.raises(AttributeError):
        REPORT.subject = "yours"
    with pytest.raises(KeyError):
        REPORT["four"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"p": 1.5}, ProbabilityError),
        ({"p": math.nan}, ProbabilityError),
        ({"p": 0.001}, OptionError),
        ({"false_alarm": 0.0}, OptionError),
        ({"false_alarm": 2.0}, ProbabilityError),
        ({"select": ["no_such_check"]}, OptionError),
        ({"skip": ["no_such_topic"]}, OptionError),
        ({"kind": "spaces"}, OptionError),
        ({"law": "gaussian"}, OptionError),
        ({"shape": (4, 3), "shared": (2,)}, ShapeError),
        ({"shape": (4, 3), "shared": (0, 1)}, ShapeError),
        ({"shape": (4, 0)}, ShapeError),
    ],
)  # fmt: skip
def test_a_wrong_question_is_said(arguments, error):
    with pytest.raises(error, match=r"was given|were given"):
        check_dropout(nn.Dropout, **arguments)


@pytest.mark.parametrize("thing", [3, int])
def test_what_cannot_be_checked_is_said(thing):
    with pytest.raises(DropkitError, match="was given"):
        check_dropout(thing)


# --- the command and its page --------------------------------------------------------------------------


def test_every_check_has_a_law_of_one_sentence():
    for check in CHECKS.values():
        assert check.law.endswith((".", ".)")), check.name
        assert "|" not in check.law


def test_the_page_shows_every_check():
    page = (ROOT / "docs" / "contract.md").read_text()
    missing = [name for name in CHECKS if not re.search(rf"^\| `{name}` \|", page, flags=re.MULTILINE)]
    assert not missing
    for name, check in CHECKS.items():
        assert f"| `{name}` | {check.law} |" in page


def test_the_command_prints_the_table_and_what_was_seen(monkeypatch, capsys):
    monkeypatch.setattr("dropkit.testing.__main__.SUBJECTS", (("mine", faulty.Sound), ("theirs", nn.Dropout)))
    monkeypatch.setattr("dropkit.testing.__main__.OTHERS", ())
    assert main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "| check | law | `mine` | `theirs` |" in printed
    assert (
        "| `rate_is_p` | The share of dropped elements is p, at rates from 0.01 to 0.9. | yes | yes |"
        in printed
    )
    assert "compiles_without_a_graph_break" not in printed
    assert "- `nothing_is_kept_for_backward`: 4 bytes are kept for each element of the mask" in printed


def test_others_are_tried_where_they_are_and_named_where_they_are_not(monkeypatch, capsys):
    there = ("numpy's", "numpy", "numpy", lambda numpy: faulty.Sound, {"kind": "elementwise"})
    absent = ("nobody's", "no-such-distribution", "numpy", lambda numpy: nn.Dropout, {})
    broken = ("half", "numpy", "numpy.no_such_module", lambda module: nn.Dropout, {})
    monkeypatch.setattr("dropkit.testing.__main__.OTHERS", (there, absent, broken))
    ((name, thing, options),) = others()
    assert (name.split()[0], thing, options) == ("numpy's", faulty.Sound, {"kind": "elementwise"})
    said = capsys.readouterr().err
    assert "nobody's: not installed" in said
    assert "half: cannot be imported (ModuleNotFoundError" in said


def test_the_command_refuses_what_it_does_not_know():
    run = subprocess.run([sys.executable, "-m", "dropkit.testing", "--fast"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "--fast" in run.stderr
