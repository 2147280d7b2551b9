"""A committee out of the house says what it said inside."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.committee import ClassificationPrediction, Committee
from dropkit.committee import onnx as onnx_files
from dropkit.committee.export import FrozenCommittee, example_rows, exported_program
from dropkit.committee.frozen import FrozenMembers, NotBatchableError, SiteMask, site_masks
from dropkit.committee.graph import record
from dropkit.committee.look import every_layer_runs
from dropkit.committee.onnx import export, relative_difference
from dropkit.errors import ExportError, MissingPackageError, NoMaskError, OptionError, OutputError, ShapeError
from dropkit.masks import masks


class Picture(nn.Module):
    """Convolutions, a residual branch, channel dropout between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.maps, self.units = nn.BatchNorm2d(6), nn.Dropout2d(0.3), nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.maps(torch.relu(self.stem(x)))
        h = torch.relu(self.norm(self.inner(h)) + h)
        return self.head(self.units(self.maps(h).mean(dim=(2, 3))))


class Steps(nn.Module):
    """Two layers of torch's LSTM with dropout between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(3, 5, 2, batch_first=True, dropout=0.4)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


def perceptron(outputs: int = 2, p: float = 0.3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(inplace=True), nn.Dropout(p), nn.Linear(16, 8), nn.LayerNorm(8), nn.GELU(),
        nn.Dropout(0.5), nn.Linear(8, outputs),
    )  # fmt: skip


def attention() -> nn.Sequential:
    return nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), nn.Flatten(), nn.Linear(32, 2)
    )


# name: model, one row's shape, likelihood
WHOLE: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "perceptron, gaussian": (perceptron, (5,), "gaussian"),
    "pictures, categorical": (Picture, (3, 6, 6), "categorical"),
    "attention, point": (attention, (4, 8), "point"),
    "LSTM, point": (Steps, (4, 3), "point"),
}


def run(path: Path, x: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """What onnxruntime makes of a file, with the optimisations it has by default."""
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": x.numpy()}), strict=True))


@pytest.mark.parametrize("name", WHOLE)
def test_onnxruntime_says_what_the_committee_says_for_any_number_of_rows(name: str, tmp_path: Path) -> None:
    build, shape, likelihood = WHOLE[name]
    committee = Committee(build(), members=6, seed=2**63 + 5, likelihood=likelihood, tile=8)
    done = export(committee, tmp_path / "model.onnx", torch.randn(3, *shape), samples=True)
    assert (done.rows, done.form) == (None, "batched")
    assert done.difference is not None
    assert done.difference < 1e-5
    assert done.bytes == (tmp_path / "model.onnx").stat().st_size
    assert done.inputs == {"x": ("rows", *shape)}
    for rows in (1, 7):
        x = torch.randn(rows, *shape)
        said, prediction = run(done.path, x), committee.predict(x)
        assert list(said) == list(done.outputs)
        for output, value in said.items():
            wanted = getattr(prediction, output).numpy()
            assert value.shape == wanted.shape, output
            assert relative_difference(value, wanted) < 1e-5, output
        spread = said["std" if "std" in said else "mutual_information"]
        assert (spread > 1e-4).all()  # the masks are still there
        again = run(done.path, x)
        assert all(np.array_equal(value, again[output]) for output, value in said.items())


def test_the_file_says_which_committee_it_is(tmp_path: Path) -> None:
    committee = Committee(perceptron(), members=5, seed=11)
    export(committee, tmp_path / "m.onnx", torch.randn(4, 5))
    notes = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    said = {"seed": "11", "members": "5", "likelihood": "point", "scheme": "1", "dropkit": dk.__version__}
    assert said.items() <= notes.items()


# --- the frozen module -----------------------------------------------------------------------------------------------


class Edges(nn.Module):
    """Masks of weights, as in DropConnect: members cannot stand among the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Sequential(dk.nn.DropConnect(nn.Linear(4, 6), 0.3), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.all(x)


class Residual(nn.Module):
    """The masked value and the unmasked one meet; one layer draws twice; a dim of the rows is in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 4), dk.nn.Dropout(0.4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        y = self.drop(h) + h
        turned = torch.stack((y, y * 2)).transpose(0, 1)  # (B, 2, 4)
        return self.last(self.drop(turned).sum(dim=1) + h.mean(dim=-1, keepdim=True))


def between(noise: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), noise, nn.Linear(6, 2))


MEMBERS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "residual": (Residual, (4,), "batched"),
    "weights": (Edges, (4,), "unrolled"),
    "gaussian noise": (lambda: between(dk.nn.GaussianDropout(0.3)), (4,), "batched"),
    "alpha": (lambda: between(dk.nn.AlphaDropout(0.3)), (4,), "batched"),
    "path": (lambda: between(dk.nn.DropPath(0.5)), (4,), "batched"),
    "locked": (lambda: between(dk.nn.LockedDropout(0.5)), (3, 4), "batched"),
    "a rate for each unit": (lambda: between(dk.nn.Dropout(torch.linspace(0.1, 0.9, 6))), (4,), "batched"),
    "rate 0 and 1": (lambda: nn.Sequential(nn.Dropout(0.0), between(nn.Dropout(1.0))), (4,), "batched"),
    "attention of dropkit": (
        lambda: nn.Sequential(dk.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 2)),
        (3, 4),
        "batched",
    ),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_frozen_members_are_the_members(name: str) -> None:
    build, shape, form = MEMBERS[name]
    allow = ("no spread",) if name == "rate 0 and 1" else ()
    committee = Committee(build().double(), members=5, seed=3, tile=8, allow=allow)
    x = torch.randn(3, *shape, dtype=torch.float64)
    program = exported_program(committee, x, samples=True)
    said, wanted = program.module()(x), committee.samples(x)
    torch.testing.assert_close(said["samples"], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(said["mean"], wanted.mean(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(said["epistemic"], wanted.var(dim=0), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(frozen(committee, x, form=form)(x), wanted, rtol=1e-12, atol=1e-12)
    assert "dropkit" not in str(program.graph)  # torch's operators alone


def frozen(committee: Committee, x: Tensor, form: Any = "batched", at_once: int = 5) -> FrozenMembers:
    with every_layer_runs(committee.network), torch.no_grad():
        graph = record(committee.network, x)
        found = site_masks(graph, committee.seed, committee.members)
        return FrozenMembers(graph, found, committee.members, at_once, form)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 9])
def test_how_many_members_run_together_changes_nothing_but_rounding(at_once: int) -> None:
    committee = Committee(perceptron().double(), members=5, seed=0)
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        one_by_one = frozen(committee, x, "unrolled")(x)
        torch.testing.assert_close(
            frozen(committee, x, "batched", at_once)(x), one_by_one, rtol=1e-12, atol=1e-13
        )


def test_thinned_members_are_the_members_on_fewer_weights() -> None:
    network = nn.Sequential(
        nn.Linear(5, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2)
    )
    committee = Committee(network.double(), members=5, seed=3, likelihood="gaussian")
    x = torch.randn(4, 5, dtype=torch.float64)
    thinned = exported_program(committee, x, samples=True, thinned=True)
    dense = exported_program(committee, x, samples=True)
    for name, value in thinned.module()(x).items():
        torch.testing.assert_close(value, dense.module()(x)[name], rtol=1e-9, atol=1e-12)
    assert "dropkit" not in str(thinned.graph)
    cut = [tuple(t.shape) for t in thinned.constants.values() if isinstance(t, Tensor)]
    cut += [tuple(t.shape) for t in thinned.state_dict.values()]
    assert any(shape[0] == 30 and 10 < shape[1] < 30 for shape in cut if len(shape) == 2)
    assert (30, 40) not in cut


def test_members_of_weight_masks_cannot_stand_among_the_rows() -> None:
    committee = Committee(Edges(), members=3)
    with pytest.raises(NotBatchableError):
        frozen(committee, torch.randn(4, 4), "batched")


def test_masks_are_kept_small_and_are_those_of_the_members() -> None:
    committee = Committee(Picture(), members=3, seed=9)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        graph = record(committee.network, x)
    found = list(site_masks(graph, 9, 3).values())
    assert all(isinstance(mask, SiteMask) for mask in found)
    for mask, shape in zip(found, [(3, 1, 6, 1, 1), (3, 1, 6, 1, 1), (3, 1, 6)], strict=True):
        assert isinstance(mask, SiteMask)
        assert mask.keep is not None
        assert (mask.keep.dtype, mask.keep.shape, mask.factor.shape) == (torch.bool, shape, ())
    first = found[0]
    assert isinstance(first, SiteMask)
    for member in range(3):
        with masks(seed=9, member=member):
            noise = dk.functional.dropout(
                torch.ones(1, 6, 1, 1), 0.3, shared=(2, 3), site="maps", owner=committee
            )
        assert first.keep is not None
        assert torch.equal(first.keep[member] * first.factor, noise)


def test_what_is_dropped_is_0_even_where_it_was_no_number() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.last = dk.nn.Dropout(0.5), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.drop(torch.log(x)))  # log(0) is -inf

    committee = Committee(Broken(), members=8, seed=2)
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 3.0]])
    with torch.no_grad():
        said = frozen(committee, x, at_once=8)(x)
        wanted = torch.stack([committee.member(k)(x) for k in range(8)])
    assert bool(wanted[:, 0].isfinite().any())
    assert not bool(wanted[:, 0].isfinite().all())
    torch.testing.assert_close(said, wanted)


def test_one_row_is_enough_and_arrays_will_do() -> None:
    committee = Committee(perceptron(), members=4)
    assert example_rows(committee, np.zeros((1, 5))).shape == (2, 5)
    program = exported_program(committee, np.zeros((1, 5)))
    x = torch.randn(9, 5)
    torch.testing.assert_close(program.module()(x)["std"], committee.predict(x).std, rtol=1e-5, atol=1e-6)


def test_class_figures_are_those_of_the_prediction_even_where_a_probability_is_0() -> None:
    class Given(nn.Module):
        members = 2

        def forward(self, x: Tensor) -> Tensor:
            return x

    logits = torch.tensor([[[200.0, 0.0, -50.0]], [[1.0, 0.0, 0.0]]])
    told = FrozenCommittee(Given(), "categorical", samples=False)(logits)  # type: ignore[arg-type]
    prediction = ClassificationPrediction(logits.softmax(dim=-1))
    for name, value in told.items():
        torch.testing.assert_close(value, getattr(prediction, name), rtol=1e-6, atol=1e-7)


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.all = perceptron(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.all(x) if float(x.sum()) > 0 else -self.all(x)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.all = perceptron(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.all(x)
        return y, y + 1


@pytest.mark.parametrize(
    ("committee", "error", "message"),
    [
        (lambda: Committee(perceptron(), members=2, per_row=True), ExportError, "per_row=True"),
        (lambda: Committee(Undecided(), members=2), ExportError, "cannot be written as a graph"),
        (lambda: Committee(nn.Linear(5, 1), members=2, allow=("no spread",)), NoMaskError, "no mask acts"),
        (
            lambda: Committee(perceptron(3), members=2, likelihood="gaussian"),
            ShapeError,
            "likelihood='gaussian'",
        ),
        (lambda: Committee(perceptron(1), members=2, likelihood="categorical"), ShapeError, "C >= 2"),
        (lambda: Committee(TwoOutputs(), members=2), ExportError, "Wrap the model"),
    ],
    ids=["per row", "control flow", "no mask", "gaussian", "categorical", "two outputs"],
)
def test_what_cannot_be_exported_is_said(committee: Any, error: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export(committee(), tmp_path / "m.onnx", torch.ones(3, 5))
    assert list(tmp_path.iterdir()) == []


def test_masks_that_cannot_be_cut_out_are_named() -> None:
    committee = Committee(Steps(), members=2)
    with pytest.raises(ExportError, match=r"thinned=True was given.*'cells.*Export with thinned=False"):
        exported_program(committee, torch.randn(3, 4, 3), thinned=True)


def test_options_and_rows_are_checked(tmp_path: Path) -> None:
    committee = Committee(perceptron(), members=2)
    with pytest.raises(ShapeError, match="at least one row"):
        export(committee, tmp_path / "m.onnx", torch.ones(0, 5))
    with pytest.raises(OptionError, match="members_at_once=0"):
        export(committee, tmp_path / "m.onnx", torch.ones(3, 5), members_at_once=0)
    with pytest.raises(OptionError, match="opset=7"):
        export(committee, tmp_path / "m.onnx", torch.ones(3, 5), opset=7)
    with pytest.raises(OutputError, match="not a folder"):
        export(committee, tmp_path / "nowhere" / "m.onnx", torch.ones(3, 5))
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export(committee, tmp_path / "m.onnx", torch.ones(3, 5))
    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_a_file_that_differs_from_the_committee_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committee = Committee(perceptron(), members=3)
    (tmp_path / "m.onnx").write_text("mine")
    true = committee.predict

    def other(rows: Tensor) -> Any:
        return true(rows + 1)

    monkeypatch.setattr(committee, "predict", other)
    with pytest.raises(ExportError, match="other numbers than the committee"):
        export(committee, tmp_path / "m.onnx", torch.randn(3, 5), force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name)
    )
    with pytest.raises(MissingPackageError, match=r"needs onnxscript.*pip install 'dropkit\[onnx\]'"):
        export(Committee(perceptron(), members=2), tmp_path / "m.onnx", torch.ones(3, 5))


def test_a_committee_too_large_for_the_format_is_refused() -> None:
    with pytest.raises(ExportError, match="less than 2 GiB"):
        onnx_files._check_size(3 << 30)
