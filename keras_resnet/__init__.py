"""ResNets and AlexNets for Keras 3, with torchvision's weights, pixels and arithmetic.

The public names and their homes are in `__init__.pyi`; none is imported before it is used.
"""

import lazy_loader

from keras_resnet._registration import register_with_keras

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_with_keras()
