"""What a person looks at after a run: `report.html`, one file that needs no network, and a card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_eval_context
from jinja2.nodes import EvalContext

from keras_resnet.data.items import Source
from keras_resnet.data.opening import opened
from keras_resnet.reports.comparison_page import comparison
from keras_resnet.reports.run_files import read_run
from keras_resnet.reports.run_page import run_context
from keras_resnet.reports.wording import FILTERS, Markdown, as_markdown, as_time
from keras_resnet.system.device import package_version
from keras_resnet.system.errors import InputError
from keras_resnet.system.files import write_text

_CARD_OWN = re.compile(r"<!-- yours -->\n(.*?)<!-- end of yours -->", re.DOTALL)


def report(
    run_or_runs: str | os.PathLike | Iterable[str | os.PathLike],
    output: str | os.PathLike | None = None,
    *,
    model: Any = None,
    images: Any = None,
) -> Path:
    """Writes what a person wants to see of a run, or of several side by side, as one HTML file.

    Of one run: headline figures, curves, confusion matrix, every class, the most confident
    mistakes and the least certain images with Grad-CAM over them, reliability, data, settings,
    the weights' origin, versions, and how to use the model; and `MODEL_CARD.md` beside it, in
    which the part between `<!-- yours -->` and `<!-- end of yours -->` is yours and is kept. Of
    several runs: their results, curves, differences, and whether those are more than chance.

    The file needs no network and runs no script. A run that is unfinished, lacks its evaluation
    or was made by an older version gets a report of what there is.

    Args:
        run_or_runs: A run folder, or several; or a folder of folds.
        output: The file to write; by default `report.html` in the run folder, and of several runs
            `comparison.html` beside the first.
        model: The run's model where it is loaded already; else `best.keras` is loaded.
        images: What the run was trained on, as `train` takes it, where that is no file: arrays, a
            `datasets.Dataset`. Without them such images are not shown.

    Returns:
        The file.

    Raises:
        NotFoundError: There is no such folder; a near name is suggested.
        InputError: A file, a folder that is no run's, or an output that is no `.html` file.
    """
    single = isinstance(run_or_runs, str | os.PathLike)
    folders = [run_or_runs] if single else list(run_or_runs)
    if single and (folds := Path(run_or_runs).expanduser() / "folds.json").is_file():
        folders = sorted(folds.parent.glob("fold-*"))
    if not folders:
        raise InputError("report needs a run folder, or several.")
    if output is not None:
        output = Path(output).expanduser()
        if output.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"A report is written as .html, not as {output.name!r}.")
        if output.is_dir() or not output.parent.is_dir():
            what = "is a folder" if output.is_dir() else "is in a folder that does not exist"
            raise InputError(f"The output {str(output)!r} {what}.")
    runs = [read_run(folder) for folder in folders]
    for run in runs if images is not None else ():
        run.images = source if isinstance(source := opened(images), Source) else None
    if len(runs) > 1:
        if len({run.folder.resolve() for run in runs}) < len(runs):
            raise InputError("The same run folder is named twice.")
        path = output or runs[0].folder.resolve().parent / "comparison.html"
        write_text(path, _render("compare.html", **comparison(runs, path)))
        return path
    path = output or runs[0].folder / "report.html"
    context = run_context(runs[0], model)
    write_text(path, _render("run.html", **context))
    _write_card(path.with_name("MODEL_CARD.md"), context)
    return path


@pass_eval_context
def _finalize(context: EvalContext, value: Any) -> Any:
    """What becomes of a value: HTML escapes by itself, in Markdown it is done here."""
    return value if context.autoescape else as_markdown(value)


def _render(template: str, **context: Any) -> str:
    environment = Environment(
        loader=PackageLoader("keras_resnet.reports", "templates"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(FILTERS)
    made = {"when": as_time(datetime.now()), "version": package_version()}
    return environment.get_template(template).render(made=made, **context)


# --- the model card ------------------------------------------------------------------------------

_OWN_TEXT = """## Intended use

*What is this model for, and who uses it? What must it not be used for?*

## Limits

*Which images was it not trained on? Who could be harmed by a wrong prediction, and what then?*
"""


def _write_card(path: Path, context: dict[str, Any]) -> None:
    """Writes the model card; what a person wrote into their part of it stays."""
    own = _OWN_TEXT
    try:
        match = _CARD_OWN.search(path.read_text(encoding="utf-8", errors="surrogateescape"))
        own = match[1] if match else own
    except OSError:
        pass
    write_text(path, _render("MODEL_CARD.md", own=Markdown(own), **context))
