"""The directive `command`: help and options of one dropkit command, read from the program itself."""

from __future__ import annotations

from typing import Any

import typer
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from dropkit.cli import app as command_line


def find_command(words: list[str]) -> Any:
    """The command that these words call; a KeyError where there is none."""
    command = typer.main.get_command(command_line)
    for word in words:
        command = command.commands[word]
    return command


def usage(words: list[str], command: Any) -> str:
    """The line that a person types."""
    arguments = [
        (p.metavar or p.name.upper()) if p.required else f"[{p.metavar or p.name.upper()}]"
        for p in command.params
        if p.param_type_name == "argument"
    ]
    return " ".join(["dropkit", *words, *arguments, "[OPTIONS]"])


def allowed(parameter: Any) -> str:
    """The range of a number, in words; nothing where there is none."""
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is None and high is None:
        return ""
    if low is None:
        return f" At most {high}."
    return f" At least {low}." if high is None else f" From {low} to {high}."


def meaning(parameter: Any) -> str:
    """Help of one parameter, with its range and its default where these say something."""
    text = (parameter.help or "").strip() + allowed(parameter)
    default = parameter.default
    is_silent = default is None or isinstance(default, bool) or callable(default) or "default" in text.lower()
    return text if is_silent else f"{text} Default: {getattr(default, 'value', default)}."


class CommandHelp(SphinxDirective):
    """```{command} fit```: usage, description, one definition for each argument and option."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Build the nodes."""
        words = self.arguments[0].split()
        command = find_command(words)
        line = usage(words, command)
        found: list[nodes.Node] = [nodes.literal_block(line, line, language="text")]
        for paragraph in (command.help or "").strip().split("\n\n"):
            text = " ".join(paragraph.split()).replace("\b", "")
            found.append(nodes.paragraph(text, text))
        entries = nodes.definition_list()
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            names = [*parameter.opts, *parameter.secondary_opts]
            if parameter.param_type_name == "argument":
                names = [parameter.metavar or parameter.name.upper()]
            shown = ", ".join(names)
            if parameter.param_type_name == "option" and not parameter.is_flag:
                shown += f" {parameter.metavar or parameter.name.upper()}"
            text = meaning(parameter)
            entries += nodes.definition_list_item(
                "",
                nodes.term("", "", nodes.literal(shown, shown)),
                nodes.definition("", nodes.paragraph(text, text)),
            )
        return [*found, entries]


def setup(app: Any) -> dict[str, bool]:
    """Register with sphinx."""
    app.add_directive("command", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
