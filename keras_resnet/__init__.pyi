"""The public names, and where each lives.

`lazy_loader` reads this file when the package is imported, and imports a module when one of its
names is first used; editors and type checkers read the same list.
"""

from . import layers as layers, plots as plots
from .data.augment import (
    Augment as Augment,
    AugMix as AugMix,
    AutoAugment as AutoAugment,
    RandAugment as RandAugment,
    TrivialAugmentWide as TrivialAugmentWide,
)
from .data.dataset import ImageDataset as ImageDataset
from .data.directory import image_dataset_from_directory as image_dataset_from_directory
from .data.mixing import Mix as Mix
from .data.opening import image_source as image_source
from .data.packing import Packed as Packed, pack as pack
from .data.preprocess import Preprocess as Preprocess
from .data.scan import ScanReport as ScanReport
from .data.statistics import dataset_statistics as dataset_statistics
from .data.transforms import (
    ColorJitter as ColorJitter,
    RandomCrop as RandomCrop,
    RandomErasing as RandomErasing,
    RandomHorizontalFlip as RandomHorizontalFlip,
    RandomResizedCrop as RandomResizedCrop,
)
from .data.warps import (
    GaussianBlur as GaussianBlur,
    RandomAffine as RandomAffine,
    RandomGrayscale as RandomGrayscale,
    RandomRotation as RandomRotation,
    RandomVerticalFlip as RandomVerticalFlip,
)
from .inference.batches import BatchPredictor as BatchPredictor
from .inference.calibrate import Calibrated as Calibrated, calibrate as calibrate
from .inference.calibration import (
    Calibration as Calibration,
    Evaluation as Evaluation,
    calibration as calibration,
)
from .inference.embed import Embeddings as Embeddings, embed as embed
from .inference.evaluate import evaluate as evaluate
from .inference.explain import (
    Explanation as Explanation,
    iter_explanations as iter_explanations,
    overlay as overlay,
    save_overlay as save_overlay,
)
from .inference.grad_cam import grad_cam as grad_cam
from .inference.predict import (
    PredictionFile as PredictionFile,
    iter_predictions as iter_predictions,
    predict as predict,
    write_predictions as write_predictions,
)
from .inference.prediction_files import (
    Prediction as Prediction,
    save_predictions as save_predictions,
)
from .inference.serve import build_app as build_app, serve as serve
from .inference.service import Limits as Limits
from .inference.suspects import scan as scan
from .models.blocks import conv_block as conv_block, identity_block as identity_block
from .models.features import feature_extractor as feature_extractor
from .models.files import (
    Conversion as Conversion,
    convert_file as convert_file,
    load_model as load_model,
)
from .models.image_model import ImageModel as ImageModel
from .models.rebuild import optimize_for_inference as optimize_for_inference, to_stock as to_stock
from .models.summary import (
    ModelSummary as ModelSummary,
    count_flops as count_flops,
    summary as summary,
)
from .models.zoo import (
    AlexNet as AlexNet,
    AlexNetCIFAR10 as AlexNetCIFAR10,
    AlexNetPaper as AlexNetPaper,
    ResNet10T as ResNet10T,
    ResNet14T as ResNet14T,
    ResNet18 as ResNet18,
    ResNet18D as ResNet18D,
    ResNet20 as ResNet20,
    ResNet26D as ResNet26D,
    ResNet26T as ResNet26T,
    ResNet32 as ResNet32,
    ResNet34 as ResNet34,
    ResNet34CIFAR10 as ResNet34CIFAR10,
    ResNet34D as ResNet34D,
    ResNet44 as ResNet44,
    ResNet50 as ResNet50,
    ResNet50D as ResNet50D,
    ResNet50GN as ResNet50GN,
    ResNet50V1 as ResNet50V1,
    ResNet50V1ReLU as ResNet50V1ReLU,
    ResNet50V2 as ResNet50V2,
    ResNet56 as ResNet56,
    ResNet101 as ResNet101,
    ResNet101D as ResNet101D,
    ResNet101V1 as ResNet101V1,
    ResNet101V2 as ResNet101V2,
    ResNet110 as ResNet110,
    ResNet152 as ResNet152,
    ResNet152D as ResNet152D,
    ResNet152V1 as ResNet152V1,
    ResNet152V2 as ResNet152V2,
    ResNetV2_18 as ResNetV2_18,
    ResNetV2_34 as ResNetV2_34,
    ResNetV2_50 as ResNetV2_50,
    ResNetV2_101 as ResNetV2_101,
    ResNetV2_152 as ResNetV2_152,
    ResNeXt50_32x4d as ResNeXt50_32x4d,
    ResNeXt101_32x8d as ResNeXt101_32x8d,
    ResNeXt101_64x4d as ResNeXt101_64x4d,
    SEResNet50 as SEResNet50,
    SEResNeXt50_32x4d as SEResNeXt50_32x4d,
    WideResNet50_2 as WideResNet50_2,
    WideResNet101_2 as WideResNet101_2,
    create_model as create_model,
)
from .recipes import RECIPES as RECIPES, Recipe as Recipe
from .reports.report import report as report
from .runtimes.export import ExportReport as ExportReport, export as export
from .runtimes.runner import Runner as Runner
from .runtimes.select import open_runner as open_runner
from .system.device import set_tf32 as set_tf32
from .system.errors import (
    CheckpointError as CheckpointError,
    DataError as DataError,
    InputError as InputError,
    KerasResNetError as KerasResNetError,
    MissingDependencyError as MissingDependencyError,
    NotFoundError as NotFoundError,
    VerificationError as VerificationError,
)
from .training import ema as ema, optimizers as optimizers, schedules as schedules
from .training.ema import ModelEMA as ModelEMA
from .training.folds import FoldsResult as FoldsResult, cross_validate as cross_validate
from .training.freeze import FreezeReport as FreezeReport, freeze as freeze
from .training.lr_finder import LrFinderResult as LrFinderResult, lr_find as lr_find
from .training.sheet import augment_sheet as augment_sheet
from .training.train import TrainResult as TrainResult, train as train
from .variants import conv_output_size as conv_output_size, list_models as list_models
from .weights.checkpoint import (
    inspect_checkpoint as inspect_checkpoint,
    read_checkpoint as read_checkpoint,
)
from .weights.download import weights_path as weights_path
from .weights.load import LoadReport as LoadReport, load_torchvision as load_torchvision
from .weights.mapping import (
    expected_keys as expected_keys,
    save_torchvision as save_torchvision,
    to_torchvision as to_torchvision,
)
from .weights.matching import matching_variants as matching_variants
from .weights.published import (
    imagenet_class_names as imagenet_class_names,
    resolve_weights as resolve_weights,
)
from .weights.verify import VerifyReport as VerifyReport, verify as verify
from .weights.writing import write_checkpoint as write_checkpoint

__version__: str
__all__: list[str]
