"""Stochastic gradient descent with the arithmetic of `torch.optim.SGD`, on every backend.

Keras' own SGD differs from torch's in three ways that move the result of a recipe: weight decay
shrinks the weights outside the momentum (about 9 times less decay at momentum 0.9), the learning
rate is folded into the velocity (so that they differ again whenever the rate changes), and there
is no dampening.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet.layers.torch_call import stored
from keras_resnet.system.errors import InputError, between, did_you_mean
from keras_resnet.training.schedules import Schedule


@keras.saving.register_keras_serializable(package="keras_resnet")
class SGD(keras.optimizers.Optimizer):
    """`torch.optim.SGD` as a Keras optimizer.

    One update of a weight `w` with gradient `g` (torch/optim/sgd.py):

        g = g + weight_decay * w
        buffer = g                                        at the first update of this weight
        buffer = momentum * buffer + (1 - dampening) * g  afterwards
        g = g + momentum * buffer                         with `nesterov`, otherwise g = buffer
        w = w - learning_rate * g

    Where the reference is silent, Keras' rules hold: `gradient_accumulation_steps` takes the
    **mean** of the gradients of so many batches (equal to one batch of all of them, where the
    batches are equally large), then clips it, then decays; learning-rate schedules count batches,
    not updates. `global_clipnorm` is `torch.nn.utils.clip_grad_norm_`, `clipnorm` clips every
    weight by itself. `keras.optimizers.LossScaleOptimizer` may be put around it. Keras' `use_ema`
    averages trainable weights only; `keras_resnet.training.ema.ModelEMA` averages all.

    Args:
        learning_rate: a number, a `LearningRateSchedule` (see `training.schedules`) or a
            callable without arguments.
        momentum: factor of the buffer; 0 keeps no buffer.
        dampening: part of the gradient kept out of the buffer.
        weight_decay: L2 penalty, added to the gradient before the momentum.
        nesterov: Nesterov's momentum; needs `momentum > 0` and `dampening == 0`, as in torch.
        decay_norms: whether `weight_decay` also holds for `gamma` and `beta` of normalisation
            layers; False is torchvision's `--norm-weight-decay 0`.
        decay_biases: whether it holds for biases, `beta` included, which torch calls `bias` as
            well; False is torchvision's `--bias-weight-decay 0`.
        rate_multipliers: `{pattern: factor}`: the learning rate of every weight in whose path
            (`"layer1_0_conv1/kernel"`) the regular expression `pattern` is found is multiplied by
            `factor`. The first pattern that is found counts.
        **kwargs: what every Keras optimizer takes: `clipnorm`, `clipvalue`, `global_clipnorm`,
            `use_ema`, `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
            `gradient_accumulation_steps`, `name`.

    Raises:
        InputError: where an argument cannot work, or (when the optimizer first sees the weights)
            a pattern of `rate_multipliers` is found in none of their paths.

    Examples:
        >>> optimizer = SGD(0.1, momentum=0.9, weight_decay=1e-4, decay_norms=False)
        >>> weight = keras.Variable([1.0], name="kernel")
        >>> optimizer.apply([ops.convert_to_tensor([0.5])], [weight])
        >>> round(float(ops.convert_to_numpy(weight)[0]), 6)
        0.94999
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | None = 0.0,
        nesterov: bool = False,
        decay_norms: bool = True,
        decay_biases: bool = True,
        rate_multipliers: Mapping[str, float] | None = None,
        **kwargs: Any,
    ):
        if isinstance(learning_rate, int):
            learning_rate = float(learning_rate)
        weight_decay = weight_decay or 0.0
        for name, value in [("learning_rate", learning_rate), ("weight_decay", weight_decay)]:
            if isinstance(value, (int, float)):
                between(name, value, 0)
        if not 0 <= momentum <= 1:  # Keras' words
            raise InputError(f"`momentum` must be a float between [0, 1]. Received: {momentum!r}.")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise InputError(
                "nesterov=True needs a momentum above 0 and no dampening. "
                f"Received: momentum={momentum!r}, dampening={dampening!r}."
            )
        # Keras would apply a decay that it is told of, in its own way: it is told of none.
        super().__init__(learning_rate=learning_rate, weight_decay=None, **kwargs)
        self.momentum, self.dampening = float(momentum), float(dampening)
        self.coupled_weight_decay, self.nesterov = float(weight_decay), bool(nesterov)
        self.decay_norms, self.decay_biases = bool(decay_norms), bool(decay_biases)
        self.rate_multipliers = {str(k): float(v) for k, v in (rate_multipliers or {}).items()}
        self._host = _HostValues()
        self._stateless = False

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the momentum buffers and settles decay and rate of each variable."""
        if self.built:
            return
        paths = [_path(v) for v in variables]
        self._check_patterns(paths)
        super().build(variables)
        self._decays = tuple(self._decay_of(v) for v in variables)
        self._factors = tuple(self._factor_of(path) for path in paths)
        # Plain zeros serve as torch's missing buffer, except that dampening must skip the first
        # gradient: only then is it recorded which buffers have begun.
        self.momentums, self._begun = [], []
        if self.momentum:
            self.momentums = self.add_optimizer_variables(variables, "momentum")
        if self.momentum and self.dampening:
            self._begun = [
                self.add_variable((), dtype="bool", name=f"begun_{i}")
                for i in range(len(variables))
            ]

    def _check_patterns(self, paths: Sequence[str]) -> None:
        for pattern in self.rate_multipliers:
            if not any(re.search(pattern, path) for path in paths):
                listed = ", ".join(paths[:6]) + (", ..." if len(paths) > 6 else "")
                layers = {path.rpartition("/")[0] for path in paths}
                raise InputError(
                    f"rate_multipliers: {pattern!r} is found in the path of none of the "
                    f"{len(paths)} trainable weights ({listed})."
                    + did_you_mean(pattern, [*paths, *layers])
                )

    def _factor_of(self, path: str) -> float:
        found = (f for pattern, f in self.rate_multipliers.items() if re.search(pattern, path))
        return next(found, 1.0)

    def _decay_of(self, variable: Any) -> float:
        kind = _path(variable).rpartition("/")[2]
        of_norm, of_bias = kind in ("gamma", "beta"), kind in ("bias", "beta")
        excluded = (of_norm and not self.decay_norms) or (of_bias and not self.decay_biases)
        # Keras' `exclude_from_weight_decay` keeps its word as well.
        if excluded or not self._use_weight_decay(variable):
            return 0.0
        return self.coupled_weight_decay

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Adds a slot for a variable; on torch it gets the strides of the variable's memory.

        Elementwise arithmetic on two tensors with different strides is several times slower.
        """
        if keras.backend.backend() == "torch" and initializer == "zeros":
            import torch

            reference = reference_variable.value

            def initializer(shape, dtype):
                return torch.zeros_like(reference, memory_format=torch.preserve_format)

        return super().add_variable_from_reference(reference_variable, name, initializer)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable, in the terms of `keras.ops`."""
        index = self._get_variable_index(variable)
        dtype = variable.dtype
        gradient = ops.cast(gradient, dtype)
        rate = ops.cast(learning_rate, dtype)
        if self._factors[index] != 1.0:
            rate = ops.multiply(rate, self._factors[index])
        if self._decays[index]:
            gradient = ops.add(gradient, ops.multiply(variable, self._decays[index]))
        if self.momentum:
            buffer = self.momentums[index]
            added = gradient
            if self.dampening:
                begun = ops.convert_to_tensor(self._begun[index])
                damped = ops.multiply(gradient, 1.0 - self.dampening)
                added = ops.where(begun, damped, gradient)
                self.assign(self._begun[index], ops.ones_like(begun))
            value = ops.add(ops.multiply(buffer, self.momentum), added)
            self.assign(buffer, value)
            if self.nesterov:
                gradient = ops.add(gradient, ops.multiply(value, self.momentum))
            else:
                gradient = value
        self.assign_sub(variable, ops.multiply(gradient, rate))

    # Three methods of Keras' internals are overridden. Here its own optimizers for torch update all
    # variables in one go; were it renamed, `update_step` would do the same, slower.
    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if keras.backend.backend() != "torch" or self._stateless:
            super()._backend_update_step(grads, trainable_variables, learning_rate)
        else:
            self._torch_update(grads, trainable_variables, learning_rate)

    def _backend_apply_gradients(self, grads, trainable_variables):
        every = self.gradient_accumulation_steps
        if not every or self.use_ema or not self._on_eager_torch():
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        # The same; Keras would ask the device at every step whether it is the one to update at.
        import torch

        indices = map(self._get_variable_index, trainable_variables)
        held = [self._accumulated_gradients[i].value for i in indices]
        with torch.no_grad():
            torch._foreach_add_(held, [g.to(h.dtype) for g, h in zip(grads, held, strict=True)])
            if (self._host.read(self._iterations) + 1) % every:
                return
            self.gradient_accumulation_steps = None
            try:
                mean = torch._foreach_div(held, every)
                super()._backend_apply_gradients(list(mean), trainable_variables)
            finally:
                self.gradient_accumulation_steps = every
            torch._foreach_zero_(held)

    # TensorFlow never forgets the gradient function of a sum over replicas, and that holds the
    # graph of the step: the weights and buffers of every trained model stayed in memory.
    def _all_reduce_sum_gradients(self, grads_and_vars):
        if self._distribution_strategy.num_replicas_in_sync == 1:
            return grads_and_vars
        return super()._all_reduce_sum_gradients(grads_and_vars)

    def _torch_update(self, gradients, variables, learning_rate) -> None:
        """Updates all variables with torch's multi-tensor SGD, one call for each rate and decay."""
        import torch
        from torch.optim.sgd import sgd

        compiling = torch.compiler.is_compiling()
        rate = ops.convert_to_tensor(learning_rate) if compiling else self._host_rate()
        groups: dict[tuple[float, float], list[tuple]] = {}
        for gradient, variable in zip(gradients, variables, strict=True):
            index = self._get_variable_index(variable)
            weight = stored(variable)
            if gradient.dtype is not weight.dtype:
                gradient = gradient.to(weight.dtype)
            buffer = stored(self.momentums[index]) if self.momentum else None
            if self._begun and not self._host.read(self._begun[index]):
                buffer = None  # torch then begins it with the gradient
            members = groups.setdefault((self._decays[index], self._factors[index]), [])
            members.append((weight, gradient, buffer, index))

        with torch.no_grad():
            for (decay, factor), members in groups.items():
                weights, grads, buffers, _ = map(list, zip(*members, strict=True))
                fused = not compiling and _can_fuse(weights, grads, buffers)
                sgd(
                    weights, grads, buffers, lr=rate * factor, weight_decay=decay,
                    momentum=self.momentum, dampening=self.dampening, nesterov=self.nesterov,
                    maximize=False, fused=fused, foreach=not fused,
                )  # fmt: skip
                for (*_, before, index), after in zip(members, buffers, strict=True):
                    if before is not after:
                        self.momentums[index].assign(after)
                        self._begun[index].assign(True)

    def _host_rate(self) -> float:
        """The learning rate on torch as a Python float, without waiting for the device."""
        source = self._learning_rate
        if isinstance(source, keras.Variable):
            rate = self._host.read(source)
            # float32 holds 0.1 as 0.10000000149...; a float64 weight is to see the 0.1 meant.
            return float(str(np.float32(rate))) if source.dtype == "float32" else rate
        if isinstance(source, Schedule):
            return source.value_at(self._host.read(self._iterations))
        if isinstance(source, keras.optimizers.schedules.LearningRateSchedule):
            with keras.device("cpu"):
                return float(source(self._host.read(self._iterations)))
        return float(source())

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        by_step = isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule)
        counted = by_step or self.gradient_accumulation_steps
        if not (counted and len(grads) and self._on_eager_torch()):
            super().apply(grads, trainable_variables)
            return
        step = self._host.read(self._iterations)
        super().apply(grads, trainable_variables)
        self._host.note(self._iterations, step + 1)

    def stateless_apply(
        self, optimizer_variables: Sequence, grads: Sequence, trainable_variables: Sequence
    ) -> tuple[list, list]:
        self._stateless = True
        try:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        finally:
            self._stateless = False

    @keras.optimizers.Optimizer.learning_rate.getter
    def learning_rate(self) -> Any:
        """The current rate: a Keras variable where a number was given, otherwise a tensor."""
        if isinstance(self._learning_rate, Schedule) and self._on_eager_torch():
            import torch

            return torch.tensor(self._host_rate())
        return super().learning_rate

    def _on_eager_torch(self) -> bool:
        if keras.backend.backend() != "torch" or self._stateless:
            return False
        import torch

        return not torch.compiler.is_compiling()

    def get_config(self) -> dict[str, Any]:
        names = ("momentum", "dampening", "nesterov", "decay_norms", "decay_biases")
        own = {name: getattr(self, name) for name in names}
        own["rate_multipliers"] = dict(self.rate_multipliers)
        return {**super().get_config(), **own, "weight_decay": self.coupled_weight_decay}


class _HostValues:
    """Python values of scalar torch variables, read from the device only when they changed.

    torch counts the in-place changes of a tensor in `_version`, so that an assignment by anyone
    (a callback, a checkpoint) is noticed without asking the device.
    """

    def __init__(self):
        self._known: dict[int, tuple[Any, int, Any]] = {}

    def read(self, variable: Any) -> Any:
        tensor = variable.value
        known = self._known.get(id(variable))
        if known is not None and known[0] is tensor and known[1] == tensor._version:
            return known[2]
        return self.note(variable, tensor.item())

    def note(self, variable: Any, value: Any) -> Any:
        tensor = variable.value
        self._known[id(variable)] = tensor, tensor._version, value
        return value


def _can_fuse(weights: Sequence[Any], grads: Sequence[Any], buffers: Sequence[Any]) -> bool:
    """Whether torch's fused kernel, one pass over memory instead of four, is right for these.

    It walks through the bare memory and never looks at strides: all must be those of the weight,
    except on axes of size one, where they say nothing. In torch 2.13 its CPU kernel also goes wrong
    on half precision.
    """
    for weight, grad, buffer in zip(weights, grads, buffers, strict=True):
        if buffer is None or weight.itemsize < 4 or weight.device.type not in ("cpu", "cuda"):
            return False
        if not (weight.is_contiguous() and grad.is_contiguous() and buffer.is_contiguous()):
            order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
            if not all(t.permute(order).is_contiguous() for t in (weight, grad, buffer)):
                return False
    return True


def _path(variable: Any) -> str:
    return getattr(variable, "path", None) or variable.name
