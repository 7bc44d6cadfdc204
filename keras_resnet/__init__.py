"""ResNets and AlexNets for Keras 3, with torchvision's weights, pixels and arithmetic."""

import importlib

from keras_resnet._registration import register_with_keras

_PUBLIC = {
    "data.augment": ("Augment", "Mix", "RandAugment", "TrivialAugmentWide"),
    "data.dataset": ("ImageDataset", "dataset_statistics"),
    "data.directory": ("image_dataset_from_directory",),
    "data.preprocess": ("Preprocess",),
    "data.scan": ("ScanReport", "scan"),
    "data.transforms": (
        "ColorJitter", "RandomCrop", "RandomErasing", "RandomHorizontalFlip",
        "RandomResizedCrop",
    ),
    "errors": (
        "CheckpointError", "DataError", "InputError", "KerasResNetError",
        "MissingDependencyError", "NotFoundError", "VerificationError",
    ),
    "inference.calibration": ("Calibration", "calibration"),
    "inference.evaluate": ("Evaluation", "evaluate"),
    "inference.explain": ("Explanation", "iter_explanations", "overlay", "save_overlay"),
    "inference.grad_cam": ("grad_cam",),
    "inference.predict": (
        "PredictionFile", "iter_predictions", "predict", "save_predictions",
        "write_predictions",
    ),
    "inference.prediction_files": ("Prediction",),
    "inference.serve": ("build_app", "serve"),
    "inference.service": ("Limits",),
    "models.blocks": ("conv_block", "identity_block"),
    "models.features": ("feature_extractor",),
    "models.files": ("Conversion", "convert_file", "load_model"),
    "models.image_model": ("ImageModel",),
    "models.rebuild": ("optimize_for_inference", "to_stock"),
    "models.summary": ("ModelSummary", "count_flops", "summary"),
    "models.zoo": (
        "AlexNet", "AlexNetCIFAR10", "AlexNetPaper", "ResNeXt101_32x8d", "ResNeXt101_64x4d",
        "ResNeXt50_32x4d", "ResNet101", "ResNet101V1", "ResNet110", "ResNet152",
        "ResNet152V1", "ResNet18", "ResNet20", "ResNet32", "ResNet34", "ResNet34CIFAR10",
        "ResNet44", "ResNet50", "ResNet50V1", "ResNet50V1ReLU", "ResNet56",
        "WideResNet101_2", "WideResNet50_2", "create_model",
    ),
    "recipes": ("RECIPES", "Recipe"),
    "reports.report": ("report",),
    "runtimes.export": ("ExportReport", "export"),
    "runtimes.runner": ("Runner",),
    "runtimes.select": ("open_runner",),
    "training.ema": ("ModelEMA",),
    "training.freeze": ("FreezeReport", "freeze"),
    "training.lr_finder": ("LrFinderResult", "lr_find"),
    "training.train": ("TrainResult", "train"),
    "variants": ("conv_output_size", "list_models"),
    "weights.checkpoint": ("inspect_checkpoint", "read_checkpoint"),
    "weights.download": ("weights_path",),
    "weights.load": ("LoadReport", "load_torchvision"),
    "weights.mapping": ("expected_keys", "matching_variants", "save_torchvision", "to_torchvision"),
    "weights.published": ("imagenet_class_names", "resolve_weights"),
    "weights.verify": ("VerifyReport", "verify"),
    "weights.writing": ("write_checkpoint",),
}  # fmt: skip
# Modules that are used by their own name: kr.optimizers.SGD, kr.layers.Conv2D.
_MODULES = {
    "ema": "training.ema",
    "layers": "layers",
    "optimizers": "training.optimizers",
    "plots": "plots",
    "schedules": "training.schedules",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"keras_resnet.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"keras_resnet.{_MODULES[name]}")
    raise AttributeError(f"module 'keras_resnet' has no attribute {name!r}")


def __dir__():
    return __all__


register_with_keras()
