"""ResNets and AlexNets for Keras 3, with torchvision's weights, pixels and arithmetic.

The public names and their homes are in `__init__.pyi`; none is imported before it is used.
"""

import lazy_loader

from keras_resnet._registration import register_with_keras
from keras_resnet.system.errors import did_you_mean

__version__ = "0.1.0"
_import, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str):
    if name in __all__ or name.startswith("_"):
        return _import(name)
    try:
        return _import(name)  # a module
    except AttributeError as error:
        near = did_you_mean(name.replace("_", ""), (known.lower() for known in __all__))
        for known in __all__:  # as it is written
            near = near.replace(f"'{known.lower()}'", f"'{known}'")
        raise AttributeError(f"{error}.{near}", name=name) from None


register_with_keras()
