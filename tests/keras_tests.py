"""Keras' own tests with our classes and functions in place of its own.

    KERAS_BACKEND=torch python tests/keras_tests.py CHECKOUT [ROW ...]

CHECKOUT is a clone of keras-team/keras at the release to compare with (`git clone --depth 1
--branch v3.15.1 https://github.com/keras-team/keras`). Its Keras runs, not the installed one; pass
`-v` to see how a test fails. Prints, for each name that both have, how many of its tests pass, and
why others do not. Ends with 1 where one fails for no reason that is written down here; without a
checkout it says so and ends with 0. `make test` runs it where KERAS_CHECKOUT names a checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

UNBIASED = "the running variance is the unbiased one, as torch's"
LAYERS = "layers/normalization/batch_normalization_test.py", "layers:BatchNormalization"
DATA = (
    "utils/image_dataset_utils_test.py",
    "utils.image_dataset_utils:image_dataset_from_directory",
)
ERRORS = {
    "errors": "class_names may name a list of labels; a split without a seed is that of seed 0"
}


def cosine_decay(
    initial_learning_rate, decay_steps, alpha=0.0, name=None, warmup_target=None, warmup_steps=0
):
    """Keras' `CosineDecay` in the words of ours, which has epochs and no name."""
    top = initial_learning_rate if warmup_target is None else warmup_target
    return importlib.import_module("keras_resnet").schedules.CosineSchedule(
        top,
        epochs=warmup_steps + decay_steps,
        lr_min=alpha * top,
        warmup_epochs=warmup_steps,
        warmup_decay=initial_learning_rate / top,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A name that both have, and the tests that are about it."""

    name: str
    file: str  # below keras/src
    place: str  # module and attribute that the tests take it from, below keras.src
    ours: str | Callable  # below keras_resnet, or a function that translates the arguments
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # other defaults of ours
    about: str = ""  # matches the names of those tests
    differs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # test -> reason

    @property
    def title(self) -> str:
        return self.name + "".join(f", {name}={value!r}" for name, value in self.options.items())


ROWS = (
    Row("Conv2D", "layers/convolutional/conv_test.py", "layers:Conv2D", "layers:Conv2D",
        about="conv2d|bad_init|lora|invalid_conf|constraints|zero_dims"),
    Row("MaxPooling2D", "layers/pooling/max_pooling_test.py", "layers:MaxPooling2D",
        "layers:MaxPooling2D", about="max_pooling2d"),
    Row("BatchNormalization", *LAYERS, "layers:BatchNormalization",
        differs={"test_correctness|ignore_masked": UNBIASED}),
    Row("BatchNormalization", *LAYERS, "layers:BatchNormalization", {"unbiased_variance": False}),
    Row("SGD", "optimizers/sgd_test.py", "optimizers.sgd:SGD", "training.optimizers:SGD",
        differs={"golden": "nesterov without momentum does nothing, and is refused, as by torch"}),
    Row("CosineDecay", "optimizers/schedules/learning_rate_schedule_test.py",
        "optimizers.schedules:CosineDecay", cosine_decay, about="CosineDecayTest"),
    Row("image_dataset_from_directory", *DATA, "data.directory:image_dataset_from_directory",
        differs={**ERRORS, "static_shape": "an ImageDataset has no graph; see format='tf'"}),
    Row("image_dataset_from_directory", *DATA, "data.directory:image_dataset_from_directory",
        {"format": "tf"}, differs=ERRORS),
    # All but the test of Keras' own weights, which downloads them.
    Row("ResNet50", "applications/applications_test.py", "applications.resnet:ResNet50",
        "models.zoo:ResNet50", about="(?<!base_)ResNet50_channels"),
)  # fmt: skip


def find(package: str, path: str) -> tuple[Any, str]:
    """The module and the name of `module:name` below a package."""
    module, name = path.split(":")
    return importlib.import_module(f"{package}.{module}"), name


def with_defaults(thing: Any, options: Mapping[str, Any]) -> Any:
    """A class or function with other defaults."""
    if not options:
        return thing
    if not isinstance(thing, type):
        return functools.partial(thing, **options)

    def __init__(self, *args, **given):
        thing.__init__(self, *args, **{**options, **given})

    changed = type(thing.__name__, (thing,), {"__init__": __init__})
    return importlib.import_module("keras").saving.register_keras_serializable("tests")(changed)


class Replacement:
    """The plug-in of pytest that puts ours in place for one row, and keeps what came out."""

    def __init__(self, row: Row):
        self.row = row
        self.outcomes: dict[str, str] = {}  # test -> passed, failed or skipped

    def pytest_configure(self):
        ours = self.row.ours
        if isinstance(ours, str):
            ours = getattr(*find("keras_resnet", ours))
        self._where = find("keras.src", self.row.place)
        self._before = getattr(*self._where)
        setattr(*self._where, with_defaults(ours, self.row.options))

    def pytest_unconfigure(self):
        setattr(*self._where, self._before)

    def pytest_collection_modifyitems(self, items):
        items[:] = [
            item
            for item in items
            if re.search(self.row.about, item.nodeid) and item.name != "test_session"
        ]
        if importlib.util.find_spec("grain") is None:
            for item in items:
                if item.name.endswith("_grain"):
                    item.add_marker(pytest.mark.skip(reason="grain is not installed"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[item.name] = report.outcome
        return report

    def reason(self, test: str) -> str | None:
        """Why a test may fail."""
        return next((why for part, why in self.row.differs.items() if re.search(part, test)), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", help="a clone of keras-team/keras")
    parser.add_argument("rows", nargs="*", help="names out of the table; all by default")
    parser.add_argument("-v", action="store_true", help="show how tests fail")
    arguments = parser.parse_args()
    if arguments.checkout is None or not pathlib.Path(arguments.checkout, "keras/src").is_dir():
        print(f"Skipped: there is no checkout of Keras. Received: {arguments.checkout}.")
        return 0
    root = pathlib.Path(arguments.checkout).resolve()
    sys.path[:0] = [str(root), str(pathlib.Path(__file__).resolve().parents[1])]
    os.chdir(root)  # whose conftest.py belongs to the tests
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(root)]
    options += ["--tb=short"] if arguments.v else ["--tb=no", "--no-summary"]
    lines, wrong = [], 0
    for row in ROWS:
        if arguments.rows and row.name not in arguments.rows:
            continue
        run = Replacement(row)
        pytest.main([*options, str(root / "keras/src" / row.file)], plugins=[run])
        outcomes = list(run.outcomes.values())
        failed = [test for test, outcome in run.outcomes.items() if outcome == "failed"]
        skipped = outcomes.count("skipped")
        count = len(outcomes) - skipped
        said = f", {skipped} skipped" if skipped else ""
        lines.append(f"{row.title}: {outcomes.count('passed')} of {count}{said}")
        for reason in dict.fromkeys(map(run.reason, failed)):
            tests = [test for test in failed if run.reason(test) == reason]
            names = f" ({', '.join(tests)})" if reason is None or len(tests) < 4 else ""
            lines.append(f"    {len(tests)} differ: {reason or 'FOR NO REASON'}{names}")
            wrong += reason is None
        wrong += count == 0
    keras = importlib.import_module("keras")
    print(f"\nKeras {keras.__version__} on {keras.backend.backend()}", *lines, sep="\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
