"""Numbers, times and names as people read them: the filters of the templates."""

from __future__ import annotations

import html
import math
import os
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from keras_resnet.system.files import printable, shortened, shown_path

NOTHING = "\N{EN DASH}"  # in place of a number that is not known


def name(text: Any) -> Markup:
    """A name that people chose, for a page: escaped, and kept from turning what is around it."""
    return Markup("<bdi>{}</bdi>").format(plain(text))


def short(text: Any) -> Markup:
    """A name where there is little room, without its middle if it is long."""
    return Markup("<bdi>{}</bdi>").format(shortened(plain(text), 20))


def plain(text: Any) -> str:
    """Text that does no harm: no paths of this machine, and control characters made visible.

    Those are marks that turn its direction, too.
    """
    return printable(shown_path(text))


def as_percent(value: Any) -> str:
    """A fraction, with one digit; with two where one would round it to nothing or to all.

    Examples:
        >>> as_percent(0.5556), as_percent(0.9997), as_percent(1.0)
        ('55.6%', '99.97%', '100.0%')
    """
    if not is_number(value):
        return NOTHING
    # 99.97% must not read as 100.0%.
    digits = 2 if 0 < value < 0.0005 or 0.9995 <= value < 1 else 1
    return f"{value:.{digits}%}"


def as_number(value: Any, form: str, nothing: str = NOTHING) -> str:
    """A number in one of Python's formats."""
    return format(value, form) if is_number(value) else nothing


def is_number(value: Any) -> bool:
    """Whether a value, maybe out of a damaged file, is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    Examples:
        >>> counted(1, "class"), counted(1200, "image")
        ('1 class', '1,200 images')
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


def as_label(key: str) -> str:
    """The name of a setting as the head of its row: `Weight decay`."""
    return plain(key.replace("_", " ").capitalize())


def as_shell(words: Sequence[Any]) -> str:
    """Words as one types them in a terminal."""
    # A shell knows the home folder by a bare "~".
    bare = re.compile(r"~(/[\w@%+=:,./-]*)?")
    return " ".join(w if bare.fullmatch(w) else shlex.quote(w) for w in map(plain, words))


def fenced(text: str, language: str) -> Markdown:
    """Code out of a page as a block of Markdown, whose fence is longer than any in the code."""
    text = html.unescape(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


FILTERS = {
    "code": lambda text: Markup("<code>{}</code>").format(plain(text)),  # to be copied
    "counted": counted,
    "decimal": lambda value, digits=3: as_number(value, f".{digits}f"),
    "duration": as_duration,
    "fenced": fenced,
    "image": lambda path: os.path.join(*Path(path).parts[-2:]),  # from its class folder on
    "integer": lambda value: as_number(value, ","),
    "label": as_label,
    "listed": listed,
    "markdown": Markdown,
    "name": name,
    "percent": as_percent,
    "plain": plain,
    "python": lambda text: plain(repr(str(text))),
    "scientific": lambda value: as_number(value, ".2e"),
    "setting": as_setting,
    "shell": as_shell,
    "short": short,
    "size": lambda n: f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.0f} KiB",
    "time": as_time,
    "width": lambda part: as_number(part, ".2%", "0").rstrip("%"),  # in CSS, of a fraction
}
