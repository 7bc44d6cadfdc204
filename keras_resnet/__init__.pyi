"""The public names, and where each lives.

`lazy_loader` reads this file when the package is imported, and imports a module when one of its
names is first used; editors and type checkers read the same list.
"""

from . import layers as layers
from . import plots as plots
from .data.augment import (
    Augment as Augment,
)
from .data.augment import (
    Mix as Mix,
)
from .data.augment import (
    RandAugment as RandAugment,
)
from .data.augment import (
    TrivialAugmentWide as TrivialAugmentWide,
)
from .data.dataset import ImageDataset as ImageDataset
from .data.directory import image_dataset_from_directory as image_dataset_from_directory
from .data.preprocess import Preprocess as Preprocess
from .data.scan import ScanReport as ScanReport
from .data.scan import scan as scan
from .data.statistics import dataset_statistics as dataset_statistics
from .data.transforms import (
    ColorJitter as ColorJitter,
)
from .data.transforms import (
    RandomCrop as RandomCrop,
)
from .data.transforms import (
    RandomErasing as RandomErasing,
)
from .data.transforms import (
    RandomHorizontalFlip as RandomHorizontalFlip,
)
from .data.transforms import (
    RandomResizedCrop as RandomResizedCrop,
)
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    DataError as DataError,
)
from .errors import (
    InputError as InputError,
)
from .errors import (
    KerasResNetError as KerasResNetError,
)
from .errors import (
    MissingDependencyError as MissingDependencyError,
)
from .errors import (
    NotFoundError as NotFoundError,
)
from .errors import (
    VerificationError as VerificationError,
)
from .inference.calibration import Calibration as Calibration
from .inference.calibration import calibration as calibration
from .inference.evaluate import Evaluation as Evaluation
from .inference.evaluate import evaluate as evaluate
from .inference.explain import (
    Explanation as Explanation,
)
from .inference.explain import (
    iter_explanations as iter_explanations,
)
from .inference.explain import (
    overlay as overlay,
)
from .inference.explain import (
    save_overlay as save_overlay,
)
from .inference.grad_cam import grad_cam as grad_cam
from .inference.predict import (
    PredictionFile as PredictionFile,
)
from .inference.predict import (
    iter_predictions as iter_predictions,
)
from .inference.predict import (
    predict as predict,
)
from .inference.predict import (
    save_predictions as save_predictions,
)
from .inference.predict import (
    write_predictions as write_predictions,
)
from .inference.prediction_files import Prediction as Prediction
from .inference.serve import build_app as build_app
from .inference.serve import serve as serve
from .inference.service import Limits as Limits
from .models.blocks import conv_block as conv_block
from .models.blocks import identity_block as identity_block
from .models.features import feature_extractor as feature_extractor
from .models.files import (
    Conversion as Conversion,
)
from .models.files import (
    convert_file as convert_file,
)
from .models.files import (
    load_model as load_model,
)
from .models.image_model import ImageModel as ImageModel
from .models.rebuild import optimize_for_inference as optimize_for_inference
from .models.rebuild import to_stock as to_stock
from .models.summary import (
    ModelSummary as ModelSummary,
)
from .models.summary import (
    count_flops as count_flops,
)
from .models.summary import (
    summary as summary,
)
from .models.zoo import (
    AlexNet as AlexNet,
)
from .models.zoo import (
    AlexNetCIFAR10 as AlexNetCIFAR10,
)
from .models.zoo import (
    AlexNetPaper as AlexNetPaper,
)
from .models.zoo import (
    ResNet18 as ResNet18,
)
from .models.zoo import (
    ResNet20 as ResNet20,
)
from .models.zoo import (
    ResNet32 as ResNet32,
)
from .models.zoo import (
    ResNet34 as ResNet34,
)
from .models.zoo import (
    ResNet34CIFAR10 as ResNet34CIFAR10,
)
from .models.zoo import (
    ResNet44 as ResNet44,
)
from .models.zoo import (
    ResNet50 as ResNet50,
)
from .models.zoo import (
    ResNet50V1 as ResNet50V1,
)
from .models.zoo import (
    ResNet50V1ReLU as ResNet50V1ReLU,
)
from .models.zoo import (
    ResNet56 as ResNet56,
)
from .models.zoo import (
    ResNet101 as ResNet101,
)
from .models.zoo import (
    ResNet101V1 as ResNet101V1,
)
from .models.zoo import (
    ResNet110 as ResNet110,
)
from .models.zoo import (
    ResNet152 as ResNet152,
)
from .models.zoo import (
    ResNet152V1 as ResNet152V1,
)
from .models.zoo import (
    ResNeXt50_32x4d as ResNeXt50_32x4d,
)
from .models.zoo import (
    ResNeXt101_32x8d as ResNeXt101_32x8d,
)
from .models.zoo import (
    ResNeXt101_64x4d as ResNeXt101_64x4d,
)
from .models.zoo import (
    WideResNet50_2 as WideResNet50_2,
)
from .models.zoo import (
    WideResNet101_2 as WideResNet101_2,
)
from .models.zoo import (
    create_model as create_model,
)
from .recipes import RECIPES as RECIPES
from .recipes import Recipe as Recipe
from .reports.report import report as report
from .runtimes.export import ExportReport as ExportReport
from .runtimes.export import export as export
from .runtimes.runner import Runner as Runner
from .runtimes.select import open_runner as open_runner
from .training import ema as ema
from .training import optimizers as optimizers
from .training import schedules as schedules
from .training.ema import ModelEMA as ModelEMA
from .training.freeze import FreezeReport as FreezeReport
from .training.freeze import freeze as freeze
from .training.lr_finder import LrFinderResult as LrFinderResult
from .training.lr_finder import lr_find as lr_find
from .training.train import TrainResult as TrainResult
from .training.train import train as train
from .variants import conv_output_size as conv_output_size
from .variants import list_models as list_models
from .weights.checkpoint import (
    inspect_checkpoint as inspect_checkpoint,
)
from .weights.checkpoint import (
    read_checkpoint as read_checkpoint,
)
from .weights.download import weights_path as weights_path
from .weights.load import LoadReport as LoadReport
from .weights.load import load_torchvision as load_torchvision
from .weights.mapping import (
    expected_keys as expected_keys,
)
from .weights.mapping import (
    matching_variants as matching_variants,
)
from .weights.mapping import (
    save_torchvision as save_torchvision,
)
from .weights.mapping import (
    to_torchvision as to_torchvision,
)
from .weights.published import (
    imagenet_class_names as imagenet_class_names,
)
from .weights.published import (
    resolve_weights as resolve_weights,
)
from .weights.verify import VerifyReport as VerifyReport
from .weights.verify import verify as verify
from .weights.writing import write_checkpoint as write_checkpoint

__version__: str
__all__: list[str]
