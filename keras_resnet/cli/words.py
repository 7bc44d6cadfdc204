"""Words that people bring from other programs: those that are taken, and those that get a hint.

They are those of torchvision's references, timm, Ultralytics, fastai, Lightning and Keras.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from keras_resnet.data.walk import is_picture
from keras_resnet.recipes import RECIPES
from keras_resnet.runtimes.rows import format_of_file
from keras_resnet.system.errors import did_you_mean
from keras_resnet.variants import SPECS


def _pairs(table: dict[str, str]) -> dict[str, str]:
    return {word: meaning for meaning, words in table.items() for word in words.split()}


# The same thing by another name: taken as the option, where the command has it.
SAME = _pairs({
    "--accumulate": "--grad-accum-steps --accumulation-steps --gradient-accumulation-steps "
                    "--accumulate-grad-batches --grad-accum",
    "--batch-size": "--bs -b --batch-sz --batchsize --per-device-batch-size",
    "--class": "--class-name --target-class --target",
    "--class-weights": "--class-weight",
    "--clip-norm": "--clip-grad --clip-grad-norm --grad-clip --max-grad-norm --gradient-clip-val",
    "--cutmix": "--cutmix-alpha",
    "--dropout": "--drop-rate --head-dropout",
    "--ema": "--model-ema --use-ema",
    "--ema-decay": "--model-ema-decay",
    "--ema-steps": "--model-ema-steps",
    "--engine": "--runtime",
    "--epochs": "--num-epochs --n-epochs --nepochs --max-epochs --num-train-epochs -e",
    "--eval-resize": "--val-resize-size",
    "--eval-size": "--val-crop-size --test-size",
    "--flip": "--hflip --fliplr --horizontal-flip",
    "--format": "--to",
    "--gamma": "--lr-gamma --lr-drop",
    "--image-size": "--imgsz --img-size --imgsize --img --train-crop-size --size --input-size "
                    "--resolution --crop-size --image-shape",
    "--keep": "--checkpoint-hist --save-top-k",
    "--label-smoothing": "--smoothing",
    "--layer": "--target-layer",
    "--learning-rate": "--lr --lr0 --base-lr --init-lr --initial-lr",
    "--log": "--logger --report-to",
    "--mixup": "--mixup-alpha",
    "--model": "--arch -a --architecture --net --network --backbone --variant",
    "--name": "--run-name --experiment --exp-name --exp",
    "--output": "--output-dir --out-dir --outdir --save-dir --project --logdir -o",
    "--patience": "--early-stopping --early-stopping-patience --patience-epochs",
    "--policy": "--auto-augment --autoaugment --aa --augment-policy",
    "--port": "-p --server-port",
    "--random-erasing": "--random-erase --reprob --erasing",
    "--recipe": "--preset --config --cfg",
    "--schedule": "--sched --scheduler --lr-scheduler --lr-schedule --lr-policy --decay-type",
    "--seed": "--random-seed --manual-seed",
    "--step-size": "--lr-step-size --decay-epochs",
    "--top": "--topk --top-k -k",
    "--val-split": "--validation-split --valid-pct --val-ratio --val-fraction",
    "--warmup-decay": "--lr-warmup-decay",
    "--warmup-epochs": "--warmup --lr-warmup-epochs",
    "--weight-decay": "--wd --l2 --decay",
    "--weights": "--checkpoint --ckpt --initial-checkpoint",
    "--workers": "--num-workers -j --threads --nworkers",
})  # fmt: skip

# No option, or one with another value: what to do instead. {usage} is the command's.
HINTS = _pairs({
    "--weights DEFAULT starts from the published weights, --weights none from random ones.":
        "--pretrained --no-pretrained --use-pretrained --scratch --from-scratch --transfer "
        "--imagenet --download",
    "The same command goes on with an unfinished run by itself; --restart begins anew.":
        "--resume -r --continue --resume-from --auto-resume --start-epoch --resume-checkpoint",
    "Give --precision bf16, or fp16.":
        "--amp --fp16 --bf16 --half --mixed-precision --use-amp --apex-amp --native-amp "
        "--amp-dtype",
    "Give --batch-size auto.":
        "--auto-batch --autobatch --auto-batch-size --auto-scale-batch-size --find-batch-size "
        "--auto-find-batch-size",
    "The backend takes a GPU where it finds one; CUDA_VISIBLE_DEVICES in the environment chooses "
    "which, and set to nothing it means the CPU. train, predict and evaluate use several by "
    "--devices N.":
        "--device --gpu --gpus --cuda --cpu --no-cuda --no-gpu --use-gpu --accelerator "
        "--gpu-ids --mps -d -g --devices",
    "KERAS_BACKEND in the environment chooses it: torch, tensorflow or jax.":
        "--backend --framework --torch --tensorflow --jax --pytorch",
    "It stands without an option: {usage}":
        "--data --data-path --data-dir --dataset --datadir --train-dir --train-data --root --dir "
        "--path --folder --source --input --image --images --img-dir --image-dir --file --model "
        "--model-path --weights -i -m",
    "Put train/, val/ and test/ into one folder, and give that.":
        "--val-dir --val-data --valid-dir --val-path --validation-dir --test-dir --test-data",
    "The classes are the folders of images: their number is no option.":
        "--num-classes --nc --n-classes --classes --class-names --labels",
    "The loss is that of --task (single-label, binary or multi-label); --focal 2 makes it the "
    "focal one.":
        "--loss --criterion --loss-fn --bce --bce-loss --focal-loss --multilabel --multi-label",
    "--unfreeze head trains the head alone.":
        "--freeze --freeze-backbone --freeze-layers --freeze-epochs --feature-extract "
        "--feature-extraction --head-only --linear-probe",
    "keras-resnet evaluate measures a model.":
        "--eval --evaluate --test-only --validate --val-only --test",
    "A run folder is never overwritten, other files are replaced.":
        "--force -f --overwrite --exist-ok -y --yes",
    "The run folder gets best.keras and last.keras; --output says where it is made.":
        "--save --save-model --save-best --save-path --checkpoint-dir --save-best-only",
    "There is --policy, --color-jitter, --mixup, --cutmix and more: see --help-all.":
        "--augment --augmentation --augmentations --data-augmentation --ra-magnitude",
    "There is --vertical-flip.": "--vflip --flipud",
    "There is --rotation.": "--degrees --rotate",
    "Give --normalization imagenet, half or dataset.":
        "--mean --std --normalize --norm",
    "Give --schedule cosine.": "--cos-lr --cosine --cosine-annealing",
    "Give --log tensorboard, wandb or mlflow.":
        "--tensorboard --wandb --mlflow --log-wandb --use-wandb",
    "Every image gets its --top classes; below --min-confidence P the answer is 'unknown'.":
        "--conf --threshold --conf-thres --confidence",
    "Folders are searched through by themselves.": "--recursive",
    "What is printed can be sent elsewhere by the shell: > FILE.":
        "--verbose -v --quiet -q --silent --verbosity --print-freq --log-interval --log-every",
})  # fmt: skip

COMMANDS = _pairs({
    "convert": "import load-weights port torch2keras from-torch",
    "demo": "example quickstart try tutorial",
    "embed": "embeddings features extract encode vectors",
    "evaluate": "test val validate validation score measure metrics accuracy benchmark",
    "explain": "gradcam grad-cam grad_cam cam heatmap saliency attention interpret",
    "export": "onnx quantize deploy compile tflite openvino",
    "inspect": "info describe cat open keys",
    "lr-find": "lr lrfind find-lr lr-finder tune",
    "models": "list ls zoo model list-models available download variants",
    "pack": "shard shards tar webdataset",
    "predict": "infer inference classify label run detect recognize test-image",
    "report": "compare html dashboard visualize plot view results",
    "scan": "check lint clean stats data dataset analyze",
    "serve": "web gui ui app api server gradio start",
    "summary": "print params flops layers architecture show",
    "train": "fit finetune fine-tune fine_tune learn resume continue training retrain",
    "verify": "diff parity",
})  # fmt: skip


def spelled(words: list[str], known: Iterable[str]) -> list[str]:
    """A command's words with its options as it spells them.

    Examples:
        >>> spelled(["photos", "--lr=0.1", "--Top_K", "8"], ["--learning-rate", "--top"])
        ['photos', '--learning-rate=0.1', '--top', '8']
    """
    known, out = set(known), []
    for i, word in enumerate(words):
        if word == "--":
            return out + words[i:]
        name, equals, value = word.partition("=")
        if name.startswith("-") and name not in known:
            plain = name.lower().replace("_", "-") if name.startswith("--") else name
            plain = SAME.get(plain, plain)
            word = f"{plain}{equals}{value}" if plain in known else word
        out.append(word)
    return out


def is_other(word: str, known: Iterable[str]) -> bool:
    """Whether a word is another program's option, though it may be the beginning of one here."""
    plain = word.partition("=")[0].lower().replace("_", "-")
    return plain not in known and "{usage}" not in HINTS.get(plain, "{usage}")


def option_hint(word: str, known: Iterable[str], usage: str) -> str:
    """What is likely meant by a word that is none of a command's options; begins with a space."""
    name, equals, value = word.partition("=")
    if not name.startswith("-"):
        option = SAME.get(f"--{name}", f"--{name}".replace("_", "-"))
        if equals and option in known:
            return f" Did you mean {f'{option} {value}'!r}?"
        for kind, rows in (("--model", SPECS), ("--recipe", RECIPES)):
            if word in rows and kind in known:
                return f" Did you mean {f'{kind} {word}'!r}?"
        if word.endswith((".keras", ".pth", ".pt", ".safetensors")) and "--weights" in known:
            return f" Did you mean {f'--weights {word}'!r}?"
        return f" Usage: {usage}"
    plain = name.lower().replace("_", "-")
    hint = HINTS.get(plain)
    if hint is None:
        return did_you_mean(name, known)
    return f" {hint.format(usage=usage)}"


def command_hint(word: str, known: Iterable[str]) -> str:
    """What is likely meant by a word in the place of a command; begins with a space."""
    if word.lower() in COMMANDS:
        return f" Did you mean {COMMANDS[word.lower()]!r}?"
    if os.path.isdir(word) and not (Path(word) / "best.keras").is_file():
        return f" Did you mean {f'train {word}'!r}, or {f'scan {word}'!r}?"
    if word.endswith(".keras") or os.path.isdir(word) or format_of_file(word):
        return f" Did you mean {f'predict {word} IMAGE'!r}?"
    if is_picture(word):
        return f" Did you mean {f'predict MODEL {word}'!r}?"
    if word.endswith((".pth", ".pt", ".th", ".safetensors")):
        return f" Did you mean {f'inspect {word}'!r}?"
    return did_you_mean(word, known) or f" There are: {', '.join(known)}."
