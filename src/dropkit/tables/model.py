"""A model of a table: the encoder of its columns, the network, the committee and its calibration; on disk and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dropkit.committee import Committee, ConformalInterval, Prediction, RegressionPrediction, Temperature
from dropkit.committee.calibrated import LEVEL, CalibratedCommittee
from dropkit.directory import read_directory
from dropkit.errors import DropkitError, ModelDirectoryError, TableError
from dropkit.masks.address import SEEDS
from dropkit.records import rebuild
from dropkit.tables.encoder import Encoder
from dropkit.tables.source import CHUNK_ROWS, TableSource
from dropkit.tables.target import Target
from dropkit.training.network import NetworkSpec, build_network

MODEL, WEIGHTS = "model.json", "weights.safetensors"

LEAST_MEMBERS, MOST_MEMBERS = 4, 4096  # of a tile of rows all members' answers are in memory at once


@dataclass(frozen=True, slots=True)
class TableModel:
    """A committee that has learned one column of a table from the others.

    Attributes:
        encoder: from rows of the table to numbers.
        target: what is predicted, and its classes.
        spec: shape and rates of the network.
        network: with its weights, in evaluation mode.
        asked: the committee of its thinned networks, calibrated.
    """

    encoder: Encoder
    target: Target
    spec: NetworkSpec
    network: nn.Module
    asked: CalibratedCommittee

    def to_files(self) -> dict[str, bytes | dict[str, Any]]:
        """The model as files of a directory: weights in safetensors, everything else in JSON."""
        committee, calibration = self.asked.committee, self.asked.calibration
        weights = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        return {
            WEIGHTS: save(weights),
            MODEL: {
                "encoder": self.encoder.to_json(),
                "target": asdict(self.target),
                "network": asdict(self.spec),
                "committee": {"members": committee.members, "seed": committee.seed},
                "calibration": None if calibration is None else calibration.to_json(),
            },
        }

    @classmethod
    def read(cls, path: str | Path) -> TableModel:
        """The model in a directory, every part checked; no code is run from it.

        Raises:
            ModelDirectoryError: not a model, or one that is damaged, altered, incomplete or newer than this release.
        """
        files = read_directory(path)
        data = files.json(MODEL)
        try:
            encoder = Encoder.from_json(data["encoder"])
            target = rebuild(Target, data["target"], "target")
            spec = rebuild(NetworkSpec, data["network"], "network")
            members = _whole(data["committee"]["members"], LEAST_MEMBERS, MOST_MEMBERS)
            seed = _whole(data["committee"]["seed"], 0, SEEDS - 1)
            calibration = _calibration(data["calibration"], target.task)
            _check_parts(encoder, target, spec)
            network = _network(spec, load(files.bytes(WEIGHTS)))
        except (
            LookupError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            RuntimeError,
            SafetensorError,
            DropkitError,
        ) as error:
            raise ModelDirectoryError(
                f"{path} does not hold a model this release can use ({' '.join(str(error).split())[:200]}). "
                "Copy the model anew or fit again."
            ) from None
        return cls.of(encoder, target, spec, network, members, seed, calibration)

    @classmethod
    def of(
        cls, encoder: Encoder, target: Target, spec: NetworkSpec, network: nn.Module, members: int, seed: int,
        calibration: ConformalInterval | Temperature | None,
    ) -> TableModel:  # fmt: skip
        """A model whose committee is made of these parts."""
        committee = Committee(network.eval(), members, seed, spec.likelihood, allow=("no spread",))
        return cls(encoder, target, spec, network, CalibratedCommittee(committee, calibration))

    def predict(self, frame: pd.DataFrame) -> Prediction:
        """Ask the committee about rows of a table.

        Raises:
            TableError: a column is missing or of another type.
        """
        return self.asked.predict(self.encoder.transform(frame).matrix)

    def stream(self, source: TableSource, seen: Seen, chunk_rows: int = CHUNK_ROWS) -> Iterator[pd.DataFrame]:
        """Predict a table of any length; neither chunks nor tiles change a bit of the output.

        Args:
            source: the table.
            seen: filled with what the rows held that the model had not met.
            chunk_rows: rows read at a time; with their predictions, all that is in memory.

        Yields:
            Frames of the source's columns and the columns of `answers`, in order.
        """
        waiting: list[pd.DataFrame] = []

        def encoded() -> Iterator[np.ndarray[Any, Any]]:
            for frame in source.chunks(chunk_rows):
                result = self.encoder.transform(frame)
                seen.rows += len(frame)
                seen.unseen.update(result.unseen)
                seen.gaps.update(result.gaps)
                waiting.append(frame)
                yield result.matrix

        for prediction in self.asked.predict_chunks(encoded()):
            answer = self.answers(prediction)
            rows = waiting.pop(0) if len(waiting) == 1 else pd.concat(waiting)
            waiting.clear()
            if len(rows) > len(answer):
                waiting.append(rows.iloc[len(answer) :])
                rows = rows.iloc[: len(answer)]
            yield pd.concat([rows.reset_index(drop=True), answer], axis=1)

    def answers(self, prediction: Prediction) -> pd.DataFrame:
        """A prediction as columns: `answer_columns` says which."""
        if isinstance(prediction, RegressionPrediction):
            lower, upper = self.asked.interval(prediction)
            spread = (prediction.std, prediction.epistemic.sqrt(), prediction.aleatoric.sqrt())
            values = [_numbers(part) for part in (prediction.mean, *spread, lower, upper)]
        else:
            labels = np.array(self.target.classes, dtype=object)[prediction.label.numpy()]
            doubt = (prediction.entropy, prediction.mutual_information)
            values = [labels, *map(_numbers, (*prediction.probabilities.unbind(dim=-1), *doubt))]
        return pd.DataFrame(dict(zip(self.answer_columns, values, strict=True)))

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Names of the columns that a prediction adds to a table."""
        return answer_columns(self.target)

    def check_source(self, source: TableSource) -> tuple[str, ...]:
        """Return the columns of a table that the model does not use, or say why it cannot be predicted.

        Raises:
            TableError: a needed column is missing, or one is named like a column of the answer.
        """
        taken = [name for name in self.answer_columns if name in source.columns]
        if taken:
            raise TableError(
                f"{source.name} has a column {taken[0]!r}, the name of a column that predicting adds. "
                "Rename it, or predict the table from before it was predicted."
            )
        return self.encoder.check_columns(source.columns, source.name)


def answer_columns(target: Target) -> tuple[str, ...]:
    """Names of the columns that a prediction of this target adds to a table."""
    percent = round(100 * LEVEL)
    if target.task == "regression":
        parts = ["mean", "std", "epistemic_std", "aleatoric_std", f"lower_{percent}", f"upper_{percent}"]
    else:
        parts = [
            "predicted", *(f"probability_{label}" for label in target.classes), "entropy", "mutual_information"
        ]  # fmt: skip
    return tuple(f"{target.name}_{part}" for part in parts)


class Seen:
    """What the rows of a predicted table held that the model had not met; counted while they stream by.

    Attributes:
        rows: how many there were.
        unseen: cells with a label that was not in the training table, by column.
        gaps: missing cells in a column that had none then.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.unseen: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()

    @property
    def notes(self) -> tuple[str, ...]:
        """In sentences."""
        notes = [
            f"{name!r}: cells with a category that the model has not seen, which counts as none it knows: {count}."
            for name, count in self.unseen.items()
        ]
        notes += [
            f"{name!r}: missing cells, which training had none of, count as the column's middle or no label: {count}."
            for name, count in self.gaps.items()
        ]
        return tuple(notes)


def _numbers(values: Tensor) -> np.ndarray[Any, Any]:
    return values.detach().double().numpy()


def _whole(value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{value!r} is not a whole number from {low} to {high}")
    return value


def _check_parts(encoder: Encoder, target: Target, spec: NetworkSpec) -> None:
    """What no part can show by itself: that they belong together."""
    regression = target.task == "regression"
    if spec.likelihood != ("gaussian" if regression else "categorical"):
        raise ValueError(f"the network's likelihood, {spec.likelihood}, is not one for {target.task}")
    if len(set(target.classes)) != len(target.classes) or (len(target.classes) < 2) is not regression:
        raise ValueError(f"a {target.task} has not the classes {', '.join(target.classes[:5])!r}")
    if spec.inputs != encoder.features or spec.outputs != (len(target.classes) or 2):
        raise ValueError("the network does not fit the encoder or the target")
    if spec.rate == 1 or spec.input_rate == 1:
        raise ValueError("a rate is 1")
    if target.name in {column.name for column in encoder.columns}:
        raise ValueError(f"the target {target.name!r} is also a column to learn from")


def _network(spec: NetworkSpec, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with these weights; nothing is allocated before they are known to fill it."""
    needed = sum((before + 1) * after for before, after in pairwise(spec.widths))
    given = sum(tensor.numel() for name, tensor in weights.items() if not name.startswith("head."))
    if given != needed:
        raise ValueError(f"{given} weights are there, and the network has {needed}")
    network = build_network(spec)
    for name, own in network.state_dict().items():
        if name in weights and weights[name].dtype != own.dtype:
            raise ValueError(f"{name} is of type {weights[name].dtype}, not {own.dtype}")
        if name in weights and not bool(weights[name].isfinite().all()):
            raise ValueError(f"{name} holds numbers that are not finite")
    network.load_state_dict(dict(weights))
    if spec.likelihood == "gaussian" and not float(weights["head.scale"]) > 0:
        raise ValueError("head.scale is not positive")
    return network


def _calibration(data: Any, task: str) -> ConformalInterval | Temperature | None:
    if data is None:
        return None
    return ConformalInterval.from_json(data) if task == "regression" else Temperature.from_json(data)
