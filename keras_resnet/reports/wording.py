"""Numbers, times and names as people read them, in a page and in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup

from keras_resnet.system.files import printable

NOTHING = "\N{EN DASH}"  # in place of a number that is not known


def name(text: Any) -> Markup:
    """A name that people chose, for a page: escaped, and kept from turning what is around it."""
    return Markup("<bdi>{}</bdi>").format(plain(text))


def plain(text: Any) -> str:
    """Text whose control characters and marks that turn its direction are made visible."""
    return printable(text)


def as_percent(value: Any) -> str:
    """A share, with one digit; with two where one would round it to nothing or to all.

    Examples:
        >>> as_percent(0.5556), as_percent(0.9997), as_percent(1.0)
        ('55.6%', '99.97%', '100.0%')
    """
    if not is_number(value):
        return NOTHING
    # 99.97% must not read as 100.0%.
    digits = 2 if 0 < value < 0.0005 or 0.9995 <= value < 1 else 1
    return f"{value:.{digits}%}"


def as_decimal(value: Any, digits: int = 3) -> str:
    """A number with so many digits behind the point."""
    return f"{value:.{digits}f}" if is_number(value) else NOTHING


def is_number(value: Any) -> bool:
    """Whether a value, maybe out of a damaged file, is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    Examples:
        >>> counted(1, "class"), counted(1200, "picture")
        ('1 class', '1,200 pictures')
    """
    plural = {"class": "classes"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"


def as_duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"


def as_size(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def as_time(time: datetime | None) -> str:
    """A date and a time."""
    return f"{time.day} {time:%B %Y, %H:%M}" if time else ""


def as_setting(value: Any) -> Markup | str:
    """A setting as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return Markup(", ").join(as_setting(v) for v in value) if value else "none"
    return name(value)


def as_markdown(text: Any) -> str:
    """Text in which Markdown and HTML find nothing of theirs."""
    if isinstance(text, Markdown):
        return str(text)
    text = plain(text.striptags() if isinstance(text, Markup) else text)
    text = re.sub(r"([\\`*_{}\[\]<>#|~!$@])", r"\\\1", text.replace("&", "&amp;"))
    text = text.replace("\\<", "&lt;").replace("\\>", "&gt;")
    text = re.sub(r"(?i)://|www\.", lambda m: m[0].replace("/", "\\/").replace(".", "\\."), text)
    # At the start of a line these begin a list, a heading or a rule.
    return re.sub(r"^(\s*\d*)([-+=.)]+)(?=\s|$)", r"\1\\\2", text)


class Markdown(str):
    """Markdown that is meant to be Markdown."""


def listed(names: Sequence[str], limit: int = 5) -> Markup:
    """Names as a list in a sentence, the first few of many."""
    shown = [name(n) for n in names[:limit]]
    if len(names) > limit:
        return Markup(", ").join(shown) + f" and {len(names) - limit} more"
    return Markup(" and ").join(filter(None, [Markup(", ").join(shown[:-1]), *shown[-1:]]))


def bar(share: float, second: bool = False) -> Markup:
    """A bar under a number of a table, for the eye alone."""
    kind = "bar second" if second else "bar"
    return Markup(
        '<span class="{}" aria-hidden="true"><span style="width:{:.1f}%"></span></span>'
    ).format(kind, 100 * share if is_number(share) else 0)


def plain_lines(text: str) -> str:
    """`plain`, line by line."""
    return "\n".join(plain(line) for line in text.split("\n"))
