"""ResNets and AlexNets for Keras 3, with torchvision's weights, pixels and arithmetic."""

import importlib

from keras_resnet._lazy import register_with_keras

_PUBLIC = {
    "augment": (
        "Augment", "ColorJitter", "Mix", "RandAugment", "RandomCrop", "RandomErasing",
        "RandomHorizontalFlip", "RandomResizedCrop", "TrivialAugmentWide",
    ),
    "blocks": ("conv_block", "identity_block"),
    "checkpoint": ("inspect_checkpoint", "read_checkpoint", "write_checkpoint"),
    "convert": (
        "LoadReport",
        "VerifyReport",
        "expected_keys",
        "load_torchvision",
        "matching_variants",
        "save_torchvision",
        "to_torchvision",
        "verify",
    ),
    "data": ("ImageDataset", "dataset_statistics", "image_dataset_from_directory"),
    "ema": ("ModelEMA",),
    "engines": ("Runner", "open_runner"),
    "errors": (
        "CheckpointError", "DataError", "InputError", "KerasResNetError",
        "MissingDependencyError", "NotFoundError", "VerificationError",
    ),
    "inference": ("optimize_for_inference",),
    "interchange": ("Conversion", "convert_file"),
    "evaluation": ("Evaluation", "evaluate", "load_model"),
    "explain": ("Explanation", "grad_cam", "iter_explanations", "overlay", "save_overlay"),
    "exporting": ("ExportReport", "export"),
    "hub": ("imagenet_class_names", "resolve_weights", "weights_path"),
    "lr_finder": ("LrFinderResult", "lr_find"),
    "model": ("ImageModel",),
    "predictions": (
        "Prediction", "PredictionFile", "iter_predictions", "predict", "save_predictions",
        "write_predictions",
    ),
    "preprocess": ("Preprocess",),
    "recipes": ("RECIPES", "Recipe"),
    "reliability": ("Calibration", "calibration"),
    "reporting": ("report",),
    "scanning": ("ScanReport", "scan"),
    "serving": ("Limits", "build_app", "serve"),
    "specs": ("conv_output_size", "list_models"),
    "costs": ("ModelSummary", "count_flops", "summary"),
    "stock": ("to_stock",),
    "training": ("TrainResult", "train"),
    "transfer": ("FreezeReport", "freeze"),
    "zoo": (
        "AlexNet", "AlexNetCIFAR10", "AlexNetPaper", "ResNeXt50_32x4d", "ResNeXt101_32x8d",
        "ResNeXt101_64x4d", "ResNet18", "ResNet20", "ResNet32", "ResNet34", "ResNet34CIFAR10",
        "ResNet44", "ResNet50", "ResNet50V1", "ResNet50V1ReLU", "ResNet56", "ResNet101",
        "ResNet101V1", "ResNet110", "ResNet152", "ResNet152V1", "WideResNet50_2",
        "WideResNet101_2", "create_model", "feature_extractor",
    ),
}  # fmt: skip
# Modules that are used by their own name: kr.optimizers.SGD, kr.layers.Conv2D.
_MODULES = ("ema", "layers", "optimizers", "plots", "schedules")
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"keras_resnet.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"keras_resnet.{name}")
    raise AttributeError(f"module 'keras_resnet' has no attribute {name!r}")


def __dir__():
    return __all__


register_with_keras()
