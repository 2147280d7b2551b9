"""Docstrings are plain text: one line, an equation, shapes and units. This makes them fit for the page.

`(M, B, *out)` and `|a - b|` are mathematics, not markup, so stars and bars are escaped; a paragraph that is an equation
is set as it stands.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Examples?|Source|Note|Warning)s?:")
QUOTED = re.compile(r"(`[^`]+`)")


def escape(line: str) -> str:
    """Take away the second meaning of stars, bars and trailing underscores outside of quoted code."""
    parts = QUOTED.split(line)
    parts[::2] = [re.sub(r"([*|\\])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", part)) for part in parts[::2]]
    return "".join(parts)


def is_equation(paragraph: list[str]) -> bool:
    """An equation has a relation sign and is no sentence."""
    first, last = paragraph[0], paragraph[-1].rstrip()
    has_relation = re.search(r"\s(=|~|<|>|<=|>=|->)\s", first) is not None
    return has_relation and not last.endswith((".", ":", ";")) and "`" not in first


def paragraphs(lines: list[str]) -> list[list[str]]:
    """Runs of lines between empty ones."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def as_it_stands(lines: list[str]) -> list[str]:
    """The lines as a literal block."""
    return ["::", "", *(f"    {line}" for line in lines), ""]


def plain(lines: list[str]) -> list[str]:
    """A docstring with its equations set as they stand and everything else free of accidental markup."""
    start = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
    result: list[str] = []
    for run in paragraphs(lines[:start]):
        if run[0].startswith((">>>", "- ")):
            result += [*(run if run[0].startswith(">>>") else map(escape, run)), ""]
        elif is_equation(run):
            result += as_it_stands(run)
        else:
            for is_indented, group in groupby(run, key=lambda line: line.startswith(" ")):
                part = list(group)
                result += as_it_stands(part) if is_indented else [*map(escape, part), ""]
    in_example = False
    for line in lines[start:]:
        if SECTION.match(line):
            in_example = line.startswith("Example")
        result.append(line if in_example else escape(line))
    return result


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring of ours in place; inherited ones of other projects are theirs."""
    lines[:] = plain(lines)


def setup(app: Any) -> dict[str, bool]:
    """Register with sphinx, ahead of napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
