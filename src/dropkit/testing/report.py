"""What a run of the checks found: a frozen record, as text, as Markdown, or as an exception."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dropkit.errors import BrokenContractError

Result = Literal["passed", "failed", "not applicable"]
MARKS: dict[Result, str] = {"passed": "yes", "failed": "**no**", "not applicable": "–"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One law, tried.

    Attributes:
        name: of the check.
        topic: what it is about.
        law: one sentence.
        result: "passed", "failed" or "not applicable".
        reason: what was seen, or why the law does not apply; "" where there is nothing to say.
    """

    name: str
    topic: str
    law: str
    result: Result
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What one dropout keeps.

    Attributes:
        subject: its name.
        contract: what it was said, or known, to promise.
        false_alarm: chance that the statistical checks of this report, all together, blame a dropout that is right.
        outcomes: one for each check, in the order of the list.
    """

    subject: str
    contract: str
    false_alarm: float
    outcomes: tuple[Outcome, ...]

    def __getitem__(self, name: str) -> Outcome:
        """The outcome of one check."""
        for outcome in self.outcomes:
            if outcome.name == name:
                return outcome
        raise KeyError(name)

    def named(self, result: Result) -> tuple[str, ...]:
        """Names of the checks that ended so."""
        return tuple(outcome.name for outcome in self.outcomes if outcome.result == result)

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the laws it keeps."""
        return self.named("passed")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the laws it breaks."""
        return self.named("failed")

    @property
    def not_applicable(self) -> tuple[str, ...]:
        """Names of the laws that say nothing about it."""
        return self.named("not applicable")

    def raise_on_failure(self) -> None:
        """Say all that is broken at once, or nothing.

        Raises:
            BrokenContractError: at least one check failed.
        """
        broken = [outcome for outcome in self.outcomes if outcome.result == "failed"]
        if broken:
            lines = [f"  {outcome.name}: {outcome.law} But: {outcome.reason}" for outcome in broken]
            raise BrokenContractError(
                f"{self.subject} breaks {len(broken)} of {len(self.outcomes)} laws:\n" + "\n".join(lines)
            )

    def text(self) -> str:
        """For people at a terminal: a summary, then a line for each check."""
        head = (
            f"{self.subject} ({self.contract}): {len(self.passed)} passed, {len(self.failed)} failed, "
            f"{len(self.not_applicable)} not applicable; false alarm of the whole at most {self.false_alarm:.1g}"
        )
        width = max((len(outcome.name) for outcome in self.outcomes), default=0)
        lines = [
            f"  {outcome.result:<14}  {outcome.name:<{width}}  {outcome.reason or outcome.law}"
            for outcome in self.outcomes
        ]
        return "\n".join([head, *lines])

    def to_markdown(self) -> str:
        """The same as a table."""
        lines = ["| check | law | kept | reason |", "|---|---|---|---|"]
        lines += [f"| `{o.name}` | {o.law} | {MARKS[o.result]} | {_cell(o.reason)} |" for o in self.outcomes]
        return "\n".join(lines)


def compare(reports: Sequence[Report]) -> str:
    """Several reports side by side, as a Markdown table: yes, **no**, or – where a law does not apply.

    Args:
        reports: of the same checks.
    """
    laws = {outcome.name: outcome.law for report in reports for outcome in report.outcomes}
    found = [{outcome.name: outcome.result for outcome in report.outcomes} for report in reports]
    lines = [
        "| check | law | " + " | ".join(f"`{report.subject}`" for report in reports) + " |",
        "|---|---|" + "---|" * len(reports),
    ]
    for name, law in laws.items():
        cells = " | ".join(MARKS[results.get(name, "not applicable")] for results in found)
        lines.append(f"| `{name}` | {law} | {cells} |")
    totals = " | ".join(
        f"{len(report.passed)} of {len(report.passed) + len(report.failed)}" for report in reports
    )
    lines.append(f"| | kept, of those that apply | {totals} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
