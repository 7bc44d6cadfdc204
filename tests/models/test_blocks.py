"""The two blocks by themselves, against the same blocks written in torch."""

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.models.blocks import block_name
from keras_resnet.system.errors import InputError


@pytest.fixture(params=["channels_last", "channels_first"])
def data_format(request, backend):
    if request.param == "channels_first" and backend == "tensorflow":
        pytest.skip("TensorFlow has no channels_first convolutions on a CPU")
    before = keras.config.image_data_format()
    keras.config.set_image_data_format(request.param)
    yield request.param
    keras.config.set_image_data_format(before)


def torch_block(torch, filters, channels, stride, stride_on, projection, relu_before_add=False):
    """A residual block as the tutorials write it, with random batch-norm statistics."""
    nn = torch.nn
    kernels = (1, 3, 1) if len(filters) == 3 else (3, 3)
    strides = [1] * len(filters)
    strides[0 if stride_on == "1x1" or len(filters) == 2 else 1] = stride

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            before = channels
            for i, (f, k, s) in enumerate(zip(filters, kernels, strides, strict=True), start=1):
                setattr(self, f"conv{i}", nn.Conv2d(before, f, k, s, k // 2, bias=False))
                setattr(self, f"bn{i}", nn.BatchNorm2d(f))
                before = f
            if projection:
                conv = nn.Conv2d(channels, filters[-1], 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(filters[-1]))

        def forward(self, x):
            y = x
            for i in range(1, len(filters) + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                if i < len(filters) or relu_before_add:
                    y = torch.relu(y)
            return torch.relu(y + (self.downsample(x) if projection else x))

    torch.manual_seed(0)
    block = Block()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return block.eval()


def run_both(block, build, channels, size=(15, 18)):
    """Outputs of the torch block and of ours with its weights, both channels last."""
    torch = pytest.importorskip("torch")
    last = keras.config.image_data_format() == "channels_last"
    inputs = keras.Input((*size, channels) if last else (channels, *size))
    model = keras.Model(inputs, build(inputs))
    # One more level: the block is `layer1_0`, the torch block has no name of its own.
    state = {f"layer1.0.{k}": v for k, v in block.state_dict().items()}
    kr.load_torchvision(model, state, allow_other_strides=True)
    x = np.random.default_rng(0).normal(size=(2, *size, channels)).astype("float32")
    with torch.no_grad():
        expected = block(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    got = keras.ops.convert_to_numpy(model(x if last else x.transpose(0, 3, 1, 2)))
    return (got if last else got.transpose(0, 2, 3, 1)), expected


@pytest.mark.parametrize("filters", [(8, 8, 32), (32, 32)])
@pytest.mark.parametrize("relu_before_add", [False, True])
def test_identity_block_is_torchs(data_format, filters, relu_before_add):
    torch = pytest.importorskip("torch")
    block = torch_block(torch, filters, 32, 1, "3x3", False, relu_before_add)
    got, expected = run_both(
        block,
        lambda x: kr.identity_block(x, 3, filters, 2, "a", relu_before_add=relu_before_add),
        32,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("filters", "stride_on", "strides"),
    [((8, 8, 32), "1x1", 2), ((8, 8, 32), "3x3", 2), ((24, 24), "3x3", 2), ((8, 8, 32), "1x1", 1)],
)
def test_conv_block_is_torchs(data_format, filters, stride_on, strides):
    torch = pytest.importorskip("torch")
    block = torch_block(torch, filters, 16, strides, stride_on, True)
    got, expected = run_both(
        block,
        lambda x: kr.conv_block(x, 3, filters, 2, "a", (strides, strides), stride_on=stride_on),
        16,
    )
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_conv_block_strides_on_the_first_1x1_like_the_tutorials():
    model = keras.Model(x := keras.Input((8, 8, 4)), kr.conv_block(x, 3, [4, 4, 8], 3, "a"))
    assert model.get_layer("layer2_0_conv1").strides == (2, 2)
    assert model.get_layer("layer2_0_conv2").strides == (1, 1)


def test_zero_padded_shortcut_has_no_weights():
    x = keras.Input((8, 8, 16))
    model = keras.Model(x, kr.conv_block(x, 3, [32, 32], 3, "a", shortcut="zero_padding"))
    assert len([w for w in model.trainable_weights if "shortcut" in w.path]) == 0
    assert model.output_shape == (None, 4, 4, 32)


@pytest.mark.long("tensorflow", "jax")
def test_a_network_of_ones_own_trains(rng):
    """A two-stage network written by hand, as a user would."""
    inputs = keras.Input((16, 16, 3))
    x = kr.conv_block(inputs, 3, [8, 8], stage=2, block="a", strides=(1, 1))
    x = kr.identity_block(x, 3, [8, 8], stage=2, block="b")
    x = kr.conv_block(x, 3, [16, 16], stage=3, block="a")
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = rng.normal(size=(16, 16, 16, 3)).astype("float32")
    y = (x[:, 0, 0, 0] > 0).astype("int32")
    losses = model.fit(x, y, epochs=4, verbose=0, shuffle=False).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.once
@pytest.mark.parametrize(
    ("stage", "block", "name"),
    [(2, "a", "layer1_0"), (5, "c", "layer4_2"), (3, 35, "layer2_35"), ("stage1", 0, "stage1_0"),
     ("encoder", "deep", "encoder_deep")],
)  # fmt: skip
def test_blocks_are_named_by_torchvisions_rule(stage, block, name):
    assert block_name(stage, block) == name


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kr.identity_block(x, 3, [8, 8, 16], 2, "b"), "Use conv_block"),
        (lambda x: kr.conv_block(x, 3, [8], 2, "a"), "two numbers"),
        (lambda x: kr.conv_block(x, 3, [8, 8, 8], 2, "a", shortcut="none"), "zero_padding"),
        (lambda x: kr.conv_block(x, 3, [8, 8, 8], 2, "a", stride_on="7x7"), "stride_on"),
        (lambda x: kr.conv_block(x, 3, [8, 8, 8], 2, "a", layout="x"), "layout"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(keras.Input((8, 8, 8)))
