"""ResNets and AlexNets for Keras 3, with torchvision's weights, pixels and arithmetic."""

from keras_resnet.blocks import conv_block, identity_block
from keras_resnet.summary import count_flops, summary
from keras_resnet.specs import conv_output_size, list_models
from keras_resnet.zoo import *
