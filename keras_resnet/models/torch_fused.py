"""A convolution with its batch norm folded in, its shortcut and its ReLU, on torch: one kernel.

oneDNN's and cuDNN's fused convolutions, which torch's own compilers use, are operators that it has
registered but does not document; without them `F.conv2d` does the same in three passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_resnet.layers.conv import torch_kernel
from keras_resnet.layers.torch_call import cast_input
from keras_resnet.models.graph import Fused, fold_norm

if keras.backend.backend() == "torch":
    import torch
    import torch.nn.functional as F

# The usual batch and the last, smaller one: each holds a copy of the weights.
_KEPT_SIZES = 2


class FusedConvolution:
    """A convolution with its norm folded in, which also adds the shortcut and applies the ReLU.

    Where oneDNN (CPU) or cuDNN (CUDA) has it as one kernel, that is run; elsewhere the rest is done
    in place.
    """

    def __init__(self, step: Fused, may_overwrite: bool):
        self._conv, self.norm, self._relu = step.conv, step.norm, step.relu
        self._has_shortcut = len(step.sources) == 2
        self._may_overwrite = may_overwrite and self._has_shortcut
        pad, strides, dilation = step.conv.pad, step.conv.strides, step.conv.dilation_rate
        self._geometry = list(pad), list(strides), list(dilation), step.conv.groups
        self.forget()

    @property
    def variables(self) -> list:
        """What the folded weights are made of."""
        layers = [self._conv] if self.norm is None else [self._conv, self.norm]
        return [variable for layer in layers for variable in layer.variables]

    def forget(self) -> None:
        """Makes the folded weights anew at the next call."""
        self._weights: dict[Any, tuple[Any, Any, Callable]] = {}

    def __call__(self, x, *rest):
        """The outputs for an input, and for the shortcut where there is one; both in NCHW."""
        x = cast_input(x, self._conv)
        # How oneDNN best packs a kernel depends on the input's size; what is packed for another is
        # packed anew at every call, which costs more than the convolution. Others fit any size.
        key = x.shape, x.dtype, x.device
        known = self._weights
        weights = known.get(key) or known.get(key[1:])
        if weights is None:
            weights = self._fold(x)
            kept = list(known.items())[1 - _KEPT_SIZES :]
            packed = weights[2] == self._onednn
            if self._weights is known:  # no other thread has seen weights change meanwhile
                self._weights = dict([*kept, (key if packed else key[1:], weights)])
        weight, bias, run = weights
        return run(x, weight, bias, cast_input(rest[0], self._conv) if self._has_shortcut else None)

    def _in_passes(self, x, weight, bias, shortcut):
        pad, strides, dilation, groups = self._geometry
        y = F.conv2d(x, weight, bias, strides, pad, dilation, groups)
        y = y if shortcut is None else y.add_(shortcut)
        return torch.relu_(y) if self._relu else y

    def _cudnn(self, x, weight, bias, shortcut):
        pad, strides, dilation, groups = self._geometry
        try:
            if shortcut is None:
                return torch.cudnn_convolution_relu(x, weight, bias, strides, pad, dilation, groups)
            return torch.cudnn_convolution_add_relu(
                x, weight, shortcut, 1.0, bias, strides, pad, dilation, groups
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # cuDNN has no such kernel for these shapes
            for key, known in list(self._weights.items()):
                if known[0] is weight:
                    self._weights[key] = weight, bias, self._in_passes
            return self._in_passes(x, weight, bias, shortcut)

    def _onednn(self, x, weight, bias, shortcut):
        pad, strides, dilation, groups = self._geometry
        relu = "relu" if self._relu else None
        run = torch.ops.mkldnn._convolution_pointwise
        if shortcut is None:
            return run.default(
                x, weight, bias, pad, strides, dilation, groups, relu or "none", [], ""
            )
        if self._may_overwrite:
            run = torch.ops.mkldnn._convolution_pointwise_.binary
            return run(
                shortcut, x, weight, bias, pad, strides, dilation, groups, "add", 1.0, relu, [], ""
            )
        return run.binary(
            x, shortcut, weight, bias, pad, strides, dilation, groups, "add", 1.0, relu, [], ""
        )

    def _fold(self, x) -> tuple[Any, Any, Callable]:
        """`(kernel, bias, how to run them)` for inputs like `x`."""
        conv, norm = self._conv, self.norm
        kernel = torch_kernel(conv.kernel, conv.kernel.value.dtype)
        bias = None if conv.bias is None else conv.bias.value
        if norm is not None:
            scale, bias = (torch.from_numpy(v).to(kernel) for v in fold_norm(norm, bias))
            kernel = kernel * scale[:, None, None, None]
        kernel = kernel.to(x.dtype).contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else bias.to(x.dtype)
        if self._relu and _has_cudnn(x):
            return kernel, bias, self._cudnn
        if not _has_onednn(x):
            return kernel, bias, self._in_passes
        pad, strides, dilation, groups = self._geometry
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
            kernel.to_mkldnn(), pad, strides, dilation, groups, list(x.shape)
        )
        return packed, bias, self._onednn


def _has_cudnn(x) -> bool:
    """Whether cuDNN's fused convolutions run on such inputs."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and torch.backends.cudnn.enabled
        and torch.backends.cudnn.is_available()
        and hasattr(torch, "cudnn_convolution_add_relu")
    )


def _has_onednn(x) -> bool:
    """Whether oneDNN's fused convolutions run on such inputs."""
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and (
            x.dtype is torch.float32
            or (x.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )
