"""Functional graphs on torch, run as flat lists of kernels.

Keras walks through a graph with tree operations and wraps each layer's call; together that takes
longer than torch needs to start the kernels. Here a graph is turned into a list once.

Two lists are made of it. The first runs the layers as they are, for training, for gradients and
for a direct call; between layers that know torch's NCHW order, feature maps stay in it, so that
nothing is permuted there and back. The second is for `predict`, `evaluate` and their kind: batch
norms are folded into the convolutions, shortcut and ReLU are done while a convolution writes its
output, and kernels lie packed as oneDNN wants them. It is made anew whenever a weight has changed.

Only the contents of weights tell whether they have changed: `.data`, NumPy views and fused
optimizers go past torch's count of changes. To read them takes several percent of a batch of one,
which a direct call is not to pay for: it uses the weights as they are.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_resnet.layers.conv import Conv2D
from keras_resnet.layers.norm import BatchNormalization, Normalize
from keras_resnet.layers.pool import MaxPooling2D, ZeroPaddedShortcut
from keras_resnet.layers.torch_call import (
    cast_input,
    has_global_hooks,
    in_stateless_scope,
    is_plain,
    needs_keras,
    stored,
    torch_value,
)
from keras_resnet.models.graph import (
    LINEAR,
    Fused,
    Step,
    count_users,
    fuse,
    graph_steps,
    is_relu,
)
from keras_resnet.models.torch_fused import FusedConvolution

_BACKEND = keras.backend.backend()
if _BACKEND == "torch":
    import torch
    import torch.nn.functional as F


# The call of `predict`, `evaluate` or their kind that is going on: an object of its own for each.
_GOING_ON: contextvars.ContextVar[object | None] = contextvars.ContextVar("going on", default=None)


@contextlib.contextmanager
def going_on(call: object):
    """Weights are looked at once for all that runs under the same `call`, and then relied on."""
    token = _GOING_ON.set(call)
    try:
        yield
    finally:
        _GOING_ON.reset(token)


def _announced(name: str):
    """Keras' method of that name as a call that goes on, or as a part of one that does."""

    @functools.wraps(getattr(keras.Model, name))
    def method(self, *args, **kwargs):
        with going_on(_GOING_ON.get() or object()):
            return getattr(super(DirectGraph, self), name)(*args, **kwargs)

    return method


class DirectGraph:
    """For a Functional `keras.Model`: on torch, runs its layers from lists made once.

    Feature maps that no later layer needs are let go at once. Put it in front of `keras.Model`
    among a class's bases. Other backends, symbolic tensors, masks and graphs of another kind (see
    `graph_steps`) are left to Keras.
    """

    predict = _announced("predict")
    evaluate = _announced("evaluate")
    predict_on_batch = _announced("predict_on_batch")
    test_on_batch = _announced("test_on_batch")

    def call(self, inputs, training=None, mask=None):
        """Runs the graph; arguments and result are those of `keras.Model.call`."""
        lists = None
        if mask is None and (training is None or type(training) is bool):
            lists = self._lists_for(inputs)
        if lists is None:
            return super().call(inputs, training=training, mask=mask)
        # As Keras does it: not to the policy's dtype but to the input's own.
        x = ops.convert_to_tensor(inputs, dtype=self.inputs[0].dtype)
        if not training and not torch.is_grad_enabled() and is_plain(x):
            call = _GOING_ON.get()
            if call is not None:
                return lists.folded(x, call)
        return lists.whole(x, training)

    def _lists_for(self, inputs) -> _Lists | None:
        """The lists where they can run on such inputs."""
        if (
            _BACKEND == "torch"
            and isinstance(inputs, (torch.Tensor, np.ndarray))
            and inputs.ndim == len(self.inputs[0].shape)
            and not in_stateless_scope()
            and not has_global_hooks()
            and keras.distribution.distribution() is None
        ):
            return self._lists()
        return None

    def _lists(self) -> _Lists | None:
        """The lists as the layers now are; `None` where the graph is left to Keras."""
        if "_steps" not in self.__dict__:
            steps = graph_steps(self)
            if steps is not None and any(_may_mask(step.layer) for step in steps):
                steps = None
            # No state, hence nothing for Keras to track.
            object.__setattr__(self, "_steps", steps)
            object.__setattr__(self, "_flat_lists", None)
        if self._steps is None or any(needs_keras(step.layer) for step in self._steps):
            return None
        assumed = [
            _ASSUMED[type(s.layer)](s.layer) for s in self._steps if type(s.layer) in _ASSUMED
        ]
        if self._flat_lists is None or self._flat_lists.assumed != assumed:
            lists = _Lists(_List(self._steps), _Folded(self._steps), assumed)
            object.__setattr__(self, "_flat_lists", lists)
        return self._flat_lists


class _Lists(NamedTuple):
    """Both lists of one graph, and what was true of its layers when they were made."""

    whole: _List
    folded: _Folded
    assumed: list[Any]


# What lists are made by, and somebody may change afterwards. Not by `attrgetter`: older compilers
# of torch cannot read it.
_ASSUMED = {
    Conv2D: lambda c: (c.activation, c.padding, c.pad, c.strides, c.dilation_rate, c.groups),
    BatchNormalization: lambda n: (n.activation, n.epsilon, n.synchronized),
    MaxPooling2D: lambda p: p.padding,
    keras.layers.GroupNormalization: lambda n: (n.axis, n.groups, n.center, n.scale),
    keras.layers.Activation: lambda a: a.activation,
    keras.layers.ReLU: lambda r: (r.max_value, r.negative_slope, r.threshold),
    keras.layers.GlobalAveragePooling2D: lambda p: p.keepdims,
}
_MERGING = keras.layers.Add.__base__


def _may_mask(layer: keras.layers.Layer) -> bool:
    """Whether a mask may begin here, which Keras ties to tensors and the lists would lose."""
    if isinstance(layer, keras.Model):
        return any(_may_mask(inner) for inner in layer.layers)
    hands_on = isinstance(layer, _MERGING)  # the masks of its inputs, if they have any
    return not hands_on and type(layer).compute_mask is not keras.layers.Layer.compute_mask


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
        linear = {s.target for s in steps if isinstance(s, Step) and not _activated(s.layer)}
        # What other layers give may be what they were given, or a view of it.
        shared = {source for s in steps if kinds[s.target] not in _FRESH for source in s.sources}
        users = count_users(steps)
        nchw = {0: False}  # number of a value -> whether it is kept in torch's order
        self._calls = []
        self.convolutions = []  # the joined ones
        for step in steps:
            source = step.sources[-1]
            if isinstance(step, Fused):
                # No gradient will ask for the shortcut: its last user may overwrite it.
                own = source in step.freed and source not in shared
                own = own and kinds.get(source) in (Fused, MaxPooling2D)
                run = FusedConvolution(step, own)
                self.convolutions.append(run)
                wants = gives = step.conv.data_format == "channels_last"
            else:
                # Gradients need the inputs of convolutions and norms, not their outputs, but
                # those of activations.
                own = users[source] == 1 and source in linear
                own = own and kinds[source] in (Conv2D, BatchNormalization)
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


_FRESH = (
    Fused, Conv2D, BatchNormalization, MaxPooling2D, keras.layers.Add, keras.layers.Concatenate,
    keras.layers.GlobalAveragePooling2D, keras.layers.GroupNormalization, keras.layers.Dense,
)  # fmt: skip


def _activated(layer) -> bool:
    return getattr(layer, "activation", LINEAR) not in (LINEAR, None)


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
            shortcut = cast_input(rest[0], layer) if len(rest) == 2 else None
            return layer.torch_nchw(cast_input(x, layer), shortcut, bool(rest[-1]), stored)

        return norm, last, last
    if kind is Conv2D:
        return lambda x, training: layer.torch_nchw(cast_input(x, layer), stored), last, last
    if kind is MaxPooling2D and layer.padding == "valid":
        return lambda x, training: layer.torch_nchw(cast_input(x, layer)), last, last
    if kind in (Normalize, ZeroPaddedShortcut):
        return lambda x, training: layer.torch_nchw(x), last, last
    if kind is keras.layers.GroupNormalization and layer.input_spec.ndim == 4:
        last = layer.axis in (-1, 3)
        if layer.center and layer.scale and layer.groups > 0:
            return _group_norm(layer), last, last
    if kind is keras.layers.GlobalAveragePooling2D:
        kept = layer.keepdims
        return lambda x, training: cast_input(x, layer).mean((2, 3), kept), last, last and kept
    if is_relu(layer):
        relu = torch.relu_ if may_overwrite else torch.relu
        return lambda x, training: relu(cast_input(x, layer)), None, None
    if kind is keras.layers.Activation and layer.activation is keras.activations.sigmoid:
        return lambda x, training: torch.sigmoid(cast_input(x, layer)), None, None
    if kind is keras.layers.Multiply and len(step.sources) == 2:
        return lambda x, y, training: cast_input(x, layer) * cast_input(y, layer), None, None
    if kind is keras.layers.Dense and len(layer.input_spec.axes) == 1:
        return _dense(layer), False, False
    if kind is keras.layers.Add and len(step.sources) == 2:
        return lambda x, y, training: cast_input(x, layer) + cast_input(y, layer), None, None
    return _by_keras(step), False, False


def _group_norm(layer):
    def run(x, training):
        wide = x if x.itemsize >= 4 else x.float()  # as Keras and torch's autocast do it
        gamma, beta = (torch_value(v, wide.dtype) for v in (layer.gamma, layer.beta))
        return cast_input(F.group_norm(wide, layer.groups, gamma, beta, layer.epsilon), layer)

    return run


def _dense(layer):
    call = _by_keras(Step(layer, False, (), False, 0, ()))

    def run(x, training):
        if x.ndim != 2 or layer.quantization_mode or layer.lora_enabled or layer.bias is None:
            return call(x, training)
        x = cast_input(x, layer)
        kernel, bias = torch_value(stored(layer.kernel), x.dtype), stored(layer.bias)
        y = torch.addmm(torch_value(bias, x.dtype), x, kernel)
        return y if layer.activation is LINEAR else layer.activation(y)

    return run


def _by_keras(step: Step):
    layer = step.layer

    def run(*args):
        *tensors, training = args
        given = tensors if step.listed else tensors[0]
        return layer(given, training=training) if step.takes_training else layer(given)

    return run


class _Folded:
    """The list for inference; what it keeps of the weights is made anew when they change."""

    def __init__(self, steps: list[Step]):
        self._list = _List(fuse(steps))
        self._variables = [v for c in self._list.convolutions for v in c.variables]
        self._call: object | None = None  # the one in which the weights were last looked at
        self._versions: list[Any] = []
        self._contents: Any = None

    def __call__(self, x, call):
        tensors = [stored(v) for v in self._variables]
        # Also within a call: a callback may assign weights.
        versions = [(t._version, t.data_ptr()) for t in tensors]
        if call is not self._call or versions != self._versions:
            contents = _contents(tensors)
            # Infinities are no equals here: behind one, anything may have changed.
            if self._contents is None or not (contents - self._contents == 0).all():
                for convolution in self._list.convolutions:
                    convolution.forget()
            self._call, self._versions, self._contents = call, versions, contents
        return self._list(x, False)


def _contents(tensors) -> Any:
    """What weights are, as far as rounding lets an output tell: one vector, of few numbers.

    Vectors are in it as they are, kernels by the product of each row with fixed numbers.
    """
    found = []
    for t in tensors:
        if t.ndim > 1:
            t = t.reshape(-1, t.shape[-1])
            t = t if t.itemsize >= 4 else t.float()
            t = torch.mv(t, _coefficients(t.shape[-1], t.dtype, t.device))
        found.append(t)
    return torch.cat(found).double().cpu() if found else torch.zeros(0)


@functools.lru_cache(maxsize=32)
def _coefficients(count: int, dtype, device) -> Any:
    """Numbers of 1..2 with random signs: none of them makes a change small."""
    numbers = np.random.default_rng(0).uniform(-1, 1, count)
    return torch.tensor(numbers + np.sign(numbers), dtype=dtype, device=device)
