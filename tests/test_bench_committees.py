"""The benchmark's committee rows: peers are checked before they are timed, and the fastest right one is the peer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import dropkit as dk
from dropkit.bench import bench_from_json, choose, committees, peers, rivals, run, run_bench, to_json, to_text
from dropkit.bench.committee_models import perceptron, resnet18
from dropkit.bench.memory import Memory
from dropkit.bench.peers import PEERS, Ask, Peer, batch, import_trouble, in_training, loop, moments, widest
from dropkit.bench.rivals import Contest, Rival, examine, same_law, same_moments, t_threshold, welch
from dropkit.bench.rows import Row, committee_rows
from dropkit.bench.run import measure
from dropkit.bench.timing import LONG_NS, compare
from dropkit.bench.work import Work
from dropkit.errors import BrokenContractError

ROOT = Path(__file__).parent.parent
HAND = PEERS[:2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small work; threads that wait for a busy core would be most of its time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ToldClock:
    """A clock that only the work moves on, by what the work is said to take."""

    def __init__(self) -> None:
        self.now, self.calls = 0, []

    def __call__(self) -> int:
        return self.now

    def works(self, nanoseconds: int, name: str = "") -> Work:
        def run() -> Tensor:
            self.calls.append(name)
            self.now += nanoseconds
            return torch.zeros(3)

        return Work(run)

    def rival(self, nanoseconds: int, name: str) -> Rival:
        work = self.works(nanoseconds, name)

        def check(clock: Callable[[], int]) -> int:
            begun = clock()
            work.forward()
            return clock() - begun

        return Rival(name, work, check)


# --- one law or two ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chance", [1e-2, 1e-6, 1e-9])
@pytest.mark.parametrize("degrees", [15, 31, 49, 999])
def test_the_threshold_is_that_of_students_t(chance: float, degrees: int) -> None:
    assert t_threshold(chance, degrees) == pytest.approx(stats.t.isf(chance / 2, degrees), rel=0.03)


def test_equal_laws_are_told_apart_no_oftener_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "FALSE_ALARM", 0.05)
    alarms, random = 0, torch.Generator().manual_seed(3)
    for _ in range(400):
        # Members of ours stray together over rows, those of the peer do not: the laws of each output are one.
        together = torch.randn(40, 1, 3, generator=random) + 0.2 * torch.randn(40, 5, 3, generator=random)
        apart = 1.04**0.5 * torch.randn(40, 5, 3, generator=random)
        try:
            same_law(together, apart, "peer")
        except BrokenContractError:
            alarms += 1
    # Binomial at 1e-6; with a fixed seed this is the chance that a check which keeps its word fails here.
    assert alarms <= stats.binom.isf(1e-6, 400, 0.05)


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "shift": (lambda s: s + 1, "a mean lies"),
    "one output": (lambda s: s + torch.tensor([0.0, 0.0, 1.5]), "a mean lies"),
    "wider": (lambda s: 2 * s, r"its spread is 1\.99 times ours"),
    "narrower": (lambda s: s / 2, r"its spread is 0\.50 times ours"),
    "none": (lambda s: s[:1].expand(s.shape), "its spread is exactly 0"),
    "not finite": (lambda s: s.index_fill(0, torch.tensor(0), torch.inf), "an output is not finite"),
    "other shape": (lambda s: s[:, :-1], r"outputs \(4, 3\), ours \(5, 3\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_law_is_told_apart(fault: str) -> None:
    random = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 60, 5, 3, generator=random)
    same_law(ours, theirs, "peer")
    change, said = FAULTS[fault]
    with pytest.raises(BrokenContractError, match=f"peer: {said}"):
        same_law(ours, change(theirs), "peer")


def test_what_never_varies_may_not_differ_at_all() -> None:
    ours = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).repeat(20, 1)
    same_law(ours, ours.clone(), "peer")
    with pytest.raises(BrokenContractError, match="a mean lies inf"):
        same_law(ours, ours + torch.tensor([0.0, 1e-3]), "peer")
    assert welch(torch.ones(3), torch.ones(3)) == 0


def test_samples_meet_exact_moments_or_are_refused() -> None:
    random = torch.Generator().manual_seed(1)
    mean, deviation = torch.randn(2, 4, 50, generator=random).abs() + 1
    samples = mean + deviation * torch.randn(500, 4, 50, generator=random)
    same_moments(mean, deviation, samples, "peer")
    for wrong, said in (
        (samples + 0.5, "a mean"),
        (mean + 1.4 * (samples - mean), "a variance"),
        (samples[:, :3], "outp"),
    ):
        with pytest.raises(BrokenContractError, match=f"peer: {said}"):
            same_moments(mean, deviation, wrong, "peer")


def test_exact_moments_raise_an_alarm_no_oftener_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "FALSE_ALARM", 0.05)
    random, alarms = torch.Generator().manual_seed(5), 0
    for _ in range(400):
        try:
            same_moments(torch.zeros(8), torch.ones(8), torch.randn(200, 8, generator=random), "peer")
        except BrokenContractError:
            alarms += 1
    assert alarms <= stats.binom.isf(1e-6, 400, 0.05)


# --- a contest -----------------------------------------------------------------------------------------


def contest(clock: ToldClock, *found: Rival, against: str = "", ours: int = 1_000_000) -> Contest:
    return Contest(clock.works(ours, "ours"), lambda: None, found, 8, against)


def test_the_fastest_peer_that_is_right_is_the_peer() -> None:
    clock = ToldClock()

    def wrong(_: object) -> int:
        raise BrokenContractError("quick: it is wrong" + rivals.NOT_TIMED)

    def broken(_: object) -> int:
        raise RuntimeError("no kernel\nand a long story")

    found = (
        clock.rival(5_000_000, "slow"),
        Rival("quick", clock.works(1), wrong),
        clock.rival(3_000_000, "good"),
        Rival("broken", clock.works(1), broken),
        Rival("absent", None, missing="not installed"),
        clock.rival(2 * LONG_NS, "long"),
    )
    pair, name, standings = contest(clock, *found).settle(clock)
    assert name == "good"
    assert pair.peer is found[2].work
    assert [(s.name, s.nanoseconds, s.reason) for s in standings] == [
        ("slow", 5e6, ""),
        ("quick", None, "it is wrong"),
        ("good", 3e6, ""),
        ("broken", None, "RuntimeError: no kernel"),
        ("absent", None, "not installed"),
        ("long", 2 * LONG_NS, ""),
    ]
    assert clock.calls.count("long") == 1  # the check's own call is its time
    assert contest(clock, *found, against="slow").settle(clock)[1] == "slow"


def test_without_a_right_peer_nothing_is_timed() -> None:
    clock = ToldClock()
    absent = Rival("absent", None, missing="not installed")
    for alone in (contest(clock, absent), contest(clock, clock.rival(1, "there"), absent, against="absent")):
        for ask in (alone.check, lambda alone=alone: alone.settle(clock)):
            with pytest.raises(
                BrokenContractError, match=r"none is left to compare with \(absent: not installed\)"
            ):
                ask()
    assert "ours" not in clock.calls


def test_what_is_wrong_with_ours_is_not_put_down_to_the_peers() -> None:
    clock = ToldClock()

    def wrong() -> None:
        raise BrokenContractError("ours: wrong")

    bad = dataclasses.replace(contest(clock, clock.rival(1, "peer")), check_ours=wrong)
    with pytest.raises(BrokenContractError, match="ours: wrong"):
        bad.settle(clock)
    assert clock.calls == []


def test_a_row_names_its_peer_and_keeps_the_times_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "memory_of", lambda work, again: Memory(0, 0))  # counting takes seconds to start
    clock = ToldClock()
    made = contest(
        clock,
        clock.rival(9_000_000, "slow"),
        clock.rival(4_000_000, "good"),
        Rival("absent", None, missing="no"),
    )
    row = Row("row", "some work", "the best peer", "times faster", 3, (1,), (8,), (8,), lambda shape: made)
    result = measure(row, 1, clock, 6, 0)
    assert (result.peer, result.figure.middle, result.verdict) == ("the best peer: good", 4, "reached")
    bench = dataclasses.replace(run_bench([], clock=clock, repeats=6), results=(result,))
    assert bench_from_json(to_json(bench)) == bench
    text = to_text(bench)
    assert "row, 1 thr, each peer alone: slow: 9 ms; good: 4 ms; absent: no." in text
    assert "some work; against the best peer: good" in text


def test_long_calls_come_without_an_untimed_one() -> None:
    clock = ToldClock()
    found = compare(
        clock.works(LONG_NS, "ours").forward, clock.works(3 * LONG_NS, "peer").forward, clock=clock, repeats=9
    )
    assert found.ratio.middle == 3
    assert found.repeats == 6
    assert (clock.calls.count("ours"), clock.calls.count("peer")) == (1 + 2 * 6, 1 + 6)
    clock = ToldClock()
    compare(
        clock.works(LONG_NS - 1, "ours").forward,
        clock.works(3 * LONG_NS, "peer").forward,
        clock=clock,
        repeats=9,
    )
    assert clock.calls.count("ours") > 4 * 6
    assert clock.calls.count("peer") == 1 + 6


# --- peers ---------------------------------------------------------------------------------------------

SHAPE = (300, 3, 6)


def build(shape: object) -> nn.Module:
    return perceptron((6, 24, 24, 2), 0.4)


def judged(
    prepare: Callable[[nn.Module, int], Ask], build: Callable[..., nn.Module] = build, shape=SHAPE
) -> str:
    """What is wrong with a peer that works like this; "" where nothing is."""
    torch.manual_seed(0)
    made = committees.sampling(build, shape, peers=(Peer("peer", prepare),))
    made.check_ours()
    return examine(made.rivals[0], lambda: 0).reason


def asking(
    change: Callable[[nn.Module], object], summary: Callable[[Tensor], Tensor] = moments
) -> Callable[..., Ask]:
    """A loop around a network that was changed first."""

    def prepare(network: nn.Module, members: int) -> Ask:
        in_training(network)
        change(network)
        return torch.no_grad()(lambda x: summary(torch.stack([network(x) for _ in range(members)])))

    return prepare


def rates(factor: float) -> Callable[[nn.Module], None]:
    def change(network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p *= factor

    return change


def test_loop_and_batch_are_right() -> None:
    assert judged(loop) == judged(batch) == judged(asking(lambda network: None)) == ""


def test_a_peer_that_is_wrong_is_found() -> None:
    assert "its spread is exactly 0" in judged(asking(nn.Module.eval))
    assert "times ours" in judged(asking(rates(2)))
    assert "a mean lies" in judged(asking(rates(0.3)))
    assert "a mean lies" in judged(asking(lambda network: network[-1].bias.data.add_(1)))
    assert "not those of the samples" in judged(asking(lambda network: None, lambda s: moments(s) * 1.01))
    assert judged(asking(lambda network: network.append(nn.Linear(3, 3)))).startswith("RuntimeError")


def test_batchnorm_in_training_mode_is_found() -> None:
    def image(shape: object) -> nn.Module:
        return resnet18(3, 4, p_head=0.5)

    shape = (32, 3, 3, 8, 8)
    assert judged(loop, image, shape) == ""
    assert "a mean lies" in judged(asking(nn.Module.train), image, shape)


def test_a_network_is_not_changed_by_who_asks_it() -> None:
    networks: list[nn.Module] = []

    def keep(shape: object) -> nn.Module:
        networks.append(resnet18(3, 4, p_head=0.5, p_channel=0.3))
        return networks[-1]

    made = committees.sampling(keep, (32, 2, 3, 8, 8), peers=HAND)
    before = {name: t.clone() for name, t in networks[0].state_dict().items()}
    made.check()
    assert not any(module.training for module in networks[0].modules())
    assert all(torch.equal(t, before[name]) for name, t in networks[0].state_dict().items())


def test_every_peer_that_is_installed_is_right_on_a_plain_network() -> None:
    torch.manual_seed(0)
    made = committees.sampling(build, SHAPE)
    assert [rival.name for rival in made.rivals] == [peer.name for peer in PEERS]
    for peer, rival in zip(PEERS, made.rivals, strict=True):
        assert examine(rival, lambda: 0).reason == peer.missing()


def test_a_peer_that_is_not_there_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "make peers" in import_trouble("no-such-package", "no_such_module")
    assert import_trouble("numpy", "numpy.no_such_module").startswith("does not import: ModuleNotFoundError")
    assert import_trouble("numpy", "numpy") == ""
    absent = Peer("absent", loop, "no-such-package", "no_such_module")
    made = committees.sampling(build, SHAPE, peers=(absent,))
    assert "make peers" in examine(made.rivals[0], lambda: 0).reason
    monkeypatch.setattr(committees, "MOST_BYTES", 300 * 3 * 24 * 4 - 1)
    made = committees.sampling(build, SHAPE, peers=HAND)
    assert [bool(rival.missing) for rival in made.rivals] == [False, True]
    assert "GiB" in made.rivals[1].missing


def test_the_widest_value_is_found() -> None:
    assert widest(perceptron((6, 24, 50, 2), 0.4).eval(), torch.zeros(3, 6)) == 4 * 3 * 50


def test_torchvision_is_let_alone_where_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "0.28.0+cpu")
    assert peers.name_torchvision_operators.__wrapped__() is None


# --- rows ----------------------------------------------------------------------------------------------


def test_rows_have_their_targets_and_are_asked_for() -> None:
    rows = {row.name: row for row in committee_rows()}
    assert all(row.slow and row.threads == (1, 2) for row in rows.values())
    assert {name: row.target for name, row in rows.items()} == {
        "committee-mlp-0.5": 5, "committee-mlp-0.1": 1.3, "committee-head": 25, "committee-head-floor": 1.15,
        "committee-channel": 2, "committee-last-layer": 100, "committee-transformer": 1.5, "committee-uci": 20,
    }  # fmt: skip
    assert [row.name for row in choose(["committee-*"])] == list(rows)


def test_the_floor_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    committees.floor((32, 2, 3, 8, 8), 0.5).check()
    monkeypatch.setattr(committees.F, "dropout", lambda x, p: x)
    with pytest.raises(BrokenContractError, match="the floor: its spread is exactly 0"):
        committees.floor((32, 2, 3, 8, 8), 0.5).check()


@dataclasses.dataclass
class Told:
    mean: Tensor
    variance: Tensor


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.001, False), (float("nan"), False)])
def test_exact_moments_are_checked(monkeypatch: pytest.MonkeyPatch, factor: float, right: bool) -> None:
    torch.manual_seed(0)
    kept: list[nn.Linear] = []
    linear = nn.Linear

    def told(committee: dk.Committee, x: Tensor) -> Told:
        last = kept[-1]
        return Told(last(x).detach(), factor * (0.25 / 0.75 * x.square() @ last.weight.detach().T.square()))

    def keeping(*sizes: int) -> nn.Linear:
        kept.append(linear(*sizes))
        return kept[-1]

    monkeypatch.setattr(dk.Committee, "moments", told, raising=False)
    monkeypatch.setattr(committees.nn, "Linear", keeping)
    row = committees.exact((400, 3, 12), 0.25, peers=HAND)
    if right:
        row.check()
        assert [examine(rival, lambda: 0).reason for rival in row.rivals] == ["", ""]
        assert row.elements == 400 * 3 * 12
    else:
        with pytest.raises(BrokenContractError, match="ours: the moments are not exact"):
            row.check()


def test_the_pins_of_the_peers_are_those_of_the_project() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        found = [line.split("==") for line in lines if line and not line.startswith("#")]
        return {re.sub("[-_.]+", "-", package).lower(): version for package, version in found}

    ours, theirs = pins("constraints.txt"), pins("constraints-peers.txt")
    assert {peer.package for peer in PEERS if peer.package} <= set(theirs)
    assert {
        name: (ours[name], version) for name, version in theirs.items() if ours.get(name, version) != version
    } == {}
    assert not {"torch", "numpy", "triton"} & set(theirs)
