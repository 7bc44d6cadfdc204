"""The command line: parse, one public call, print. Bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code: 0, 1 (disagreement), 2 (bad input), 130 (Ctrl-C)."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = build_parser()
    if argv is None:
        argv = sys.argv[1:]
    if not argv:
        parser.print_help()
        return 0
    # Before Keras is imported: importing a backend takes seconds, `--help` should not.
    arguments = parser.parse_args(argv)
    from keras_resnet.errors import KerasResNetError
    from keras_resnet.system.files import printable
    from keras_resnet.system.process import tune_process

    try:
        if arguments.run is not _inspect:
            tune_process()
            _choose_backend()
        return arguments.run(arguments) or 0
    except KerasResNetError as error:
        print(f"keras-resnet: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `keras-resnet models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # an output that cannot be written, a full disk
        where = f"{error.filename!r}: " if error.filename else ""
        print(f"keras-resnet: {printable(where)}{error.strerror or error}", file=sys.stderr)
        return 2


def _choose_backend() -> None:
    """Says in one line what Keras would say in a traceback: the chosen backend is not there.

    Where neither KERAS_BACKEND nor keras.json chooses and one backend alone is installed, it is
    that one; every command prints which one runs.
    """
    import importlib.util
    import json

    from keras_resnet.errors import InputError, MissingDependencyError, did_you_mean

    known = ("torch", "tensorflow", "jax")
    chosen = os.environ.get("KERAS_BACKEND")
    if not chosen:
        home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
        try:
            chosen = json.loads((home / "keras.json").read_text(encoding="utf-8")).get("backend")
        except (OSError, ValueError):
            chosen = None
    installed = [name for name in known if importlib.util.find_spec(name)]
    if not chosen:
        if len(installed) == 1:
            os.environ["KERAS_BACKEND"] = installed[0]
            return
        chosen = "tensorflow"  # Keras' own default
    if chosen not in known:
        raise InputError(
            f"KERAS_BACKEND is {chosen!r}; it must be torch, tensorflow or jax."
            f"{did_you_mean(chosen, known)}"
        )
    if chosen not in installed:
        other = f"set KERAS_BACKEND={installed[0]}, or " if installed else ""
        raise MissingDependencyError(
            f"Keras is set to the {chosen} backend, which is not installed: {other}"
            f"pip install 'keras3-resnet[{chosen}]'"
        )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of `train` alone fills a screen."""

    def error(self, message):
        command = self.prog.removeprefix("keras-resnet").strip()
        where = f"{command}: " if command else ""
        stop = "" if message.endswith(("?", ".")) else "."
        self.exit(2, f"keras-resnet: {where}{message}{stop} See {self.prog} --help.\n")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            from keras_resnet.errors import did_you_mean

            known = [option for action in found.parser._actions for option in action.option_strings]
            name = unknown[0].partition("=")[0]
            near = did_you_mean(name, known) if name.startswith("-") else ""
            found.parser.error(f"unknown argument {name!r}.{near}")
        return found


def build_parser() -> argparse.ArgumentParser:
    """The parser of `keras-resnet`; the reference of the command line is written from it."""
    parser = _Parser(
        prog="keras-resnet",
        description="ResNets and AlexNets for Keras 3. The backend is chosen by KERAS_BACKEND "
        "(torch, tensorflow or jax).",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    models = _command(commands, "models", _models, "list the models")
    models.add_argument("pattern", nargs="?", default="*", help="such as 'resnext*'")

    summary = _command(commands, "summary", _summary, "a model's layers, parameters, memory")
    summary.add_argument("model", metavar="NAME", help="a model's name, or a .keras file")
    summary.add_argument("--input-size", type=int, metavar="PIXELS", help="side of the input")
    summary.add_argument("--num-classes", type=int, metavar="N")

    _train_command(commands)
    _lr_find_command(commands)

    evaluate = _command(commands, "evaluate", _evaluate, "measure a model on a labelled folder")
    evaluate.add_argument("model", metavar="MODEL", help="a .keras file, or a run folder")
    evaluate.add_argument("directory", metavar="DIR", help="class folders, or test/ val/ train/")
    evaluate.add_argument("--split", choices=("test", "val", "train"), help="which of them")
    evaluate.add_argument("--output", metavar="DIR", help="write JSON, CSV and a figure there")
    evaluate.add_argument("--batch-size", type=int, default=32, metavar="N")
    evaluate.add_argument("--workers", type=int, metavar="N", help="threads that read pictures")
    evaluate.add_argument("--strict", action="store_true", help="stop at an unreadable picture")
    _engine_option(evaluate)

    _predict_command(commands)
    _explain_command(commands)
    _serve_command(commands)
    _report_command(commands)

    demo = _command(commands, "demo", _demo, "train, evaluate and predict on handwritten digits")
    demo.add_argument("--output", default="demo", metavar="DIR")
    demo.add_argument("--epochs", type=int, default=None, metavar="N")

    scan = _command(commands, "scan", _scan, "look for trouble in a folder of pictures")
    scan.add_argument("directory", metavar="DIR", help="class folders, or train/ val/ test/")
    scan.add_argument("--json", metavar="FILE", help="write the report as JSON")
    scan.add_argument("--sheet", metavar="FILE", help="write a picture of the worst, .png or .jpg")
    scan.add_argument("--exclude-list", metavar="FILE", help="write what `train` should leave out")
    scan.add_argument("--workers", type=int, metavar="N", help="threads that read pictures")

    _weight_commands(commands)
    _export_command(commands)
    return parser


def _engine_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--engine", default="keras", metavar="NAME",
                         help="keras, openvino, onnxruntime, torch; auto tries them")  # fmt: skip


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run, parser=parser)
    return parser


# --- models --------------------------------------------------------------------------------------


def _models(arguments) -> int:
    from keras_resnet.errors import InputError
    from keras_resnet.models.summary import count_flops
    from keras_resnet.models.zoo import create_model
    from keras_resnet.variants import SPECS, list_models
    from keras_resnet.weights import published as hub

    names = list_models(arguments.pattern)
    if not names:
        raise InputError(f"No model matches {arguments.pattern!r}.")
    width = max(map(len, names))
    print(f"{'Model':{width}}  {'Parameters':>11}  {'GFLOPs':>6}  {'Input':>7}  Published top-1")
    for name in names:
        known = [row for row in hub.registry() if row.model == name]
        if known:
            params, gflops = known[0].num_params, known[0].gflops
        else:
            model = create_model(name)
            params, gflops = _trainable(model), count_flops(model) / 1e9
        accuracy = ", ".join(f"{row.acc1:.3f} ({row.tag})" for row in known) or "-"
        size = SPECS[name].input_size
        print(f"{name:{width}}  {params:>11,}  {gflops:6.3f}  {size:>3}x{size:<3}  {accuracy}")
    return 0


def _trainable(model) -> int:
    import math

    return sum(math.prod(v.shape) for v in model.trainable_variables)


def _summary(arguments) -> int:
    from keras_resnet.models.files import load_model
    from keras_resnet.models.summary import summary
    from keras_resnet.models.zoo import create_model
    from keras_resnet.variants import get_spec

    if arguments.model.endswith(".keras") or Path(arguments.model).exists():
        model = load_model(arguments.model)
    else:
        side = arguments.input_size or get_spec(arguments.model).input_size
        import keras

        last = keras.config.image_data_format() == "channels_last"
        model = create_model(
            arguments.model,
            input_shape=(side, side, 3) if last else (3, side, side),
            num_classes=arguments.num_classes,
        )
    print(summary(model, arguments.input_size))
    return 0


# --- train, evaluate, predict --------------------------------------------------------------------


def _train_command(commands) -> None:
    from keras_resnet.recipes import RECIPES

    train = _command(commands, "train", _train, "fit a model on an image folder")
    train.add_argument("directory", metavar="DIR", help="class folders, or train/ and val/")
    train.add_argument(
        "--output", default="runs", metavar="DIR", help="where the run folder is made"
    )
    train.add_argument("--name", metavar="NAME", help="the run folder's name")
    train.add_argument("--recipe", default="finetune", metavar="NAME", help=", ".join(RECIPES))
    train.add_argument("--show", action="store_true", help="print the recipe in full, and stop")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    train.add_argument("--workers", type=int, metavar="N", help="threads that read pictures")
    train.add_argument("--cache", metavar="ram|DIR", help="keep decoded pictures")
    train.add_argument("--exclude-list", metavar="FILE", help="pictures to leave out (see scan)")
    train.add_argument("--strict", action="store_true", help="stop at an unreadable picture")
    train.add_argument("--exif", action="store_true", help="turn pictures by their EXIF tag")
    train.add_argument("--restart", action="store_true", help="never go on from an unfinished run")
    train.add_argument("--deterministic", action="store_true", help="deterministic kernels only")
    train.add_argument("--compile", action="store_true", help="compile the training step")
    train.add_argument(
        "--keep", type=int, default=0, metavar="N", help="keep N best epochs' models"
    )
    train.add_argument("--log", action="append", default=[], metavar="NAME",
                       help="tensorboard, wandb or mlflow (repeatable)")  # fmt: skip
    train.add_argument("--no-report", action="store_true", help="write no report.html at the end")
    train.add_argument("--checkpoint-steps", type=int, metavar="N", help="save the state so often")
    train.add_argument("--dry-run", action="store_true", help="say what would happen, and stop")
    _recipe_options(train)


def _recipe_options(command: argparse.ArgumentParser) -> None:
    """Adds an option for every field of a recipe."""
    from keras_resnet.recipes import Recipe

    group = command.add_argument_group("what a recipe holds; each option overrides it")
    hints = typing.get_type_hints(Recipe)
    texts = _attribute_texts(Recipe)
    for field in dataclasses.fields(Recipe)[3:]:
        _add_field(group, field.name, hints[field.name], texts[field.name])


def _attribute_texts(cls) -> dict[str, str]:
    """First sentences of the `Attributes:` section of a class's docstring, by name."""
    texts: dict[str, str] = {}
    name = None
    for line in cls.__doc__.split("Attributes:")[1].splitlines():
        stripped = line.strip()
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and ": " in stripped:
            name, _, stripped = stripped.partition(": ")
            texts[name] = ""
        if name and stripped:
            texts[name] = f"{texts[name]} {stripped}".strip()
    return {k: v.replace("`", "").replace("%", "%%").rstrip(".") for k, v in texts.items()}


def _add_field(group, name: str, hint, text: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    if typing.get_origin(hint) is tuple:
        group.add_argument(flag, type=float, nargs="+", metavar="X", help=text)
        return
    optional = isinstance(hint, types.UnionType)
    kind = next(t for t in typing.get_args(hint) if t is not type(None)) if optional else hint

    def parse(value: str):
        return _NONE if optional and value.lower() == "none" else kind(value)

    parse.__name__ = kind.__name__
    group.add_argument(flag, type=parse, metavar={str: "NAME", int: "N"}.get(kind, "X"), help=text)


_NONE = object()  # `--dropout none` is a value; an option not given is none at all


def _given_options(arguments) -> dict[str, typing.Any]:
    """The recipe's fields that were given on the command line."""
    from keras_resnet.recipes import Recipe

    options = {}
    for field in dataclasses.fields(Recipe)[3:]:
        value = getattr(arguments, field.name)
        if value is not None:
            value = None if value is _NONE else value
            options[field.name] = tuple(value) if isinstance(value, list) else value
    return options


def _train(arguments) -> int:
    from keras_resnet.recipes import get_recipe

    options = _given_options(arguments)
    if arguments.show:
        print(get_recipe(arguments.recipe).with_options(**options))
        return 0
    from keras_resnet.training.train import train

    result = train(
        arguments.directory,
        recipe=arguments.recipe,
        output=arguments.output,
        name=arguments.name,
        seed=arguments.seed,
        workers=arguments.workers,
        cache=arguments.cache,
        exclude=arguments.exclude_list,
        strict=arguments.strict,
        exif=arguments.exif,
        restart=arguments.restart,
        deterministic=arguments.deterministic,
        compile=arguments.compile,
        checkpoint_steps=arguments.checkpoint_steps,
        keep=arguments.keep,
        log=arguments.log,
        report=not arguments.no_report,
        dry_run=arguments.dry_run,
        **options,
    )
    return 130 if result.interrupted else 0


def _lr_find_command(commands) -> None:
    from keras_resnet.recipes import RECIPES

    find = _command(commands, "lr-find", _lr_find, "find a learning rate by a sweep")
    find.add_argument("directory", metavar="DIR", help="class folders, or train/ and val/")
    find.add_argument("--plot", default="lr_find.png", metavar="FILE", help="the picture to write")
    find.add_argument("--recipe", default="finetune", metavar="NAME", help=", ".join(RECIPES))
    find.add_argument("--start", type=float, default=1e-6, metavar="X", help="first rate")
    find.add_argument("--stop", type=float, default=10.0, metavar="X", help="last rate")
    find.add_argument("--steps", type=int, default=100, metavar="N", help="batches")
    find.add_argument("--seed", type=int, default=0, metavar="N")
    find.add_argument("--workers", type=int, metavar="N", help="threads that read pictures")
    find.add_argument("--exclude-list", metavar="FILE", help="pictures to leave out (see scan)")
    _recipe_options(find)


def _lr_find(arguments) -> int:
    from keras_resnet.system.device import backend_line
    from keras_resnet.training.lr_finder import lr_find

    print(f"Backend: {backend_line()}")
    result = lr_find(
        arguments.directory,
        recipe=arguments.recipe,
        start=arguments.start,
        stop=arguments.stop,
        steps=arguments.steps,
        seed=arguments.seed,
        workers=arguments.workers,
        exclude=arguments.exclude_list,
        **_given_options(arguments),
    )
    print(result)
    print(f"Written: {result.plot(arguments.plot)}")
    return 0


def _evaluate(arguments) -> int:
    from keras_resnet.inference.evaluate import evaluate
    from keras_resnet.runtimes.select import open_runner
    from keras_resnet.system.device import backend_line

    print(f"Backend: {backend_line()}")
    runner = open_runner(arguments.model, arguments.engine)
    print(f"Engine: {runner}")
    result = evaluate(
        runner,
        arguments.directory,
        split=arguments.split,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        strict=arguments.strict,
        output=arguments.output,
    )
    print(result)
    return 0


def _predict_command(commands) -> None:
    predict = _command(commands, "predict", _predict, "classify pictures")
    predict.add_argument("model", metavar="MODEL", help="a .keras file, or a run folder")
    predict.add_argument("paths", nargs="+", metavar="PATH", help="pictures, folders, patterns")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="classes to show")
    predict.add_argument(
        "--output", metavar="FILE",
        help="write .csv, .jsonl or .parquet as answers come, and print none; for any number of "
        "pictures: an interrupted run goes on",
    )  # fmt: skip
    predict.add_argument(
        "--restart", action="store_true", help="never go on from an interrupted --output"
    )
    predict.add_argument("--csv", metavar="FILE", help="write a line a picture at the end")
    predict.add_argument("--json", metavar="FILE", help="write the same as JSON")
    predict.add_argument("--plot", metavar="FILE", help="draw the pictures with their titles")
    predict.add_argument("--batch-size", type=int, default=32, metavar="N")
    predict.add_argument("--workers", type=int, metavar="N", help="threads that read pictures")
    _engine_option(predict)


def _predict(arguments) -> int:
    from keras_resnet.data.sources import Images
    from keras_resnet.errors import InputError
    from keras_resnet.inference.predict import PredictionTable, iter_predictions, save_predictions
    from keras_resnet.models.files import model_class_names
    from keras_resnet.runtimes.select import open_runner
    from keras_resnet.system.device import backend_line

    wanted = {"csv": arguments.csv, "json": arguments.json, "plot": arguments.plot}
    for name, path in wanted.items():
        ends = (".png", ".jpg", ".jpeg", ".svg", ".pdf") if name == "plot" else (f".{name}",)
        if path is not None and Path(path).suffix.lower() not in ends:
            raise InputError(f"--{name} wants a name that ends in {ends[0]}, not {path!r}.")
    if arguments.output is not None:
        if any(wanted.values()):
            raise InputError("--output stands alone: leave out --csv, --json and --plot.")
        return _predict_to_file(arguments)
    print(f"Backend: {backend_line()}")
    runner = open_runner(arguments.model, arguments.engine)
    print(f"Engine: {runner}")
    pictures = Images(arguments.paths)
    table = PredictionTable(pictures, model_class_names(runner), arguments.top)
    print(table.header)
    kept, unreadable = [], 0
    for prediction in iter_predictions(
        runner,
        pictures,
        top=arguments.top,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    ):
        print(table.line(prediction))
        unreadable += prediction.error is not None
        if any(wanted.values()):
            kept.append(prediction)
    if unreadable:
        print(f"{unreadable} of {len(pictures)} pictures could not be read.", file=sys.stderr)
    if unreadable == len(pictures):
        return 2
    for path in filter(None, wanted.values()):
        save_predictions(kept, path)
        print(f"Written: {path}")
    return 0


def _predict_to_file(arguments) -> int:
    from keras_resnet.data.sources import Images
    from keras_resnet.inference.predict import write_predictions
    from keras_resnet.inference.prediction_files import check_output
    from keras_resnet.system.device import backend_line
    from keras_resnet.system.files import printable
    from keras_resnet.system.progress import Progress, ProgressLine

    output = check_output(arguments.output)
    pictures = Images(arguments.paths)
    print(f"Backend: {backend_line()}", flush=True)
    line, last = ProgressLine(), Progress(0, 0)

    def progress(now: Progress) -> None:
        nonlocal last
        if last.total == 0 and now.done:
            print(f"Going on behind {now.done:,} of {now.total:,} pictures.", flush=True)
        last = now
        line(now)

    try:
        result = write_predictions(
            arguments.model,
            pictures,
            output,
            top=arguments.top,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            engine=arguments.engine,
            restart=arguments.restart,
            progress=progress,
        )
    except KeyboardInterrupt:
        line.close()
        if last.total:
            print(
                f"Interrupted at {last.done:,} of {last.total:,} pictures, kept in "
                f"{printable(output)}.part. The same command goes on.",
                file=sys.stderr,
            )
            return 130
        raise
    finally:
        line.close()
    print(result)
    return 2 if result.unreadable == result.count else 0


def _explain_command(commands) -> None:
    explain = _command(commands, "explain", _explain, "draw where a model looked, by Grad-CAM")
    explain.add_argument("model", metavar="MODEL", help="a .keras file, or a run folder")
    explain.add_argument("paths", nargs="+", metavar="PATH", help="pictures, folders, patterns")
    explain.add_argument(
        "--class", dest="class_name", metavar="NAME",
        help="the class to explain; each picture's most probable one by default",
    )  # fmt: skip
    explain.add_argument("--layer", metavar="NAME", help="the last feature map by default")
    explain.add_argument("--output", default="explained", metavar="DIR", help="for the pictures")
    explain.add_argument("--top", type=int, default=5, metavar="N", help="classes to show")
    explain.add_argument("--workers", type=int, metavar="N", help="threads that read pictures")


def _explain(arguments) -> int:
    from keras_resnet.data.sources import image_paths
    from keras_resnet.errors import InputError
    from keras_resnet.inference.explain import iter_explanations, overlay_names, save_overlay
    from keras_resnet.inference.predict import PredictionTable
    from keras_resnet.models.files import load_model, model_class_names
    from keras_resnet.system.device import backend_line
    from keras_resnet.system.files import printable

    output = Path(arguments.output).expanduser()
    if output.exists() and not output.is_dir():
        raise InputError(f"The output {str(output)!r} is a file; a folder is needed.")
    print(f"Backend: {backend_line()}")
    model = load_model(arguments.model)
    paths = image_paths(arguments.paths)
    table = PredictionTable(paths, model_class_names(model), arguments.top)
    found = iter_explanations(
        model,
        paths,
        class_name=arguments.class_name,
        layer=arguments.layer,
        top=arguments.top,
        workers=arguments.workers,
    )
    written = 0
    print(table.header)
    for explanation, name in zip(found, overlay_names(paths), strict=True):
        print(table.line(explanation.prediction))
        if explanation.heatmap is not None:
            output.mkdir(parents=True, exist_ok=True)
            save_overlay(explanation, output / name)
            written += 1
    unreadable = len(paths) - written
    if unreadable:
        print(f"{unreadable} of {len(paths)} pictures could not be read.", file=sys.stderr)
    if written:
        count = "1 picture" if written == 1 else f"{written} pictures"
        print(f"Written: {count} in {printable(output)}")
    return 0 if written else 2


def _serve_command(commands) -> None:
    serve = _command(commands, "serve", _serve, "a page to try a model on, and an HTTP endpoint")
    serve.add_argument(
        "model", metavar="MODEL", help="a .keras file, a run folder, an exported file"
    )
    serve.add_argument("--host", default="127.0.0.1", metavar="NAME", help="where to listen")
    serve.add_argument("--port", type=int, default=7860, metavar="N", help="0 takes a free one")
    serve.add_argument("--max-mb", type=float, default=20, metavar="X", help="of one file")
    serve.add_argument(
        "--max-megapixels", type=float, default=50, metavar="X", help="of one picture"
    )
    serve.add_argument("--max-pictures", type=int, default=16, metavar="N", help="at a time")
    _engine_option(serve)


def _serve(arguments) -> int:
    from keras_resnet.inference.serve import serve
    from keras_resnet.inference.service import Limits
    from keras_resnet.system.device import backend_line

    limits = Limits(arguments.max_mb, arguments.max_megapixels, arguments.max_pictures)
    print(f"Backend: {backend_line()}", flush=True)
    serve(
        arguments.model,
        host=arguments.host,
        port=arguments.port,
        limits=limits,
        engine=arguments.engine,
    )
    return 0


def _report_command(commands) -> None:
    report = _command(commands, "report", _report, "show a run, or several side by side, as a page")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    report.add_argument("--output", metavar="FILE",
                        help="report.html in the run folder, or comparison.html")  # fmt: skip


def _report(arguments) -> int:
    from keras_resnet.reports.report import report
    from keras_resnet.system.files import printable

    runs = arguments.runs
    print(f"Written: {printable(report(runs if len(runs) > 1 else runs[0], arguments.output))}")
    return 0


def _demo(arguments) -> int:
    from keras_resnet.cli.demo import run_demo

    result = run_demo(arguments.output, epochs=arguments.epochs)
    return 130 if result.interrupted else 0


def _scan(arguments) -> int:
    from keras_resnet.data.scan import scan
    from keras_resnet.system.files import write_text

    report = scan(arguments.directory, workers=arguments.workers)
    print(report)
    if arguments.json:
        write_text(arguments.json, report.to_json() + "\n")
        print(f"Written: {arguments.json}")
    if arguments.sheet:
        print(f"{report.save_sheet(arguments.sheet)} pictures in {arguments.sheet}")
    if arguments.exclude_list:
        count = report.write_exclude_list(arguments.exclude_list)
        print(f"{count} files to leave out in {arguments.exclude_list}")
    return 0


# --- weight files --------------------------------------------------------------------------------


def _weight_commands(commands) -> None:
    inspect = _command(commands, "inspect", _inspect, "say what a weight file is, running nothing")
    inspect.add_argument("file", metavar="FILE", help=".pth, .pt, .th, .tar, .safetensors, .keras")
    inspect.add_argument("--key", metavar="NAME", help="which dict inside, such as model_ema")
    inspect.add_argument("--json", metavar="OUT", help="write the answer as JSON, - for stdout")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")

    convert = _command(
        commands, "convert", _convert, "turn a torch checkpoint into .keras, or back"
    )
    convert.add_argument("source", metavar="SRC", help="a checkpoint, or a .keras file")
    convert.add_argument("target", metavar="DST", help=".keras, .weights.h5, .pth or .safetensors")
    convert.add_argument("--model", metavar="NAME", help="the variant; found out where it can be")
    convert.add_argument("--key", metavar="NAME", help="which dict inside, such as model_ema")
    convert.add_argument("--class-names", metavar="FILE", help="a name a line, or JSON")
    convert.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the input")
    convert.add_argument(
        "--resize-size", type=int, metavar="PIXELS", help="short side before the crop"
    )
    convert.add_argument("--mean", type=float, nargs=3, metavar="X", help="ImageNet's by default")
    convert.add_argument("--std", type=float, nargs=3, metavar="X", help="ImageNet's by default")
    convert.add_argument("--include-preprocessing", action="store_true",
                         help="the Keras model takes pixel values 0..255")  # fmt: skip
    convert.add_argument("--no-verify", action="store_true", help="skip the numerical proof")
    convert.add_argument("--allow-other-strides", action="store_true",
                         help="weights of unknown origin for a v1 model")  # fmt: skip

    verify = _command(commands, "verify", _verify, "compare a model with the file it came from")
    verify.add_argument("model", metavar="MODEL", help="a .keras file")
    verify.add_argument("source", metavar="SRC", help="the checkpoint")
    verify.add_argument("--key", metavar="NAME", help="which dict inside, such as model_ema")
    verify.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="relative")
    verify.add_argument("--json", metavar="OUT", help="write the report as JSON")


def _inspect(arguments) -> int:
    import json

    from keras_resnet.system.files import write_text
    from keras_resnet.weights.checkpoint import inspect_checkpoint

    if arguments.file.endswith(".keras"):
        return _inspect_keras(arguments)
    info = inspect_checkpoint(arguments.file, key=arguments.key)
    digest = info.hash(_progress(f"sha256 of {info.path.name}", info.size))
    text = str(info)
    if not arguments.tensors:
        text = "\n".join(line for line in text.split("\n") if not line.startswith("    "))
    print(text)
    print(f"  sha256   {digest}")
    verdict = _what_it_is(info, digest)
    if verdict:
        print(f"  is       {verdict}")
    if arguments.json:
        facts = {**json.loads(info.to_json()), "sha256": digest, "is": verdict}
        write = print if arguments.json == "-" else lambda t: write_text(arguments.json, t + "\n")
        write(json.dumps(facts, indent=2))
    return 0 if info.safe and info.problem is None else 1


def _what_it_is(info, digest: str) -> str:
    """Which model a checkpoint fits, and which published file it is."""
    from keras_resnet.weights.published import published_by_torchvision

    try:
        _choose_backend()
        from keras_resnet.weights.matching import matching_variants
    except ImportError:  # reading files needs no backend
        return ""
    published = published_by_torchvision(digest)
    if published is not None:
        return f"torchvision's {published.model} {published.tag}, published as {published.url}"
    fits = matching_variants({name: shape for name, (shape, _) in info.tensors.items()})
    names = " or ".join(name for name, _ in fits)
    return f"weights for {names}, {fits[0][1] or 'no'} classes" if fits else ""


def _inspect_keras(arguments) -> int:
    import json

    from keras_resnet.models.files import load_model

    model = load_model(arguments.file)
    print(f"{model.name}: {model.count_params():,} parameters, output {model.output_shape}")
    print(json.dumps(getattr(model, "info", {}), indent=2, default=str))
    return 0


def _progress(label: str, size: int):
    """A progress function for a terminal, for files that take a second or more."""
    if size < 50 * 2**20 or not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{label}: {done / total:4.0%}", end=end, file=sys.stderr, flush=True)

    return show


def _convert(arguments) -> int:
    from keras_resnet.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
    from keras_resnet.models.files import convert_file
    from keras_resnet.system.files import write_text

    preprocess = None
    if any((arguments.image_size, arguments.resize_size, arguments.mean, arguments.std)):
        size = arguments.image_size or 224
        whole = size <= 64 and arguments.resize_size is None
        preprocess = Preprocess(
            (size, size) if whole else arguments.resize_size or round(size * 256 / 224),
            None if whole else size,
            mean=arguments.mean or IMAGENET_MEAN,
            std=arguments.std or IMAGENET_STD,
        )
    result = convert_file(
        arguments.source,
        arguments.target,
        variant=arguments.model,
        key=arguments.key,
        class_names=_read_names(arguments.class_names),
        preprocess=preprocess,
        include_preprocessing=arguments.include_preprocessing,
        check=not arguments.no_verify,
        allow_other_strides=arguments.allow_other_strides,
    )
    print(result)
    write_text(f"{arguments.target}.report.json", result.to_json() + "\n")
    return 0 if result.passed else 1


def _read_names(path: str | None) -> list[str] | None:
    """Class names out of a text file (one a line) or JSON (a list, or index to name)."""
    import json

    from keras_resnet.errors import InputError, NotFoundError

    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"Cannot read class names from {path!r}: {error.strerror}.") from None
    if not path.endswith(".json"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = json.loads(text)
        return (
            [names[str(i)] for i in range(len(names))] if isinstance(names, dict) else list(names)
        )
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path!r} must hold a JSON list of names, or numbers from 0 to names."
        ) from None


def _verify(arguments) -> int:
    from keras_resnet.models.files import load_model
    from keras_resnet.weights.verify import verify

    report = verify(
        load_model(arguments.model),
        arguments.source,
        key=arguments.key,
        tolerance=arguments.tolerance,
    )
    print(report)
    if arguments.json:
        report.to_json(arguments.json)
    return 0 if report.passed else 1


# --- export --------------------------------------------------------------------------------------


def _export_command(commands) -> None:
    export = _command(
        commands, "export", _export, "write a model for another runtime, and prove it"
    )
    export.add_argument("model", metavar="MODEL", help="a .keras file, or a run folder")
    export.add_argument("--format", metavar="NAME",
                        help="onnx, openvino, saved_model, litert or torch")  # fmt: skip
    export.add_argument("--output", metavar="PATH", help="the file to write; beside the model")
    export.add_argument("--pictures", action="append", metavar="PATH",
                        help="compare on these (repeatable); packaged by default")  # fmt: skip
    export.add_argument("--batch-size", type=int, metavar="N", help="a fixed one; any by default")
    export.add_argument("--tolerance", type=float, default=1e-4, metavar="X",
                        help="largest difference, relative to the largest output")  # fmt: skip
    export.add_argument("--int8", metavar="DIR", help="quantise, with ranges from these pictures")
    export.add_argument("--max-drop", type=float, default=0.02, metavar="X",
                        help="share of right answers that int8 may cost")  # fmt: skip
    export.add_argument("--no-verify", action="store_true", help="do not run the file")


def _export(arguments) -> int:
    from keras_resnet.errors import InputError, VerificationError
    from keras_resnet.runtimes.export import default_path, export
    from keras_resnet.system.device import backend_line

    if arguments.output is None and arguments.format is None:
        raise InputError("Say which: --format onnx, openvino, saved_model, litert or torch.")
    print(f"Backend: {backend_line()}")
    pictures = arguments.pictures
    try:
        report = export(
            arguments.model,
            arguments.output or default_path(arguments.model, arguments.format),
            arguments.format,
            verify=not arguments.no_verify,
            pictures=pictures[0] if pictures and len(pictures) == 1 else pictures,
            tolerance=arguments.tolerance,
            batch_size=arguments.batch_size,
            int8=arguments.int8,
            max_drop=arguments.max_drop,
        )
    except VerificationError as error:
        print(error.report)
        print(f"keras-resnet: {error}", file=sys.stderr)
        return 1
    print(report)
    print(f"Written: {report.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
