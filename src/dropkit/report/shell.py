"""What every page shares: the house's look, its switch for the dark, and the rule that nobody is contacted."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files

from dropkit.report.wording import printable


def set_page(template: str, kind: str, page: object, drawn: Mapping[str, str], style: str = "") -> str:
    """A page as one self-contained HTML file; equal arguments give equal text.

    It carries a policy of its own: no address may be contacted, and no script runs but the page's, by its hash. All
    text is escaped.

    Args:
        template: in Jinja's language; it extends "base.html" and fills its block `sections`.
        kind: of the page, beside the mark: "fit report".
        page: has title, kicker, headline, subline, cards, sections (each with a name and a title) and footer.
        drawn: {name: SVG} of the figures, made by `dropkit.report.drawing`.
        style: rules for what only this page has.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    here = files(__package__)
    base, common, script = (
        (here / name).read_text(encoding="utf-8") for name in ("base.html", "style.css", "script.js")
    )
    environment = Environment(
        loader=DictLoader({"base.html": base}), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=text_only,
    )  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(template).render(
        kind=kind,
        page=page,
        drawn={name: Markup(svg) for name, svg in drawn.items()},
        style=Markup(common + style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def text_only(value: object) -> object:
    """Values put into the page, without control characters; markup made here passes."""
    return printable(value) if type(value) is str else value
