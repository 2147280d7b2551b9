"""What a tried claim came to, as a record that is kept as JSON and read back without being trusted."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from dropkit.claims.claim import (
    Chart,
    Claim,
    Findings,
    Judged,
    Measured,
    Setting,
    Verdict,
    judge,
    judge_figure,
    weakest,
)
from dropkit.directory import dump_json, strict_json
from dropkit.errors import ModelDirectoryError, OptionError
from dropkit.records import finite, rebuild

CHART_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A claim as declared, what was found, and the verdict.

    Attributes:
        name, title, article, prediction, condition: as in `Claim`.
        setting: how it was run.
        verdict: that of the weakest figure.
        figures: each with its rule, verdict and reason, in the order of the declaration.
        charts, data, setup, remarks: as in `Findings`.
        versions: pairs of package and version that it was run with.
        digest: of declaration, program, setting, versions and data; a result with another digest is run again.
    """

    name: str
    title: str
    article: str
    prediction: str
    condition: str
    setting: Setting
    verdict: Verdict
    figures: tuple[Judged, ...]
    charts: tuple[Chart, ...]
    data: str
    setup: str
    remarks: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]
    digest: str

    @property
    def deciding(self) -> Judged:
        """The first of the figures that the verdict comes from."""
        return next(one for one in self.figures if one.verdict == self.verdict)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A claim without a verdict.

    Attributes:
        name, title: as in `Claim`.
        status: "failed": its experiment raised; "not run": a package is missing.
        line: why, in one line.
    """

    name: str
    title: str
    status: Literal["failed", "not run"]
    line: str


@dataclass(frozen=True, slots=True)
class Results:
    """What `dropkit claims` found.

    Attributes:
        setting: of all of them.
        outcomes: claims with a verdict, in the order of the article.
        unfinished: claims without.
    """

    setting: Setting
    outcomes: tuple[Outcome, ...]
    unfinished: tuple[Unfinished, ...] = ()

    def count(self, verdict: Verdict) -> int:
        """How many claims came to this verdict."""
        return sum(one.verdict == verdict for one in self.outcomes)

    def to_json(self) -> str:
        """The record as JSON; null for what is not finite."""
        return dump_json(plain(self)).decode()

    @staticmethod
    def from_json(text: str) -> Results:
        """The record from JSON that anybody may have written.

        Raises:
            ModelDirectoryError: it is no such record, or a verdict does not follow from its figures.
        """
        found: Results = rebuild(Results, _parsed(text.encode(), "claims.json"), "claims.json")
        whole = tuple(_checked(one, "claims.json") for one in found.outcomes)
        return dataclasses.replace(found, outcomes=whole)


def outcome_of(
    claim: Claim, findings: Findings, setting: Setting, versions: tuple[tuple[str, str], ...], digest: str
) -> Outcome:
    """Judge the findings and put them beside the declaration.

    Numbers become plain ones, as they would by being written and read, so that a result that is kept is the same.

    Raises:
        OptionError: findings that do not fit the declaration, or a chart that cannot be drawn.
    """
    verdict, judged = judge(claim, findings)
    for chart in findings.charts:
        _check_chart(claim, chart)
    names = [chart.name for chart in findings.charts]
    if not names or len(set(names)) < len(names):
        raise OptionError(f"Claim {claim.name} has charts {names}; at least one is needed, each with a name.")
    made = Outcome(
        claim.name, claim.title, claim.article, claim.prediction, claim.condition, setting, verdict, judged,
        tuple(findings.charts), findings.data, findings.setup, tuple(findings.remarks), versions, digest,
    )  # fmt: skip
    return _checked(rebuild(Outcome, plain(made), f"claim {claim.name}"), f"claim {claim.name}")


def write_outcome(outcome: Outcome) -> bytes:
    """The outcome as JSON; equal outcomes give equal bytes."""
    return dump_json(plain(outcome))


def read_outcome(content: bytes, where: str = "the result") -> Outcome:
    """The outcome from JSON that anybody may have written.

    Raises:
        ModelDirectoryError: it is no such record, or its verdict does not follow from its figures.
    """
    return _checked(rebuild(Outcome, _parsed(content, where), where), where)


def plain(value: Any) -> Any:
    """Records, arrays and tensors as dicts, lists and numbers; None for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return finite(value.tolist() if hasattr(value, "tolist") else value)  # numpy's and torch's numbers


def _parsed(content: bytes, where: str) -> Any:
    try:
        return strict_json(content)
    except (ValueError, json.JSONDecodeError) as error:
        raise ModelDirectoryError(f"{where} is not valid JSON ({error}). Run the claim again.") from None


def _checked(outcome: Outcome, where: str) -> Outcome:
    """The outcome with what JSON has no word for put back, after its verdict was found again."""
    figures = tuple(judge_figure(one.rule, _infinite_degrees(one.found)) for one in outcome.figures)
    same = [one.verdict for one in figures] == [one.verdict for one in outcome.figures]
    if not same or not any(one.verdict for one in figures) or weakest(figures) != outcome.verdict:
        raise ModelDirectoryError(
            f"{where}: the verdict on {outcome.name!r} does not follow from its figures; the file is damaged or "
            "altered. Run the claim again."
        )
    return dataclasses.replace(outcome, figures=figures)


def _infinite_degrees(found: Measured) -> Measured:
    return dataclasses.replace(found, degrees=math.inf) if math.isnan(found.degrees) else found


def _check_chart(claim: Claim, chart: Chart) -> None:
    where = f"Claim {claim.name}, chart {chart.name!r}"
    if not CHART_NAME.fullmatch(chart.name):
        raise OptionError(f"{where}: a name has letters, digits and dashes.")
    if not chart.series:
        raise OptionError(f"{where}: there is no series.")
    for series in chart.series:
        lengths = {len(series.x), len(series.y), *([len(series.error)] if len(series.error) else [])}
        if len(lengths) != 1:
            raise OptionError(f"{where}: x, y and error of {series.name!r} have lengths {sorted(lengths)}.")
        if chart.x_names and not all(-0.5 <= x <= len(chart.x_names) - 0.5 for x in series.x):
            raise OptionError(f"{where}: {series.name!r} has places without a name.")
