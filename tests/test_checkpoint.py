from __future__ import annotations

import errno
import itertools
import json
import math
import os
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dropkit as dk
from dropkit import directory
from dropkit.errors import CheckpointError, DropkitWarning, OutputError
from dropkit.training import Checkpoints
from dropkit.training.serialization import from_files, to_files

STEPS, ROWS, TIME, WIDTH = 50, 12, 5, 8


class Parts:
    """Plain data that is saved as it is."""

    def __init__(self, data):
        self.data = data

    def state_dict(self):
        return self.data

    def load_state_dict(self, data):
        self.data = data


def same(a, b):
    """Equal to the bit and in type; NaNs of one kind are equal."""
    if isinstance(a, torch.Tensor):
        raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [*map(same, a, b)] == [True] * len(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return math.isnan(b) if a != a else a == b and str(a) == str(b)  # -0.0 is not 0.0


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), st.floats(), st.text(max_size=5)
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
tensors = st.builds(
    lambda dtype, shape: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
)
arrays = st.builds(
    lambda dtype, shape: np.ones(shape, dtype),
    st.sampled_from(["f4", "f8", "i8", "u1", "?"]),
    st.lists(st.integers(0, 3), max_size=2),
)
keys = st.one_of(st.text(max_size=4), st.integers(), st.tuples(st.integers(), st.text(max_size=2)))
trees = st.recursive(
    st.one_of(scalars, tensors, arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=8,
)


@given(tree=trees)
def test_a_state_comes_back_to_the_bit_and_in_its_types(tree):
    assert same(from_files(to_files(tree)), tree)


def test_a_state_dict_keeps_the_versions_of_its_layers_and_a_counter_is_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    back = from_files(to_files({"model": model.state_dict(), "milestones": Counter({3: 1, 8: 2})}))
    assert type(back["model"]) is OrderedDict
    assert back["model"]._metadata == model.state_dict()._metadata
    assert back["model"]._metadata["1"]["version"] == 2
    assert type(back["milestones"]) is Counter


def test_tied_weights_and_views_of_one_another_are_stored_as_they_are_seen():
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"a": weight, "b": weight, "c": weight.T, "d": weight[1:], "e": weight[:1].expand(3, 4)}
    back = from_files(to_files(state))
    assert same(back, state)
    assert back["a"] is back["b"]  # stored once


def test_many_arrays_stay_apart():
    """Each is copied for a moment, and the next copy may get the same place in memory."""
    state = [np.full(5000, i) for i in range(20)] + [np.arange(4)[::-1], np.array(3.5)]
    assert same(from_files(to_files(state)), state)


def test_what_is_read_is_aligned_as_torch_aligns_its_own():
    """Matrix products may end in another last bit on other alignments, and resume is bit for bit."""
    state = [torch.zeros(n) for n in (1, 3, 5, 7)]
    assert {t.data_ptr() % 64 for t in from_files(to_files(state))} == {0}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": [0, print]}, r"state\['a'\]\[1\] is a builtin_function_or_method"),
        ({"schedule": {"f": torch.float32}}, r"state\['schedule'\]\['f'\] is a dtype"),
        ({"t": torch.eye(2).to_sparse()}, r"of layout sparse"),
        ({"t": torch.zeros(2, dtype=torch.complex64)}, r"is a complex64 tensor"),
        ({"t": torch.zeros(2, device="meta")}, r"is a meta tensor"),
        ({"t": np.array(["a"])}, r"is an array of <U1"),
    ],
)
def test_what_cannot_be_stored_is_named_by_where_it_stands(value, says):
    with pytest.raises(CheckpointError, match=says):
        to_files(value)


@pytest.fixture
def quick_disk(monkeypatch):
    """Waiting for the disk is most of the time of many small checkpoints, and not what is looked at."""
    monkeypatch.setattr(directory.os, "fsync", lambda handle: None)


class Encoder(nn.Module):
    """A small transformer with masks on activations, attention and paths."""

    def __init__(self):
        super().__init__()
        self.attention = dk.nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)
        self.path, self.dropout = dk.nn.DropPath(0.2), dk.nn.Dropout(0.3)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = x + self.path(self.attention(x, x, x, need_weights=False)[0])
        return self.out(self.dropout(torch.relu(self.norm(h)))).mean(dim=(1, 2))


class Convolution(nn.Sequential):
    """Whole maps dropped before a batch norm, whose statistics are state too."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(TIME, 4, 3), dk.nn.ChannelDropout1d(0.3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * (WIDTH - 2), 1), nn.Flatten(0),
        )  # fmt: skip


def adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=STEPS + 1)


def sgd(model):
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    falling = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 20], 0.5)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, falling], [10])


def fused(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)


class Loop:
    """Anybody's torch loop. Its data are a function of the step, its masks of step and row ids."""

    def __init__(self, model, optimizing):
        torch.manual_seed(1)
        self.model = model()
        self.optimizer, self.schedule = optimizing(self.model)
        self.own = torch.Generator().manual_seed(5)  # and some chance of its own

    @property
    def parts(self):
        return {
            "model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "own": self.own,
            "torch": torch.default_generator,
        }  # fmt: skip

    def step(self, step):
        data = torch.Generator().manual_seed(100 + step)
        x, ids = torch.randn(ROWS, TIME, WIDTH, generator=data), torch.randint(10**6, (ROWS,), generator=data)
        x += 0.1 * torch.randn(x.shape, generator=self.own) + 0.01 * torch.rand(())
        with dk.masks(seed=7, step=step, samples=ids):
            loss = (self.model(x) - x.sum(dim=(1, 2)) / 10).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(float(loss.detach()))
        else:
            self.schedule.step()

    def state(self):
        return to_files(
            {name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
             for name, part in self.parts.items()}
        )  # fmt: skip


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize(("model", "optimizing"), [(Encoder, adamw), (Convolution, sgd), (Encoder, fused)])
def test_a_loop_stopped_at_any_of_50_steps_goes_on_to_the_same_bits(model, optimizing, tmp_path):
    torch.manual_seed(0)
    whole = Loop(model, optimizing)
    states, checkpoints = [whole.state()], [Checkpoints(tmp_path / str(i)) for i in range(STEPS)]
    for i in range(STEPS):
        checkpoints[i].save(i, **whole.parts)
        whole.step(i)
        states.append(whole.state())
    assert (
        len({json.dumps(s["state.json"].decode()) + str(hash(s["tensors.safetensors"])) for s in states})
        > STEPS
    )
    for i in range(STEPS):
        loop = Loop(model, optimizing)
        torch.rand(3)  # another state of the generator than the run's
        assert Checkpoints(tmp_path / str(i)).restore(**loop.parts) == i
        assert loop.state() == states[i]
        # Equal states go equal ways; some stops are followed to the end all the same.
        for step in range(i, STEPS if i % 16 == 3 else i + 1):
            loop.step(step)
        assert loop.state() == states[step + 1]


def filled(folder, numbers=(1, 2, 3), **options):
    checkpoints = Checkpoints(folder, **options)
    checkpoints.clear()
    for i in numbers:
        checkpoints.save(i, data=Parts({"w": torch.full((4,), float(i)), "i": i}))
    return checkpoints


def taken(folder, **options):
    parts = Parts(None)
    step = Checkpoints(folder, **options).restore(data=parts)
    return step, parts.data


def test_the_last_two_stay_and_the_last_one_is_taken(tmp_path):
    filled(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["00000002", "00000003"]
    step, data = taken(tmp_path / "run")
    assert (step, data["i"]) == (3, 3)


def test_without_a_checkpoint_the_parts_stay_and_the_step_is_0(tmp_path):
    parts = Parts("as it was")
    assert Checkpoints(tmp_path / "none").restore(data=parts) == 0
    assert parts.data == "as it was"
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    filled(folder)
    return folder


@settings(max_examples=150)
@given(data=st.data())
def test_any_byte_changed_gives_the_one_before_or_an_error_never_other_weights(two, data):
    files = sorted((two / "00000003").iterdir())
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from([bytearray(whole[:at]), bytearray(whole) + b"\0", None])
        | st.integers(1, 255).map(lambda x: bytearray(whole[:at] + bytes([whole[at] ^ x]) + whole[at + 1 :]))
    )
    try:
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step, content = taken(two)
    finally:
        file.write_bytes(whole)
    if said:
        assert len(said) == 1
        assert said[0].category is DropkitWarning
        assert "00000003" in str(said[0].message)
        assert "goes on from" in str(said[0].message)
    else:  # such as one blank of the manifest for another
        assert file.name == "manifest.json"
    expected = 2 if said else 3
    assert (step, content["i"]) == (expected, expected)
    assert torch.equal(content["w"], torch.full((4,), float(expected)))


def test_after_a_damaged_one_the_next_is_kept_beside_the_last_good_one(tmp_path):
    filled(tmp_path / "run")
    (tmp_path / "run" / "00000003" / "state.json").write_bytes(b"{}")
    checkpoints, parts = Checkpoints(tmp_path / "run"), Parts(None)
    with pytest.warns(DropkitWarning, match=r"state.json is truncated: 2 of .*goes on from .*00000002"):
        assert checkpoints.restore(data=parts) == 2
    checkpoints.save(3, data=parts)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["00000002", "00000004"]


def test_when_all_are_damaged_it_is_an_error_that_says_what_to_do(tmp_path):
    filled(tmp_path / "run")
    for file in (tmp_path / "run").glob("*/tensors.safetensors"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match=r"No checkpoint is in order: .* missing from the checkpoint\. Delete .*run"
    ):
        taken(tmp_path / "run")


OTHERS = {
    "option": ({"rate": 0.3}, r"of a run with rate=0.2, and rate=0.3 was given"),
    "option less": ({"rate": None}, r"with rate=0.2, and rate=null was given"),
    "data": ({"rate": 0.2, "data": "ff"}, r"of a run on other data\. Give the data as they were"),
    "release": ({"rate": 0.2, "dropkit": "9.9"}, r'dropkit="0\.1\.0", and dropkit="9\.9" was given'),
}


@pytest.mark.parametrize(("of", "says"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(of, says, tmp_path):
    filled(tmp_path / "run", of={"rate": 0.2, "hidden": (8, 8)})
    with pytest.raises(CheckpointError, match=says):
        taken(tmp_path / "run", of={"hidden": (8, 8), **of})
    assert taken(tmp_path / "run", of={"hidden": [8, 8], "rate": 0.2})[0] == 3


def test_a_checkpoint_of_another_model_or_of_other_parts_is_refused(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    Checkpoints(tmp_path / "run").save(1, model=model, optimizer=optimizer)
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"holds another model than the one given: .*size mismatch for weight"
    ):
        checkpoints.restore(model=nn.Linear(4, 2), optimizer=optimizer)
    with pytest.raises(CheckpointError, match=r"holds another optimizer than the one given: "):
        checkpoints.restore(model=model, optimizer=torch.optim.Adam([model.weight]))
    with pytest.raises(CheckpointError, match=r"holds model, optimizer; model was asked for"):
        checkpoints.restore(model=model)
    with pytest.raises(CheckpointError, match=r"epoch is a int without state_dict"):
        Checkpoints(tmp_path / "new").save(2, epoch=3)


def test_the_checkpoints_of_an_earlier_run_are_not_overwritten_unseen(tmp_path):
    filled(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"of an earlier run\. Take them up with restore\(\), or clear\(\)"
    ):
        Checkpoints(tmp_path / "run").save(1, data=Parts(1))


def test_clear_removes_checkpoints_and_stages_and_nothing_of_anybody_else(tmp_path):
    run = tmp_path / "run"
    checkpoints = filled(run)
    filled(run / "search")
    assert checkpoints.there()
    (run / "mine.txt").write_text("mine")
    (run / "00000003" / "note.txt").write_text("mine")
    (run / "photos" / "00000001").mkdir(parents=True)
    (run / "photos" / "00000001" / "sea.jpg").write_text("blue")
    checkpoints.clear()
    assert not checkpoints.there()
    left = {str(p.relative_to(run)) for p in run.rglob("*")}
    mine = {"mine.txt", "00000003", "00000003/note.txt"}
    assert left == mine | {"photos", "photos/00000001", "photos/00000001/sea.jpg"}


@pytest.mark.parametrize("at", range(8))
def test_a_full_disk_leaves_the_checkpoints_before_and_no_half_one(at, tmp_path, monkeypatch):
    """Whichever write, sync or move is the one that the disk refuses."""
    checkpoints = filled(tmp_path / "run")
    calls = itertools.count()

    def refusing(real):
        def call(*args, **options):
            if next(calls) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(directory.os, "fsync", refusing(os.fsync))
        patched.setattr(Path, "open", refusing(Path.open))
        patched.setattr(Path, "rename", refusing(Path.rename))
        with pytest.raises(OutputError, match="the disk is full"):
            checkpoints.save(4, data=Parts({"w": torch.zeros(4), "i": 4}))
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")] == []
    step, content = taken(tmp_path / "run")
    assert (step, content["i"]) == (3, 3)
    checkpoints.save(4, data=Parts({"w": torch.zeros(4), "i": 4}))
    assert taken(tmp_path / "run")[0] == 4


def test_what_a_killed_writer_left_is_tidied_and_never_read(tmp_path):
    checkpoints = filled(tmp_path / "run")
    half = tmp_path / "run" / ".00000004.k3j2.tmp"
    half.mkdir()
    (half / "state.json").write_bytes(b"{")
    assert taken(tmp_path / "run")[0] == 3
    checkpoints.save(4, data=Parts(0))
    assert not half.exists()


@pytest.mark.parametrize("at", range(6))
def test_killed_while_tidying_up_leaves_whole_checkpoints_alone(at, tmp_path, monkeypatch):
    """A checkpoint loses its name before its files."""
    run, calls = tmp_path / "run", itertools.count()
    checkpoints = filled(run)

    def deadly(real):
        def call(*args, **options):
            if next(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **options)

        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "unlink", "rmdir"):
            patched.setattr(Path, name, deadly(getattr(Path, name)))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.clear()
    after = Checkpoints(run)
    if after.there():
        assert after.restore(data=Parts(None)) in (2, 3)  # and no warning
    after.clear()
    assert not run.exists()


def test_due_counts_steps():
    assert [s for s in range(1, 10) if Checkpoints("run", every=4).due(s)] == [4, 8]
    assert not Checkpoints("run").due(1)
    with pytest.raises(CheckpointError, match="every=0"):
        Checkpoints("run", every=0)
    with pytest.raises(CheckpointError, match="small letters"):
        Checkpoints("run").stage("../elsewhere")
