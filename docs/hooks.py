"""MkDocs' hook: the page of the command line is written from the parser itself."""

from __future__ import annotations

import argparse
import html

from keras_resnet.cli.main import build_parser


def on_page_markdown(markdown, page, **_):
    """Puts every command's own help behind the page `reference/cli.md`."""
    if page.file.src_uri != "reference/cli.md":
        return None
    commands = next(
        action for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )  # fmt: skip
    return "\n".join([markdown, *(_section(name, p) for name, p in commands.choices.items())])


def _section(name, parser):
    lines = [f"\n## keras-resnet {name}\n", parser.description or "", "\n```text"]
    lines += [parser.format_usage().removeprefix("usage: ").strip(), "```\n"]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if actions:
            lines += [f"\n| {_cell(group.title)} | |", "|---|---|"]
            lines += [f"| {_names(action)} | {_cell(_help(action))} |" for action in actions]
    return "\n".join(lines)


def _names(action):
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    )
    if not action.option_strings:
        return f"`{value or action.dest}`"
    takes = f" {value}" if action.nargs != 0 and value else ""
    return ", ".join(f"`{option}{takes}`" for option in action.option_strings)


def _help(action):
    text = (action.help or "") % {**vars(action), "prog": "keras-resnet"}
    if action.default not in (None, False, True, argparse.SUPPRESS, [], ()):
        text += f" (default: {action.default})"
    return text


def _cell(text):
    return html.escape(text, quote=False).replace("|", r"\|").replace("\n", " ")
