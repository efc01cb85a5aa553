"""What the site has beside Markdown and docstrings: the settings and the commands, as the code has them.

A page asks for them by a comment: `<!-- settings -->`, `<!-- commands -->`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import griffe
import typer.main
from mkdocs.exceptions import PluginError

from elizasql import Config
from elizasql.cli import _app


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put what is generated in the place of the comments that ask for it; give wide tables the width of the page."""
    if "|---|---|---|---|" in markdown:
        page.meta["hide"] = ["toc"]
    made = {"<!-- settings -->": settings, "<!-- commands -->": commands}
    for comment, make in made.items():
        if comment in markdown:
            markdown = markdown.replace(comment, "\n".join(make()))
    return markdown


def on_post_page(output: str, **_: Any) -> str:
    """Refuse a page that fetches something from elsewhere: the site is read without a network."""
    fetched = re.search(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?(?:https?:)?//[^">]*', output)
    if fetched:
        raise PluginError(f"the page fetches from elsewhere: {fetched[0]}")
    return output


class RaisesAs(griffe.Extension):
    """Keeps what a docstring raises "As `another`.", which the style has no form for: as a paragraph of its own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is None:
            return
        lines: list[str] = []
        for line in obj.docstring.value.splitlines():
            if line.startswith("    As `"):
                if lines[-1] == "Raises:":
                    lines.pop()
                lines += ["", f"Raises as{line.removeprefix('    As')}"]
            else:
                lines.append(line)
        obj.docstring.value = "\n".join(lines)


def settings() -> Iterator[str]:
    """Give the table of settings: name and variable, default, and what the docstring says."""
    said = dict(re.findall(r"^ {8}(\w+): (.*?) \[", Config.__doc__ or "", re.DOTALL | re.MULTILINE))
    yield "| setting and variable | default | |"
    yield "|---|---|---|"
    for field in dataclasses.fields(Config):
        default = "" if field.default is None else f"`{field.default}`"
        meaning = " ".join(said[field.name].split())
        yield f"| `{field.name}`<br>`{field.metadata['variable']}` | {default} | {meaning} |"


def commands() -> Iterator[str]:
    """Give each command with its usage and its options."""
    root: Any = typer.main.get_command(_app.app)
    yield f"{_app.EPILOG}\n"
    yield from _commands(root, "elizasql")


def _commands(group: Any, name: str) -> Iterator[str]:
    for word, command in group.commands.items():
        full = f"{name} {word}"
        if hasattr(command, "commands"):
            yield from _commands(command, full)
            continue
        context = command.make_context(full, [], resilient_parsing=True)
        yield f"## {full}\n"
        yield f"{' '.join(command.help.split())}\n"
        yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```\n"
        records = [each.get_help_record(context) for each in command.get_params(context) if each.name != "help"]
        rows = [f"| `{_cell(record[0])}` | {_cell(record[1])} |" for record in records if record is not None]
        if rows:
            yield "\n".join(["| argument or option | |\n|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
