"""The training step on torch, without what Keras asks every layer for several times in each."""

from __future__ import annotations

import keras
from keras import ops

from keras_resnet.layers.torch_call import BACKEND, is_plain, needs_keras, stored
from keras_resnet.models.torch_graph import DirectGraph

if BACKEND == "torch":
    import torch


class DirectStep(DirectGraph):
    """For a Functional `keras.Model`, as `DirectGraph`: on torch, also steps without detours.

    Keras walks through all layers for the weights, for their gradients, to forget the last ones and
    for losses that layers add; a GPU that takes 34 ms for the kernels of a step waited for that.
    What may add a loss (a regularizer, a layer of one's own) is left to Keras, whose arithmetic
    this is, to the bit.
    """

    if BACKEND == "torch":  # jax' takes other arguments

        def train_step(self, data):
            """Arguments and result are those of `keras.Model.train_step`."""
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            fits = is_plain(x) and all(
                side in (None, given)
                for side, given in zip(self.inputs[0].shape[1:], x.shape[1:], strict=False)
            )
            lists = self._lists_for(x) if fits and self.trainable else None
            trained = [v for v in self._weights_for(lists) if v.trainable]
            if (
                not (trained and self._compile_loss)
                or any([v.regularizer is not None for v in trained])
                or type(self).compute_loss is not keras.Model.compute_loss
                or type(self).call is not DirectGraph.call
                or needs_keras(self)
            ):
                return super().train_step(data)
            tensors = [stored(v) for v in trained]
            for tensor in tensors:
                tensor.grad = None
            y_pred = lists.whole(ops.convert_to_tensor(x, dtype=self.inputs[0].dtype), True)
            loss = self._compile_loss(y, y_pred, sample_weight)
            self._loss_tracker.update_state(loss, sample_weight=len(x))
            self.optimizer.scale_loss(loss).backward()
            with torch.no_grad():
                self.optimizer.apply([tensor.grad for tensor in tensors], trained)
            return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _weights_for(self, lists) -> list[keras.Variable]:
        """The weights of a graph whose layers add no losses; none of another one."""
        known = self.__dict__.get("_known_weights")
        if known is None or known[0] is not lists:
            simple = lists is not None and all(map(_is_simple, self.layers))
            known = lists, self.weights if simple else []
            object.__setattr__(self, "_known_weights", known)  # no state, hence not Keras' to track
        return known[1]


def _is_simple(layer: keras.layers.Layer) -> bool:
    """Whether a layer is one of Keras' own or ours, alone: these add losses by arguments only."""
    inner = [m for m in layer.modules() if isinstance(m, keras.layers.Layer) and m is not layer]
    return not inner and type(layer).__module__.split(".")[0] in ("keras", "keras_resnet")
