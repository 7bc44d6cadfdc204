"""Functional graphs on torch, run as flat lists of kernels.

Keras walks through a graph with tree operations and wraps each layer's call; together that takes
longer than torch needs to start the kernels. Here a graph is turned into a list once.

Two lists are made of it. The first runs the layers as they are, for training and for gradients;
between layers that know torch's NCHW order, feature maps stay in it, so that nothing is permuted
there and back. The second is for inference without gradients: batch norms are folded into the
convolutions, shortcut and ReLU are done while a convolution writes its output, and kernels lie
packed as oneDNN wants them. It is made anew whenever a weight has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization, Normalize
from keras_resnet.layers.pool import MaxPooling2D, ZeroPaddedShortcut
from keras_resnet.layers.torch_call import (
    has_torch_hooks,
    in_stateless_scope,
    is_plain,
    is_rematerialized,
    torch_value,
)
from keras_resnet.models.graph import (
    LINEAR,
    Fused,
    Step,
    count_users,
    fold_norm,
    fuse,
    graph_steps,
    is_relu,
)

_BACKEND = keras.backend.backend()
if _BACKEND == "torch":
    import torch
    import torch.nn.functional as F


class DirectGraph:
    """For a Functional `keras.Model`: on torch, runs its layers from lists made once.

    Feature maps that no later layer needs are let go at once. Put it in front of `keras.Model`
    among a class's bases. Other backends, symbolic tensors, masks and graphs of another kind (see
    `graph_steps`) are left to Keras.
    """

    def call(self, inputs, training=None, mask=None):
        """Runs the graph; arguments and result are those of `keras.Model.call`."""
        lists = None
        if (
            _BACKEND == "torch"
            and mask is None
            and (training is None or type(training) is bool)
            and isinstance(inputs, (torch.Tensor, np.ndarray))
            and inputs.ndim == len(self.inputs[0].shape)
            and not in_stateless_scope()
        ):
            lists = self._lists()
        if lists is None or not lists.are_valid():
            return super().call(inputs, training=training, mask=mask)
        # As Keras does it: not to the policy's dtype but to the input's own.
        x = ops.convert_to_tensor(inputs, dtype=self.inputs[0].dtype)
        if not training and not torch.is_grad_enabled() and is_plain(x):
            return lists.folded(x)
        if training:
            # An optimizer of torch's that is fused changes weights without torch's count of it.
            lists.folded.forget()
        return lists.whole(x, training)

    def _lists(self) -> _Lists | None:
        if "_flat_lists" not in self.__dict__:
            steps = graph_steps(self)
            # No state, hence nothing for Keras to track.
            object.__setattr__(self, "_flat_lists", None if steps is None else _Lists(steps))
        return self._flat_lists


class _Lists:
    """Both lists of one graph."""

    def __init__(self, steps: list[Step]):
        self.whole = _List(steps)
        self.folded = _Folded(steps)
        self._layers = [step.layer for step in steps]

    def are_valid(self) -> bool:
        """Whether no layer has something around its call that the lists would pass by."""
        return not any(has_torch_hooks(layer) or is_rematerialized(layer) for layer in self._layers)


# --- the list of layers --------------------------------------------------------------------------


class _Call(NamedTuple):
    """A step ready to run: `run(*inputs, training)`."""

    run: Callable[..., Any]
    sources: tuple[int, ...]
    target: int
    freed: tuple[int, ...]


class _List:
    """Runs steps, with feature maps in torch's order between those that know it.

    Args:
        steps: Layers as they are, and joined ones.
    """

    def __init__(self, steps: Sequence[Step | Fused]):
        kinds = {s.target: type(s) if isinstance(s, Fused) else type(s.layer) for s in steps}
        users = count_users(steps)
        nchw = {0: False}  # number of a value -> whether it is kept in torch's order
        self._calls = []
        self.convolutions = []  # the joined ones
        for step in steps:
            source = step.sources[-1]
            if isinstance(step, Fused):
                # No gradient will ask for the shortcut: its last user may overwrite it.
                own = source in step.freed and kinds.get(source) in (Fused, MaxPooling2D)
                run = _FusedConvolution(step, own)
                self.convolutions.append(run)
                wants = gives = step.conv.data_format == "channels_last"
            else:
                # Gradients need the inputs of convolutions and norms, not their outputs.
                own = users[source] == 1 and kinds.get(source) in (Conv2D, BatchNormalization)
                run, wants, gives = _runner(step, own)
            if wants is None:  # any order, but one
                wants = gives = all(nchw[s] for s in step.sources)
            orders = [_ORDERS.get((nchw[s], wants)) for s in step.sources]
            nchw[step.target] = gives
            if step is steps[-1]:
                run = _permuting(run, orders, _ORDERS.get((gives, False)))
            elif any(orders):
                run = _permuting(run, orders)
            self._calls.append(_Call(run, step.sources, step.target, step.freed))

    def __call__(self, x, training):
        values = {0: x}
        for run, sources, target, freed in self._calls:
            values[target] = run(*[values[i] for i in sources], training)
            for i in freed:
                del values[i]
        return values[target]


# (in torch's order, to be in torch's order) -> how to permute. A view: memory stays as it is.
_ORDERS = {(False, True): (0, 3, 1, 2), (True, False): (0, 2, 3, 1)}


def _permuting(run, before, after=None):
    def permuted(*args):
        *tensors, training = args
        given = [t if o is None else t.permute(o) for t, o in zip(tensors, before, strict=True)]
        y = run(*given, training)
        return y if after is None else y.permute(after)

    return permuted


def _runner(step: Step, may_overwrite: bool) -> tuple[Callable[..., Any], bool | None, bool | None]:
    """`(run, wants, gives)`: how a step is run, and whether its maps are in torch's order.

    `None` stands for any order. What Keras runs is in Keras' own; for channels-first layers that
    is torch's, and nothing is ever permuted.
    """
    layer, kind = step.layer, type(step.layer)
    last = getattr(layer, "data_format", None) == "channels_last"
    if kind is BatchNormalization and layer.is_of_maps:
        last = layer.axis in (-1, 3)

        def norm(x, *rest):
            shortcut = _cast(rest[0], layer) if len(rest) == 2 else None
            return layer.torch_nchw(_cast(x, layer), shortcut, bool(rest[-1]))

        return norm, last, last
    if kind is Conv2D or (kind is MaxPooling2D and layer.padding == "valid"):
        return lambda x, training: layer.torch_nchw(_cast(x, layer)), last, last
    if kind in (Normalize, ZeroPaddedShortcut):
        return lambda x, training: layer.torch_nchw(x), last, last
    if kind is keras.layers.GlobalAveragePooling2D and not layer.keepdims:
        return lambda x, training: _cast(x, layer).mean((2, 3)), last, False
    if is_relu(layer) and may_overwrite:
        return lambda x, training: torch.relu_(x), None, None
    if kind is keras.layers.Dense and len(layer.input_spec.axes) == 1:
        return _dense(layer), False, False
    if kind is keras.layers.Add and len(step.sources) == 2:
        return lambda x, y, training: _cast(x, layer) + _cast(y, layer), None, None
    return _by_keras(step), False, False


def _dense(layer):
    call = _by_keras(Step(layer, False, (), False, 0, ()))

    def run(x, training):
        if x.ndim != 2 or layer.quantization_mode or layer.lora_enabled or layer.bias is None:
            return call(x, training)
        x = _cast(x, layer)
        y = torch.addmm(torch_value(layer.bias, x.dtype), x, torch_value(layer.kernel, x.dtype))
        return y if layer.activation is LINEAR else layer.activation(y)

    return run


def _by_keras(step: Step):
    layer = step.layer

    def run(*args):
        *tensors, training = args
        given = tensors if step.listed else tensors[0]
        return layer(given, training=training) if step.takes_training else layer(given)

    return run


def _cast(x, layer):
    """What `Layer.__call__` does to its inputs: floating ones to the layer's own dtype."""
    dtype = getattr(torch, layer.compute_dtype)
    return x.to(dtype) if x.dtype is not dtype and x.is_floating_point() else x


class _Folded:
    """The list for inference; what it keeps of the weights is made anew when they change."""

    def __init__(self, steps: list[Step]):
        self._list = _List(fuse(steps))
        self._made_of: list[Any] | None = None
        self._variables = [v for c in self._list.convolutions for v in c.variables]
        self._norms = [c.norm for c in self._list.convolutions if c.norm is not None]

    def forget(self) -> None:
        """Makes what is kept of the weights anew at the next call."""
        self._made_of = None

    def __call__(self, x):
        tensors = [variable.value for variable in self._variables]
        # torch counts the changes of a tensor in place; `.data = ...` goes past the count, and so
        # do some kernels, after which layers and optimizers here count for themselves.
        made_of = [(t._version, t.data_ptr()) for t in tensors]
        made_of += [norm.changes[0] for norm in self._norms]
        if made_of != self._made_of:
            for convolution in self._list.convolutions:
                convolution.forget()
            self._made_of = made_of
        return self._list(x, False)


# The usual batch and the last, smaller one: each holds a copy of the weights.
_KEPT_SIZES = 2


class _FusedConvolution:
    """A convolution with its norm folded in, which also adds the shortcut and applies the ReLU.

    On a CPU one oneDNN primitive does it all; elsewhere the rest is done in place.
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
        self._weights: dict[Any, tuple[Any, Any, bool]] = {}

    def __call__(self, x, *rest):
        x = _cast(x, self._conv)
        # How a kernel is best packed depends on the input's size; what is packed for another is
        # packed anew at every call, which costs more than the convolution.
        key = x.shape, x.dtype, x.device
        weights = self._weights.get(key)
        if weights is None:
            weights = self._fold(x)
            kept = list(self._weights.items())[1 - _KEPT_SIZES :]
            self._weights = dict([*kept, (key, weights)])
        weight, bias, packed = weights
        shortcut = _cast(rest[0], self._conv) if self._has_shortcut else None
        pad, strides, dilation, groups = self._geometry
        relu = "relu" if self._relu else None
        if not packed:
            y = F.conv2d(x, weight, bias, strides, pad, dilation, groups)
            y = y if shortcut is None else y.add_(shortcut)
            return torch.relu_(y) if self._relu else y
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

    def _fold(self, x) -> tuple[Any, Any, bool]:
        """`(kernel, bias, packed)` for inputs like `x`."""
        conv, norm = self._conv, self.norm
        kernel = conv.kernel.value.permute(3, 2, 0, 1)
        bias = None if conv.bias is None else conv.bias.value
        if norm is not None:
            scale, bias = (torch.from_numpy(v).to(kernel) for v in fold_norm(norm, bias))
            kernel = kernel * scale[:, None, None, None]
        kernel = kernel.to(x.dtype).contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else bias.to(x.dtype)
        if not _has_onednn(x):
            return kernel, bias, False
        pad, strides, dilation, groups = self._geometry
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
            kernel.to_mkldnn(), pad, strides, dilation, groups, list(x.shape)
        )
        return packed, bias, True


def _has_onednn(x) -> bool:
    """Whether oneDNN's fused convolutions, which torch.compile also uses, run on such inputs.

    They are operators that torch has registered but does not document; without them `F.conv2d`
    does the same in three passes.
    """
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
