"""Where a model looked: Grad-CAM heat maps on every backend, and how to lay them over an image."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet.data.sources import Images, is_picture
from keras_resnet.models.files import load_model, model_input
from keras_resnet.models.image_model import as_functional
from keras_resnet.models.meaning import activation_of, gives_on, meaning_of, node_of, nodes_of
from keras_resnet.system.device import in_data_format, sync
from keras_resnet.system.errors import InputError, did_you_mean, whole

_BACKEND = keras.backend.backend()

# What stands between the last feature map and the head, and changes none of its values' places.
_NO_MAPS = (
    keras.layers.AdaptiveAveragePooling2D,
    keras.layers.AdaptiveMaxPooling2D,
    keras.layers.AveragePooling2D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
    keras.layers.Permute,
    keras.layers.Reshape,
    keras.layers.Identity,
)


def grad_cam(
    model: keras.Model,
    images: Any,
    class_index: int | Sequence[int] | None = None,
    layer: str | keras.layers.Layer | None = None,
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """Heat maps of what spoke for a class: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391).

    Channels of a feature map are weighted by the mean gradient of the class's logit, summed, and
    cut off below zero; the sum is scaled from its minimum to its maximum and enlarged to the input
    (bilinear, pixel centres at half, no antialias). The numbers are those of the `grad-cam`
    package (pytorch-grad-cam 1.5.7) on the same weights. Where a model ends in a softmax or a
    sigmoid, the logits in front of it are used: behind it a certain class has no gradient left. The
    one logit of two classes speaks for the second, and its negative for the first.

    A map says where the evidence was, not how strong it was: each is scaled by itself. It has the
    resolution of the layer's feature map; of a map of one value nothing can be said, and it is
    zero everywhere, as is one of an image in which nothing spoke for the class.

    Args:
        model: A Functional or Sequential classifier; models may be nested in it.
        images: What the model takes, as for `model.predict`: `(n, height, width, channels)`, or
            channels first where the model was built so; pixel values where it normalises inside.
            Or images as `predict` takes them, one or several, prepared as the model wants it:
            paths, Pillow images, bytes, a uint8 array `(height, width, channels)`.
        class_index: The class to explain: one for all images, one an image, or `None` for the
            most probable one of each.
        layer: Name of a layer with a feature map, or the layer. By default the last feature map
            in front of pooling and head: a ResNet's last block, an AlexNet's last max pooling.
        batch_size: Images at a time; the result does not depend on it.

    Returns:
        float32 `(n, height, width)` in 0..1, height and width of the input.

    Raises:
        InputError: No classifier, no such layer or class, or images of another shape.

    Examples:
        >>> from keras_resnet import create_model
        >>> model = create_model("resnet20", num_classes=3)
        >>> grad_cam(model, np.ones((2, 32, 32, 3), np.float32), class_index=1).shape
        (2, 32, 32)
    """
    classifier = as_classifier(model)
    images = _as_the_model_takes(classifier, images)
    _check_images(classifier, images)
    whole("batch_size", batch_size, 1)
    classes = meaning_of(classifier).num_classes(classifier.output_shape[-1])
    wanted = _class_indices(class_index, len(images), classes)
    network = network_of(classifier, layer)
    sync(classifier)
    last = data_format_of(classifier) == "channels_last"
    side = images.shape[1:3] if last else images.shape[2:4]
    maps = np.zeros((len(images), *side), np.float32)
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        _, features, gradients = network(images[part], wanted[part])
        if last:
            features, gradients = (
                in_data_format(a, "channels_first") for a in (features, gradients)
            )
        weights = gradients.mean(axis=(2, 3), keepdims=True)
        for i, one in enumerate(np.maximum((weights * features).sum(axis=1), 0)):
            # The package scales twice: enlarging can move the extremes.
            maps[start + i] = _scaled(resized(_scaled(one), side))
    return maps


def _as_the_model_takes(model: keras.Model, images: Any) -> np.ndarray:
    """Images of whatever kind as a batch of the model's input."""
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    if several and all(isinstance(one, (str, os.PathLike)) or is_picture(one) for one in several):
        preprocess, fed = model_input(model)
        pixels = [preprocess.pixels(one) for one in Images(several)]
    else:
        images = np.asarray(ops.convert_to_numpy(images))
        raw, known = images.dtype == np.uint8, getattr(model, "info", {}).get("preprocess")
        if not (raw and known and images.ndim in (3, 4)):
            return images
        preprocess, fed = model_input(model)
        if images.ndim == 3:
            pixels = [preprocess.pixels(images)]
        elif fed == "uint8" or data_format_of(model) == "channels_first":
            return images
        else:  # of the model's size, to be normalised
            pixels = list(images)
    if len({one.shape for one in pixels}) > 1:
        raise InputError("Images of one batch must be of one size: give a Preprocess with a crop.")
    batch = np.stack(pixels)
    batch = batch if fed == "uint8" else preprocess.normalize(batch)
    return in_data_format(batch, data_format_of(model))


def as_classifier(model: keras.Model | str | os.PathLike) -> keras.Model:
    """The model as a graph of layers, opened where a path is given; InputError: no classifier."""
    model = as_functional(model if isinstance(model, keras.Model) else load_model(model))
    meaning_of(model)
    return model


def _scaled(values: np.ndarray) -> np.ndarray:
    values = values - values.min()
    return values / (1e-7 + values.max())  # the package's 1e-7


def resized(values: np.ndarray, side: Sequence[int]) -> np.ndarray:
    """Bilinear as OpenCV's `INTER_LINEAR`: centres at half a pixel, edges repeated."""
    from scipy.ndimage import zoom  # a sixth of a second

    factors = [size / length for size, length in zip(side, values.shape, strict=True)]
    return zoom(values, factors, order=1, mode="nearest", grid_mode=True)


def _check_images(model: keras.Model, images: np.ndarray) -> None:
    wanted = tuple(model.input_shape[1:])
    if images.ndim == 3:
        raise InputError(
            "grad_cam takes a batch of images; pass images[None]. Received: one of shape "
            f"{images.shape}."
        )
    fits = images.ndim == 4 and all(
        a in (None, b) for a, b in zip(wanted, images.shape[1:], strict=True)
    )
    if not fits:
        raise InputError(
            f"{model.name} takes images of shape {wanted}. Received: {images.shape[1:]}."
        )


def _class_indices(given: Any, count: int, classes: int) -> np.ndarray:
    """One index an image; -1 for the most probable class."""
    if given is None:
        return np.full(count, -1, np.int32)
    indices = np.asarray(given)
    if indices.dtype.kind not in "iu" or indices.shape not in ((), (count,)):
        raise InputError(
            f"class_index must be a whole number, or one an image ({count}). Received: {given!r}."
        )
    if ((indices < 0) | (indices >= classes)).any():
        raise InputError(
            f"class_index must be from 0 to {classes - 1}: the model has {classes} classes. "
            f"Received: {given!r}."
        )
    return np.broadcast_to(indices, (count,)).astype(np.int32)


def data_format_of(model: keras.Model) -> str:
    """`"channels_last"` or `"channels_first"`: what the model was built for."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            return data_format_of(layer)
        if getattr(layer, "data_format", None):
            return layer.data_format
    return keras.config.image_data_format()


# --- the graph, cut at a feature map -------------------------------------------------------------

# Of a batch: its feature map; of a batch and a feature map in its place: the logits.
Front, Back = Callable[[Any], Any], Callable[[Any, Any], Any]


def network_of(model: keras.Model, layer) -> Callable[..., tuple[np.ndarray, ...]]:
    """A function of images and class indices: logits, feature maps, gradients, as NumPy arrays.

    Kept with the model: on jax it is a compiled program.
    """
    name = layer.name if isinstance(layer, keras.layers.Layer) else layer
    kept = model.__dict__.get("_grad_cam_networks")
    if kept is None:
        kept = {}
        object.__setattr__(model, "_grad_cam_networks", kept)  # no state, hence not Keras' to track
    if name not in kept:
        front, back = _cut(model, name)
        if meaning_of(model).task == "binary":
            back = _of_two(back)
        kept[name] = _RUNNERS[_BACKEND](model, front, back)
    return kept[name]


def _of_two(back: Back) -> Back:
    def both(x, features):
        logit = back(x, features)
        return ops.concatenate([-logit, logit], axis=1)

    return both


def _cut(model: keras.Model, name: str | None) -> tuple[Front, Back]:
    """A model as what leads to a feature map, and what leads from there to the logits."""
    model = as_functional(model)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise InputError(f"grad_cam needs a model of one input and one output: {model.name}.")
    tensor = _last_map(model) if name is None else _map_of(model, name)
    if isinstance(tensor, keras.Model):
        return _cut_inside(model, tensor, name)
    logits, finish = _logits(model)
    front = keras.Model(model.inputs[0], tensor)
    # Beside the feature map the input: from inside a block a shortcut leads around it.
    back = keras.Model([model.inputs[0], tensor], logits)
    return (
        lambda x: front(x, training=False),
        lambda x, features: finish(back([x, features], training=False)),
    )


def _cut_inside(model: keras.Model, inner: keras.Model, name: str | None) -> tuple[Front, Back]:
    """The same where the feature map is inside a model that is a layer of this one."""
    node = next(n for n in nodes_of(model) if n.operation is inner)
    front, back = _cut(inner, name)
    source, behind = node.input_tensors[0], node.outputs[0]
    before = None if source is model.inputs[0] else keras.Model(model.inputs[0], source)
    if behind is model.outputs[0]:  # the inner model's own softmax, if any, is cut off there
        after, finish = None, None
    else:
        logits, finish = _logits(model)
        after = None if logits is behind else keras.Model([model.inputs[0], behind], logits)

    def to_inner(x):
        return x if before is None else before(x, training=False)

    def to_logits(x, features):
        y = back(to_inner(x), features)
        return y if after is None else finish(after([x, y], training=False))

    return lambda x: front(to_inner(x)), to_logits


def _last_map(model: keras.Model):
    """The tensor of the last feature map, or the model inside that has it."""
    waiting, found = [model.outputs[0]], []
    while waiting:
        tensor = waiting.pop()
        node = node_of(model, tensor)
        is_map = len(tensor.shape) == 4
        if is_map and not node.is_input and not isinstance(node.operation, _NO_MAPS):
            candidate = tensor
        elif isinstance(node.operation, keras.Model) and _may_have_maps(node.operation):
            candidate = node.operation
        else:
            waiting += node.input_tensors
            continue
        if not any(candidate is other for other in found):
            found.append(candidate)
    if len(found) != 1:
        what = "no feature map" if not found else "more than one last feature map"
        raise InputError(f"{model.name} has {what}: name one with layer=.{_listed(model)}")
    return found[0]


def _may_have_maps(inner: keras.Model) -> bool:
    """Whether it is no mere head; one without a graph may be anything."""
    return as_functional(inner, strict=False) is None or bool(_map_names(inner))


def _map_of(model: keras.Model, name: str):
    """The feature map that a layer makes, or the model inside that has such a layer."""
    for node in nodes_of(model):
        if node.operation.name == name:
            tensor = node.outputs[0]
            if node.is_input or len(node.outputs) != 1 or len(tensor.shape) != 4:
                raise InputError(
                    f"The layer {name!r} makes no feature map: its output is "
                    f"{tuple(tensor.shape)}.{_listed(model)}"
                )
            return tensor
    for layer in model.layers:
        if isinstance(layer, keras.Model) and name in _map_names(layer):
            return layer
    near = did_you_mean(name, _map_names(model))
    raise InputError(f"{model.name} has no layer {name!r}.{near}{_listed(model)}")


def _map_names(model: keras.Model) -> list[str]:
    names = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            names += _map_names(layer)
        elif not isinstance(layer, keras.layers.InputLayer) and len(layer.output.shape) == 4:
            names.append(layer.name)
    return names


def _listed(model: keras.Model) -> str:
    names = _map_names(model)
    if not names:
        return " It has no layer with a feature map."
    return f" Its last layers with one: {', '.join(names[-6:])}."


def _logits(model: keras.Model, tensor: Any = None) -> tuple[Any, Callable[[Any], Any]]:
    """A tensor of the graph, and what is left to do to get the logits from it."""
    tensor = model.outputs[0] if tensor is None else tensor
    node = node_of(model, tensor)
    layer = node.operation
    if isinstance(layer, keras.Model) and as_functional(layer, strict=False) is not None:
        inner = as_functional(layer)
        logits, finish = _logits(inner)
        head = keras.Model(inner.inputs[0], logits)
        return node.input_tensors[0], lambda x: finish(head(x, training=False))
    if gives_on(layer):
        tensor, finish = _logits(model, node.input_tensors[0])
        return tensor, lambda x: ops.reshape(y := finish(x), (y.shape[0], -1))
    if activation_of(layer) not in ("softmax", "sigmoid"):
        return tensor, lambda x: x
    if isinstance(layer, keras.layers.Dense):

        def dense(x):
            kernel = ops.cast(layer.kernel, x.dtype)
            y = ops.matmul(x, kernel)
            return y if layer.bias is None else y + ops.cast(layer.bias, y.dtype)

        return node.input_tensors[0], dense
    if getattr(layer, "weights", None):  # a convolution, say, that ends in one
        return tensor, lambda x: x
    return node.input_tensors[0], lambda x: x


# --- gradients, a function a backend -------------------------------------------------------------


def _numpy(*tensors) -> tuple[np.ndarray, ...]:
    # In float32 before it leaves the backend: NumPy knows no bfloat16.
    return tuple(np.asarray(ops.convert_to_numpy(ops.cast(t, "float32"))) for t in tensors)


def _torch_runner(model: keras.Model, front: Front, back: Back):
    import torch

    def run(images: np.ndarray, wanted: np.ndarray):
        # Whatever mode the caller is in: inference mode's tensors know no gradients.
        with torch.inference_mode(False):
            x = ops.convert_to_tensor(images, dtype=model.inputs[0].dtype)
            with torch.no_grad():
                features = front(x)
            with torch.enable_grad():
                # A leaf: the gradient goes to the map alone, and leaves no mark on the weights.
                # Layers here work in place, but only on what they made themselves.
                features = features.detach().requires_grad_()
                logits = back(x, features)
                index = torch.as_tensor(wanted, device=logits.device, dtype=torch.int64)
                index = torch.where(index < 0, logits.argmax(dim=1), index)
                score = logits.gather(1, index[:, None]).float().sum()
                (gradients,) = torch.autograd.grad(score, features)
            return _numpy(logits.detach(), features.detach(), gradients)

    return run


def _tensorflow_runner(model: keras.Model, front: Front, back: Back):
    import tensorflow as tf

    def run(images: np.ndarray, wanted: np.ndarray):
        x = ops.convert_to_tensor(images, dtype=model.inputs[0].dtype)
        features = front(x)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(features)
            logits = back(x, features)
            index = tf.where(wanted < 0, tf.argmax(logits, axis=1, output_type="int32"), wanted)
            score = tf.reduce_sum(tf.cast(tf.gather(logits, index, batch_dims=1), "float32"))
        return _numpy(logits, features, tape.gradient(score, features))

    return run


def _jax_runner(model: keras.Model, front: Front, back: Back):
    import jax
    import jax.numpy as jnp

    variables = model.variables

    @jax.jit
    def compute(values, x, wanted):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            features = front(x)

            def score(features):
                logits = back(x, features)
                index = jnp.where(wanted < 0, logits.argmax(axis=1), wanted)
                picked = jnp.take_along_axis(logits, index[:, None], axis=1)
                return picked.astype("float32").sum(), logits

            (_, logits), gradients = jax.value_and_grad(score, has_aux=True)(features)
        return logits, features, gradients

    def run(images: np.ndarray, wanted: np.ndarray):
        x = ops.convert_to_tensor(images, dtype=model.inputs[0].dtype)
        return _numpy(*compute([v.value for v in variables], x, wanted))

    return run


_RUNNERS = {"torch": _torch_runner, "tensorflow": _tensorflow_runner, "jax": _jax_runner}
