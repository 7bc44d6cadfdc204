"""What Python's prompt and a notebook show of a result that is not printed."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from keras_resnet.system.files import printable, shown_path

_ROWS = 30  # of a table in a notebook


class Shown:
    """One line as `repr`, and a table in notebooks, which are shown to other people.

    A subclass gives by `_shown()` the line, the names of the columns, and the rows.
    """

    def _shown(self) -> tuple[str, Sequence[str], Sequence[Sequence[Any]]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {_plain(self._shown()[0])}>"

    def _repr_html_(self) -> str:
        line, header, rows = self._shown()
        rest = [f"and {len(rows) - _ROWS:,} more"] if len(rows) > _ROWS else []
        cells = [_row(header, "th"), *(_row(row, "td") for row in rows[:_ROWS])]
        table = f"<table>{''.join(cells)}</table>" if rows else ""
        return "".join([_paragraph(line), table, *map(_paragraph, rest)])


def _plain(text: Any) -> str:
    return printable(shown_path(text))


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(_plain(text))}</p>"


def _row(cells: Sequence[Any], tag: str) -> str:
    texts = (html.escape(_plain(cell)) for cell in cells)
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"
