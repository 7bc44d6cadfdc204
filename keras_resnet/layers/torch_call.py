"""How a layer is called on torch without Keras' dispatch, and what that must not pass by."""

from __future__ import annotations

import keras

BACKEND = keras.backend.backend()
TORCH_DTYPES = {}
if BACKEND == "torch":
    import torch

    TORCH_DTYPES = {
        name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")
    }
_LINEAR, _RELU = keras.activations.linear, keras.activations.relu


# Keras internals and torch's. All are read and never written; tests/layers/test_layers.py fails
# where a release stores them elsewhere.


def is_rematerialized(layer: keras.layers.Layer) -> bool:
    """Whether the layer was made in a `keras.RematScope`, so that Keras must wrap its call."""
    return layer._remat_mode is not None


def without_empty_masks(kwargs: dict) -> dict:
    """Arguments of a call without a mask of None: Keras notes them at the nodes of a graph."""
    if "mask" not in kwargs or any(m is not None for m in keras.tree.flatten(kwargs["mask"])):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != "mask"}


def has_global_hooks() -> bool:
    """Whether torch would run hooks around a call of every layer."""
    return torch.nn.modules.module._has_any_global_hook()


def needs_keras(layer: keras.layers.Layer) -> bool:
    """Whether `Layer.__call__` does more for the layer than what a list of kernels does as well.

    Losses of its output, LoRA, inputs left in their own dtype, rematerialization, torch's hooks,
    and a `call` that somebody has put in the place of the class's.
    """
    own = vars(layer)  # torch looks for what is not there in three dicts more
    return bool(
        layer.activity_regularizer is not None
        or own.get("lora_enabled", False)
        or not (layer.autocast or type(layer) is keras.layers.GroupNormalization)
        or is_rematerialized(layer)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "call" in own
    )


def cast_input(x, layer: keras.layers.Layer):
    """What `Layer.__call__` does to its inputs: floating ones to the layer's own dtype."""
    dtype = getattr(torch, layer.compute_dtype)
    return x.to(dtype) if x.dtype is not dtype and x.is_floating_point() else x


def in_stateless_scope() -> bool:
    """Whether a `keras.StatelessScope` is active, in which no variable may be written."""
    with keras.StatelessScope(initialize_variables=False) as scope:
        return scope.original_scope is not None


class DirectCall:
    """On torch, skips `Layer.__call__` where it has nothing to do.

    What it does for a built layer called on tensors of its own dtype, of the right shape and
    without a mask comes to nothing, but takes 0.1 ms a layer. torch's hooks still run. Of a class
    that extends one of ours nothing is known: it is called by Keras.
    """

    is_own = False  # whether the class is this package's own
    _takes_training = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.is_own = DirectCall in cls.__bases__

    def __call__(self, *args, **kwargs):
        kwargs = without_empty_masks(kwargs)
        if BACKEND == "torch" and self.is_own and self._nothing_to_prepare(args, kwargs):
            if not self._takes_training:
                kwargs = {}
            return torch.nn.Module.__call__(self, *args, **kwargs)
        if BACKEND == "torch":
            args = keras.tree.map_structure(self._sent, args)
        return super().__call__(*args, **kwargs)

    def _sent(self, x):
        """A tensor where Keras computes, as its own operations send theirs."""
        apart = isinstance(x, torch.Tensor) and is_plain(x) and self.built and not self._is_near(x)
        return keras.ops.convert_to_tensor(x) if apart else x

    def _is_near(self, x) -> bool:
        """Whether it lies on the device of the weights."""
        weights = getattr(self, "kernel", None)
        weights = getattr(self, "moving_mean", None) if weights is None else weights
        return weights is None or x.device == getattr(weights, "value", weights).device  # LoRA

    def forward(self, *args, **kwargs):
        """What `torch.nn.Module.__call__` runs between the hooks."""
        first = args[0] if args else None
        first = first[0] if type(first) in (list, tuple) else first
        if not self.is_own or not isinstance(first, torch.Tensor) or is_rematerialized(self):
            return super().forward(*args, **kwargs)
        return self.call(*args, **kwargs)

    def _nothing_to_prepare(self, args, kwargs) -> bool:
        if not self.built or len(args) != 1 or self.activity_regularizer is not None:
            return False
        if kwargs:
            if len(kwargs) > 1 or type(kwargs.get("training")) is not bool:
                return False
        elif self._takes_training:  # inherited from the layer around this one, which Keras knows
            return False
        dtype = TORCH_DTYPES.get(self.compute_dtype)
        for x in args[0] if type(args[0]) in (list, tuple) else args:
            if not (
                isinstance(x, torch.Tensor)
                and x.dtype is dtype
                and x.ndim == 4
                and self._fits(x.shape)
                and self._is_near(x)
                and getattr(x, "_keras_mask", None) is None  # of `Masking`, say
            ):
                return False  # Keras sends or converts it, refuses it with a good message, or warns
        return True

    def _fits(self, shape) -> bool:
        return True


def is_plain(x) -> bool:
    """Whether a tensor is one of memory, not one that a compiler or an exporter traces with."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def value_of(variable):
    """A variable's tensor as Keras' scopes (stateless, of a dtype) have it; a tensor as it is."""
    return getattr(variable, "value", variable)


def stored(variable):
    """The same where no scope is active, which `value` asks in a hundred times the time."""
    return getattr(variable, "_value", variable)


def torch_value(variable, dtype):
    """A variable's (or a tensor's) tensor at `dtype`, with its memory layout kept."""
    value = getattr(variable, "value", variable)
    return value if value.dtype is dtype else value.to(dtype)


def activate(activation, x):
    """The activation of a tensor that the calling layer made, so that ReLU may overwrite it."""
    if activation is None or activation is _LINEAR:
        return x
    if BACKEND == "torch" and activation is _RELU:
        return torch.relu_(x)
    return activation(x)
