"""The directive `claims`: what is declared of each claim, read from the program itself."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from dropkit.claims import CLAIMS, Claim


def entry(claim: Claim) -> nodes.definition_list_item:
    """One claim: its name and title, what the article says, what is predicted, and when the sentence is true."""
    term = nodes.term("", "", nodes.literal(claim.name, claim.name), nodes.Text(f" {claim.title}"))
    said = [claim.article, f"Predicted: {claim.prediction}"]
    if claim.condition:
        said.append(f"True when: {claim.condition}")
    body = nodes.definition("", *[nodes.paragraph(text, text) for text in said])
    decides = nodes.bullet_list()
    for rule in claim.rules:
        if rule.kind != "shown":
            text = f"{rule.says}: {rule.in_words()}"
            decides += nodes.list_item("", nodes.paragraph(text, text))
    if len(decides.children) <= 8:
        body += decides
    else:
        text = f"{len(decides.children)} figures decide; all must keep their rules."
        body += nodes.paragraph(text, text)
    return nodes.definition_list_item("", term, body)


class ClaimsList(SphinxDirective):
    """```{claims}```: one definition for each claim, in the order of the article."""

    def run(self) -> list[nodes.Node]:
        """Build the nodes."""
        return [nodes.definition_list("", *map(entry, CLAIMS))]


def setup(app: Any) -> dict[str, bool]:
    """Register with sphinx."""
    app.add_directive("claims", ClaimsList)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
