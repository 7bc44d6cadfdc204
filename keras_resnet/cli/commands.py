"""The commands: a row each, with the function that runs it and its arguments."""

from __future__ import annotations

import argparse
import functools

from keras_resnet.cli import files, models, predicting, training
from keras_resnet.cli.checks import (
    cache,
    existing,
    existing_file,
    keras_model,
    logger,
    model,
    model_first,
    one_after_the_other,
    port,
    source_first,
    weight_file,
    written,
)
from keras_resnet.cli.launch import number
from keras_resnet.cli.parser import Command, arg
from keras_resnet.data.opening import check_images
from keras_resnet.data.sources import Images
from keras_resnet.recipes import RECIPES
from keras_resnet.reports.run_files import check_run
from keras_resnet.runtimes.rows import check_engine, get_format
from keras_resnet.system.errors import between
from keras_resnet.system.files import check_writable_folder
from keras_resnet.variants import get_spec
from keras_resnet.weights.dialects import PIXELS, WORDS
from keras_resnet.weights.keras_files import find_keras_file, target_ending

_TRAIN_FOLDER = arg("directory DIR", "class folders, train/ and val/, a table, shards")
_COLUMNS = arg("--columns NAMES", "a table's, as path=image,label=breed; guessed by default",
               group="Data", rare=True)  # fmt: skip
_SOURCE = [
    _COLUMNS,
    arg("--label-regex REGEX", "finds the label in a file's name, as its first group", group="Data",
        rare=True),
]  # fmt: skip
_RECIPE = arg("--recipe NAME=finetune", f"what the options start from: {', '.join(RECIPES)}",
              group="Model")  # fmt: skip
_SEED = arg("--seed N=0", "of everything random", least=0, group="Training")
_WORKERS = arg("--workers N", "threads that read images", least=0, group="Data")
_EXCLUDE = arg("--exclude-list FILE", "images to leave out, as scan writes it", existing_file,
               group="Data", dest="exclude")  # fmt: skip
_STRICT = arg("--strict", "stop at an unreadable image", group="Data", rare=True)
_MODEL = arg("model MODEL", "a .keras file, a run folder, or resnet18: published weights", model)
_KERAS_MODEL = arg("model MODEL", "a .keras file, a run folder, or resnet18: published weights",
                   keras_model)  # fmt: skip
_IMAGES = arg("paths PATH", "images, folders, patterns", nargs="+")
_FIGURE = (".png", ".jpg", ".jpeg", ".svg", ".pdf")
_TOP = arg("--top N=5", "classes to show", least=1)
_BATCH = arg("--batch-size N=32", "images at a time", least=1)
_KEY = arg("--key NAME", "which dict inside, such as model_ema")
_PIXELS = arg("--pixels RANGE", "what the model takes, where its layers do not tell",
              choices=("0..255", "0..1", "normalized"))  # fmt: skip
_ENGINES = "keras, openvino, onnxruntime, torch; auto"
_ENGINE = arg("--engine NAME=auto", f"{_ENGINES} takes one where it pays", check_engine)

_SURE = arg("--min-confidence X=0", "answer 'unknown' where it is less sure",
            functools.partial(between, "min_confidence", low=0, high=1))  # fmt: skip

_TTA = arg("--tta NAME", "flip: the mean of the image's and its mirror image's probabilities",
           choices=("flip",))  # fmt: skip

_TF32 = arg("--tf32", "let a GPU compute float32 on 10 bits; as the backend has it by default",
            action=argparse.BooleanOptionalAction, default=None, rare=True)  # fmt: skip

_DEVICES = arg("--devices N|all", "how many share the work", number, group="Training")

COMMANDS = {
    "models": Command(models.models, "list the models", [
        arg("pattern PATTERN=*", "such as 'resnext*'", nargs="?"),
        arg("--weights", "list the weights that are known by name"),
    ], keras=False),
    "summary": Command(models.summary, "a model's layers, parameters, memory", [
        arg("model NAME", "a model's name, or a .keras file"),
        arg("--input-size PIXELS", "side of the input", least=1),
        arg("--num-classes N", "of its last layer; as published by default", least=1),
    ]),
    "info": Command(models.info, "versions, device, threads and engines in use", []),
    "train": Command(training.train, "fit a model on an image folder", [
        _TRAIN_FOLDER,
        _WORKERS, _EXCLUDE, _STRICT, *_SOURCE,
        arg("--exif", "turn images by their EXIF tag", group="Data", rare=True),
        arg("--cache ram|DIR", "keep decoded images in memory, or in a folder", cache,
            group="Data"),
        arg("--config FILE", "again as a run was made, by its config.json; what else is given "
            "changes it", rare=True),
        arg("--folds N", "a run a fold, each validated on other images, and their mean accuracy",
            least=2, group="Data", rare=True),
        _RECIPE, _SEED,
        arg("--output DIR=runs", "where the run folder is made", check_writable_folder,
            group="Output"),
        arg("--name NAME", "the run folder's name, else of model and DIR", group="Output"),
        arg("--keep N=0", "keep so many best epochs' models", least=0, group="Output",
            rare=True),
        arg("--log NAME", "tensorboard, wandb or mlflow (repeatable)", logger, group="Output",
            action="append", default=[]),
        arg("--no-report", "write no report.html at the end", group="Output", rare=True,
            action="store_false", dest="report"),
        arg("--checkpoint-steps N", "save the state so often", least=1, rare=True),
        _DEVICES,
        arg("--max-restarts N=0", "go on from the last checkpoint so often, after a process was "
            "lost", least=0, group="Training", rare=True),
        arg("--sync-bn", "batch norms use the images of all devices; by default where one has "
            "fewer than 16, and on jax always", group="Training", rare=True,
            action=argparse.BooleanOptionalAction, default=None),
        arg("--compile", "compile the training step", rare=True),
        arg("--deterministic", "deterministic kernels only", rare=True),
        _TF32,
        arg("--restart", "never go on from an unfinished run"),
        arg("--dry-run", "say what would happen, and stop"),
        arg("--show", "print the recipe in full, and stop"),
    ], order=one_after_the_other, recipe=True),
    "lr-find": Command(training.lr_find, "find a learning rate by a sweep", [
        _TRAIN_FOLDER,
        arg("--plot FILE=lr_find.png", "the image to write", written(*_FIGURE)),
        _RECIPE,
        arg("--start X=1e-6", "first rate", above=0),
        arg("--stop X=10", "last rate", above=0),
        arg("--steps N=100", "batches", least=3),
        _SEED, _WORKERS, _EXCLUDE, *_SOURCE,
    ], recipe=True),
    "augment": Command(training.augment, "draw images as a recipe changes them", [
        _TRAIN_FOLDER,
        arg("--sheet FILE=augment.png", "the image to write", written(*_FIGURE)),
        arg("--images N=6", "rows", least=1),
        arg("--versions N=7", "epochs, a column each", least=1),
        _RECIPE, _SEED, _EXCLUDE, *_SOURCE,
    ], recipe=True),
    "evaluate": Command(predicting.evaluate, "measure a model on a labelled folder", [
        _MODEL,
        arg("directory DIR", "class folders, or test/ val/ train/; or a table, or shards",
            check_images),
        arg("--split", "which of them", choices=("test", "val", "train")),
        arg("--output DIR", "write JSON, CSV and a figure there", check_writable_folder),
        _BATCH, _WORKERS, _DEVICES, _STRICT, _ENGINE, _PIXELS, _TTA, _TF32, *_SOURCE,
    ], order=model_first),
    "calibrate": Command(predicting.calibrate, "measure how sure a model may be, and keep it", [
        arg("model MODEL", "a .keras file or a run folder", keras_model),
        arg("directory DIR", "images that it was not trained on; labelled, as for evaluate",
            check_images, nargs="?"),
        arg("--split", "which of them; val by default", choices=("test", "val", "train")),
        arg("--output FILE", "in place of the model's own", written(".keras")),
        arg("--no-temperature", "choose thresholds alone", action="store_false",
            dest="temperature"),
        arg("--remove", "take out what was measured"),
        _BATCH, _WORKERS, _PIXELS, *_SOURCE,
    ]),
    "predict": Command(predicting.predict, "classify images", [
        arg("model MODEL", "a .keras file, a run folder, or resnet18: published weights; the mean "
            "of several", model),
        _IMAGES, _TOP,
        arg("--output FILE", "write .csv, .jsonl or .parquet as answers come, and print none; for "
            "any number of images: an interrupted run goes on"),
        arg("--restart", "never go on from an interrupted --output"),
        arg("--csv FILE", "write a line per image; - for stdout", written(".csv", pipe=True)),
        arg("--json FILE", "write the same as JSON; - for stdout", written(".json", pipe=True)),
        arg("--plot FILE", "draw the images with their titles", written(*_FIGURE)),
        _SURE,
        _BATCH, _WORKERS, _DEVICES, _ENGINE, _PIXELS, _TTA, _TF32, _COLUMNS,
    ], order=model_first),
    "explain": Command(predicting.explain, "draw where a model looked, by Grad-CAM", [
        _KERAS_MODEL, _IMAGES,
        arg("--class NAME", "the class to explain; each image's most probable one by default",
            dest="class_name"),
        arg("--layer NAME", "the last feature map by default"),
        arg("--output DIR=explained", "for the images", check_writable_folder),
        _TOP, _WORKERS, _PIXELS, _COLUMNS,
    ], order=model_first),
    "embed": Command(predicting.embed, "turn images into vectors: what a model's head sees", [
        _KERAS_MODEL, _IMAGES,
        arg("--output FILE=embeddings.npz", "or .parquet", written(".npz", ".parquet")),
        _BATCH, _WORKERS, _DEVICES, _PIXELS, _COLUMNS,
    ], order=model_first),
    "serve": Command(predicting.serve, "a page to try a model on, and an HTTP endpoint", [
        arg("model MODEL", "a .keras file, a run folder, an exported file, or resnet18", model),
        arg("--host NAME=127.0.0.1", "where to listen"),
        arg("--port N=7860", "0 takes a free one", port),
        arg("--max-mb X=20", "of one file", above=0),
        arg("--max-megapixels X=50", "of one image", above=0),
        arg("--max-pictures N=16", "at a time", least=1),
        _PIXELS, _SURE,
        arg("--engine NAME=keras", f"{_ENGINES} tries them", check_engine),
    ]),
    "report": Command(predicting.report, "show a run, or several side by side, as a page", [
        arg("runs RUN", "a run folder", check_run, nargs="+"),
        arg("--output FILE", "report.html in the run folder, or comparison.html",
            written(".html", ".htm")),
        arg("--model MODEL", "of what evaluate wrote: a .keras file or a run folder", keras_model),
        arg("--images DIR", "what it was trained on, where no run says it or it has moved",
            check_images),
    ]),
    "demo": Command(training.demo, "train, evaluate and predict on handwritten digits", [
        arg("--output DIR=demo", None, check_writable_folder),
        arg("--epochs N", least=1),
    ]),
    "scan": Command(files.scan, "look for trouble in a folder of images", [
        arg("directory DIR", "class folders, or train/ val/ test/; or a table, or shards",
            check_images),
        arg("--json FILE", "write the report as JSON; - for stdout", written(pipe=True)),
        arg("--sheet FILE", "write an image of the worst", written(".png", ".jpg", ".jpeg")),
        arg("--exclude-list FILE", "write what `train` should leave out", written()),
        arg("--model MODEL", "also finds what is alike to it in two splits, and suspected labels",
            keras_model),
        _WORKERS, *_SOURCE,
    ], keras=False),
    "pack": Command(files.pack, "write images into tar shards, to train on", [
        arg("directory DIR", "class folders, or train/ val/ test/; or a table", check_images),
        arg("folder SHARDS", "where they go", check_writable_folder),
        arg("--shard-mb X=256", "of one shard, at most", above=0),
        _EXCLUDE, *_SOURCE,
    ], keras=False),
    "inspect": Command(files.inspect, "say what a weight file is, running nothing", [
        arg("file FILE", ".pth, .pt, .th, .tar, .pkl, .safetensors, .h5, .keras"),
        _KEY,
        arg("--json OUT", "write the answer as JSON; - for stdout", written(pipe=True)),
        arg("--tensors", "list every tensor"),
    ], keras=False),
    "convert": Command(files.convert, "turn a torch checkpoint into .keras, or back", [
        arg("source SRC", "a checkpoint, or a .keras file", weight_file),
        arg("target DST", ".keras, .weights.h5, .pth or .safetensors", target_ending),
        arg("--model NAME", "the variant; found out where it can be", get_spec, dest="variant"),
        _KEY,
        arg("--to NAMES", "of a checkpoint's entries", choices=WORDS),
        arg("--class-names FILE", "a name a line, or JSON"),
        arg("--image-size PIXELS", "side of the input", least=1),
        arg("--resize-size PIXELS", "short side before the crop", least=1),
        arg("--mean X", "ImageNet's by default", nargs=3),
        arg("--std X", "ImageNet's by default", nargs=3, above=0),
        arg("--pixels KIND", "what the weights were trained on: BGR, -1..1, or ImageNet's",
            choices=PIXELS),
        arg("--include-preprocessing", "the Keras model takes pixel values 0..255"),
        arg("--no-verify", "skip the numerical proof", action="store_false", dest="check"),
        arg("--allow-other-strides", "weights of unknown origin for a v1 model"),
    ], order=source_first),
    "verify": Command(files.verify, "compare a model with the file it came from", [
        arg("model MODEL", "a .keras file", find_keras_file),
        arg("source SRC", "the checkpoint", existing_file),
        _KEY,
        arg("--tolerance X=1e-4", "relative", above=0),
        arg("--json OUT", "write the report as JSON; - for stdout", written(pipe=True)),
    ], order=model_first),
    "export": Command(files.export, "write a model for another runtime, and prove it", [
        _KERAS_MODEL,
        arg("--format NAME", "onnx, openvino, saved_model, litert or torch", get_format),
        arg("--output PATH", "the file to write; beside the model by default"),
        arg("--pictures PATH", "compare on these (repeatable); packaged by default", Images,
            action="append"),
        arg("--batch-size N", "a fixed one; any by default", least=1),
        arg("--tolerance X=1e-4", "largest difference, relative to the largest output", above=0),
        arg("--int8 DIR", "quantise, with ranges from these images", existing),
        arg("--max-drop X=0.02", "share of right answers that int8 may cost"),
        arg("--no-verify", "do not run the file", action="store_false", dest="verify"),
    ]),
}  # fmt: skip
