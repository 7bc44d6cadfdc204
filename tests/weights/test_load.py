"""torch state dicts in and out: against torchvision and torch, on whichever backend runs."""

from __future__ import annotations

import collections
import copy
import gc
import json

import keras
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fuzz_checkpoint import tar_bytes

from keras_resnet.data.preprocess import Preprocess
from keras_resnet.models.blocks import conv_block, identity_block
from keras_resnet.models.zoo import create_model
from keras_resnet.system.errors import InputError, NotFoundError
from keras_resnet.variants import SPECS
from keras_resnet.weights import download, published, sources
from keras_resnet.weights.checkpoint import inspect_checkpoint
from keras_resnet.weights.dialects import head_shape, names_in
from keras_resnet.weights.load import load_torchvision
from keras_resnet.weights.mapping import expected_keys, save_torchvision, to_torchvision
from keras_resnet.weights.matching import matching_variants, spec_shapes
from keras_resnet.weights.verify import verify

DEEP = [pytest.mark.long, pytest.mark.once]
# Every variant that torchvision has. Deeper and wider ones repeat the blocks of the others; their
# names and shapes are compared below and in test_models.py.
TORCHVISION = [
    # Elsewhere the grouped one has its blocks, and test_models.py runs it.
    pytest.param("resnet50", marks=[pytest.mark.slow, pytest.mark.long("tensorflow", "jax")]),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnext50_32x4d", "alexnet")),
    *(
        pytest.param(name, marks=DEEP)
        for name in (
            *("resnet34", "resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d"),
            *("wide_resnet50_2", "wide_resnet101_2"),
        )
    ),
    "resnet18",  # the last pair stays while the rest of the file runs
]
NAMES = [getattr(p, "values", (p,))[0] for p in TORCHVISION]
SIZE = 64


def randomise_statistics(module, seed: int = 0):
    """Batch norms as after training: fresh ones (mean 0, variance 1) hide what is swapped."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d | torch.nn.GroupNorm):
            with torch.no_grad():
                child.weight.uniform_(0.5, 1.5, generator=generator)
                child.bias.uniform_(-0.3, 0.3, generator=generator)
        if isinstance(child, torch.nn.BatchNorm2d):
            child.running_mean.uniform_(-0.3, 0.3, generator=generator)
            child.running_var.uniform_(0.5, 1.5, generator=generator)
            child.num_batches_tracked.fill_(1234)
    return module.eval()


def torch_resnet20(num_classes: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random state dict for resnet20, which torchvision does not have, in torch's names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in spec_shapes(SPECS["resnet20"], num_classes).items():
        if not shape:
            state[key] = torch.tensor(77)
        elif key.endswith("running_var") or ("bn" in key and key.endswith(".weight")):
            state[key] = torch.rand(shape, generator=generator) + 0.5
        else:
            state[key] = torch.randn(shape, generator=generator) * 0.2
    return state


def answers(model, images_nchw: np.ndarray) -> np.ndarray:
    last = keras.config.image_data_format() == "channels_last"
    images = images_nchw.transpose(0, 2, 3, 1) if last else images_nchw
    if keras.backend.backend() == "jax":  # compiles a whole network faster than its operations
        return model.predict_on_batch(images)
    return keras.ops.convert_to_numpy(model(images, training=False))


def torch_answers(module, images_nchw: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(images_nchw)).numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def weights_of(model) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v.value) for v in model.weights]


def assert_untouched(model, before) -> None:
    for a, b in zip(weights_of(model), before, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def built_resnet20():
    model = create_model("resnet20")
    return model, model.get_weights(), copy.deepcopy(model.info)


@pytest.fixture
def resnet20(built_resnet20):
    """A ResNet-20 as `create_model` gives it: built once, put back after each test."""
    model, weights, info = built_resnet20
    yield model
    model.set_weights(weights)
    model.get_layer("bn1").epsilon = 1e-5
    model.info.clear()
    model.info.update(copy.deepcopy(info))


@pytest.fixture
def pictures(rng) -> np.ndarray:
    return rng.standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)


# --- The rule, against torchvision ---------------------------------------------------------------

Pair = collections.namedtuple("Pair", "name module state model report")


@pytest.fixture(scope="module", params=TORCHVISION)
def pair(request, torchvision):
    """A torchvision model with random weights and statistics, imported into its counterpart."""
    gc.collect()  # the pair before it, which pytest has let go by now
    torch.manual_seed(0)
    module = randomise_statistics(getattr(torchvision.models, request.param)())
    model = create_model(request.param, input_shape=(SIZE, SIZE, 3))
    state = module.state_dict()
    return Pair(request.param, module, state, model, load_torchvision(model, state))


@pytest.mark.slow
def test_derived_keys_are_torchvisions_in_its_order(pair):
    theirs = [(key, tuple(tensor.shape)) for key, tensor in pair.state.items()]
    assert list(expected_keys(pair.model).items()) == theirs
    assert set(pair.report.loaded) == set(pair.state)


def test_logits_agree_with_torchvision(pair, pictures):
    theirs = torch_answers(pair.module, pictures)
    assert relative(answers(pair.model, pictures), theirs) < 1e-4


def test_import_then_export_is_bit_exact(pair):
    exported = to_torchvision(pair.model)
    assert list(exported) == list(pair.state)
    for key, tensor in pair.state.items():
        array = exported[key]
        assert array.flags.c_contiguous
        assert (array.dtype, array.shape) == (tensor.numpy().dtype, tuple(tensor.shape)), key
        assert array.tobytes() == tensor.contiguous().numpy().tobytes(), key


def test_the_witness_agrees(pair):
    report = verify(pair.model, pair.state)
    assert report.passed and report.error < 1e-4
    assert report.head_compared


def test_the_variant_is_recognised(pair):
    assert (pair.name, 1000) in pair.report.variants


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
def test_shapes_from_the_table_are_torchvisions(torchvision, name):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)(num_classes=7).state_dict()
    theirs = [(key, tuple(tensor.shape)) for key, tensor in state.items()]
    assert list(spec_shapes(SPECS[name], num_classes=7).items()) == theirs


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    [
        *("resnet50_v1_relu", "resnet20", "resnet32", "resnet34_cifar10", "alexnet_cifar10"),
        "resnet50d",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet110", "alexnet_paper")),
    ],
)
def test_shapes_from_the_table_are_the_built_models(name):
    model = create_model(name, num_classes=7)
    assert list(expected_keys(model).items()) == list(spec_shapes(SPECS[name], 7).items())
    assert matching_variants(expected_keys(model)) == [(name, 7)]


TIMMS = [name for name, spec in SPECS.items() if "timm" in spec.source]


@pytest.mark.once
@pytest.mark.parametrize("name", TIMMS)
def test_shapes_from_the_table_are_timms(torchvision, name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=7).state_dict()
    theirs = [(key, head_shape(key, tuple(tensor.shape))) for key, tensor in state.items()]
    ours = spec_shapes(SPECS[name], num_classes=7)
    if SPECS[name].preactivation:  # in timm's own names and order
        names = names_in("timm", ours)[1]
        assert sorted((names[key], shape) for key, shape in ours.items()) == sorted(theirs)
    else:
        assert list(ours.items()) == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet14t", *(pytest.param(name, marks=pytest.mark.once)
                    for name in ("resnet10t", "resnet50d", "seresnet50", "resnet50_gn"))],
)  # fmt: skip
def test_timms_rows_answer_as_timm(torchvision, name, rng):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module, side = randomise_statistics(timm.create_model(name, num_classes=10)), 75
    state = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
    model = create_model(name, num_classes=10, input_shape=(side, side, 3))
    assert list(expected_keys(model).items()) == [(k, v.shape) for k, v in state.items()]
    assert load_torchvision(model, state).ok
    images = rng.standard_normal((2, side, side, 3)).astype("float32")
    with torch.no_grad():
        theirs = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    for ours in (model(images, training=False), model.predict_on_batch(images)):
        ours = keras.ops.convert_to_numpy(ours)
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    assert verify(model, state, images=images).passed
    assert all(np.array_equal(value, state[key]) for key, value in to_torchvision(model).items()
               if not key.endswith("num_batches_tracked"))  # fmt: skip


@pytest.mark.once
def test_a_state_dict_fits_its_own_row_and_no_other():
    # Only v1 and v1.5 coincide: strides leave no trace in a shape.
    for name, spec in SPECS.items():
        found = [n for n, _ in matching_variants(spec_shapes(spec, 12, channels=1))]
        depth = name.removesuffix("_v1")
        twins = [n for n in (depth, f"{depth}_v1") if n in SPECS]
        assert found == twins, name


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
@pytest.mark.slow
def test_channels_first_agrees_with_torchvision(torchvision, backend, pictures, name):
    if backend != "torch":
        pytest.skip("the other backends run no channels_first convolution on a CPU")
    torch.manual_seed(1)
    module = randomise_statistics(getattr(torchvision.models, name)())
    keras.config.set_image_data_format("channels_first")
    try:
        model = create_model(name, input_shape=(3, SIZE, SIZE))
        load_torchvision(model, module)
        assert relative(answers(model, pictures), torch_answers(module, pictures)) < 1e-4
        assert verify(model, module).passed
        exported = to_torchvision(model)
    finally:
        keras.config.set_image_data_format("channels_last")
    for key, tensor in module.state_dict().items():
        assert exported[key].tobytes() == tensor.numpy().tobytes(), key


def test_stock_layers_and_own_names_follow_the_same_rule(pictures):
    """The rule knows base classes and names, not this package's models."""
    module = torch.nn.Sequential(
        collections.OrderedDict(
            stem=torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, groups=1), torch.nn.BatchNorm2d(8, eps=1e-3)
            ),
            grouped=torch.nn.Conv2d(8, 16, 3, groups=4, bias=False),
            pool=torch.nn.AdaptiveAvgPool2d(1),
            flat=torch.nn.Flatten(),
            top=torch.nn.Linear(16, 5),
        )
    )
    randomise_statistics(module)
    inputs = x = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(8, 3, name="stem_0")(x)
    x = keras.layers.BatchNormalization(epsilon=1e-3, name="stem_1")(x)
    x = keras.layers.Conv2D(16, 3, groups=4, use_bias=False, name="grouped")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.5)(x)
    model = keras.Model(inputs, keras.layers.Dense(5, name="top")(x))
    load_torchvision(model, module)
    assert relative(answers(model, pictures), torch_answers(module, pictures)) < 1e-4
    assert list(to_torchvision(model)) == list(module.state_dict())


def test_blocks_used_alone_load_by_their_names(torchvision, rng):
    """`layer2` of a torchvision ResNet-50, rebuilt from conv_block and identity_block."""
    torch.manual_seed(2)
    module = randomise_statistics(torchvision.models.resnet50()).layer2
    state = {f"layer2.{key}": tensor for key, tensor in module.state_dict().items()}
    inputs = keras.Input((16, 16, 256))
    x = conv_block(inputs, 3, [128, 128, 512], 3, "a", stride_on="3x3")
    for block in "bcd":
        x = identity_block(x, 3, [128, 128, 512], 3, block)
    model = keras.Model(inputs, x)
    load_torchvision(model, state)
    features = rng.standard_normal((2, 256, 16, 16)).astype(np.float32)
    ours = answers(model, features).transpose(0, 3, 1, 2)
    assert relative(ours, torch_answers(module, features)) < 1e-4
    assert list(to_torchvision(model)) == list(state)


def test_a_model_inside_a_model_is_found(resnet20):
    state = torch_resnet20()
    outer = keras.Sequential([keras.Input((32, 32, 3)), resnet20])
    load_torchvision(outer, state)
    assert (
        to_torchvision(outer)["linear.weight"].tobytes() == state["linear.weight"].numpy().tobytes()
    )


def test_a_layer_without_a_rule_is_named():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.DepthwiseConv2D(3, name="odd_one")(inputs))
    with pytest.raises(InputError, match=r"'odd_one' \(DepthwiseConv2D\).*kernel"):
        expected_keys(model)


# --- Sources ------------------------------------------------------------------------------------


def save_safetensors(state, path):
    pytest.importorskip("safetensors.torch").save_file(state, path)


SAVERS = {
    "zip": lambda state, path: torch.save(state, path),
    "stream": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "tar": lambda state, path: path.write_bytes(tar_bytes(state)),
    "safetensors": save_safetensors,
}


@pytest.mark.parametrize(
    "format", [pytest.param(n, marks=() if n == "zip" else pytest.mark.once) for n in SAVERS]
)
@pytest.mark.slow
def test_every_file_format_imports_bit_exactly(tmp_path, resnet20, format):
    state = torch_resnet20()
    path = tmp_path / f"model.{'safetensors' if format == 'safetensors' else 'pth'}"
    SAVERS[format](state, path)
    report = load_torchvision(resnet20, path, verify=True)
    assert (report.format, report.source, report.ok) == (format, path.name, True)
    assert report.verification.passed
    for key, array in to_torchvision(resnet20).items():
        assert array.tobytes() == state[key].numpy().tobytes(), key


@pytest.mark.once
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.slow
def test_an_exported_file_loads_in_torchvision(tmp_path, torchvision, pictures, suffix):
    model = create_model("resnet18", num_classes=6, input_shape=(SIZE, SIZE, 3))
    save_torchvision(model, tmp_path / f"model{suffix}")
    if suffix == ".pth":
        state = torch.load(tmp_path / "model.pth", weights_only=True)
    else:
        state = pytest.importorskip("safetensors.torch").load_file(tmp_path / "model.safetensors")
    module = torchvision.models.resnet18(num_classes=6).eval()
    module.load_state_dict(state, strict=True)
    assert relative(answers(model, pictures), torch_answers(module, pictures)) < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("as_file", [True, False])
def test_other_precisions_are_cast_and_reported(tmp_path, resnet20, dtype, as_file):
    state = {
        k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v
        for k, v in torch_resnet20().items()
    }
    torch.save(state, tmp_path / "model.pth")
    report = load_torchvision(resnet20, tmp_path / "model.pth" if as_file else state)
    floating = [k for k, v in state.items() if v.is_floating_point()]
    assert report.cast == dict.fromkeys(floating, (dtype, "float32"))
    assert f"{len(floating)} entries, {dtype} -> float32" in str(report)
    exported = to_torchvision(resnet20)
    for key in floating:
        assert exported[key].tobytes() == state[key].float().numpy().tobytes(), key


@pytest.mark.once
@pytest.mark.parametrize(
    "wrap, prefix, key",
    [
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "module.", ""),
        (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, "module._orig_mod.", ""),
        (lambda s: {f"net.{k}": v for k, v in s.items()}, "net.", ""),
        (lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"lr": 1}}, "", "state_dict"),
        (lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}, "module.", "model"),
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_wrapped_and_prefixed_sources_are_unwrapped(tmp_path, resnet20, wrap, prefix, key, as_file):
    state = torch_resnet20()
    torch.save(wrap(state), tmp_path / "model.pth")
    report = load_torchvision(resnet20, tmp_path / "model.pth" if as_file else wrap(state))
    assert (report.prefix, report.key) == (prefix, key)
    assert to_torchvision(resnet20)["bn1.bias"].tobytes() == state["bn1.bias"].numpy().tobytes()


@pytest.mark.once
@pytest.mark.parametrize("as_file", [True, False])
def test_a_key_chooses_among_several_state_dicts(tmp_path, resnet20, as_file):
    nested = {"model": torch_resnet20(seed=1), "model_ema": torch_resnet20(seed=2)}
    torch.save(nested, tmp_path / "model.pth")
    load_torchvision(resnet20, tmp_path / "model.pth" if as_file else nested, key="model_ema")
    expected = nested["model_ema"]["conv1.weight"].numpy()
    assert to_torchvision(resnet20)["conv1.weight"].tobytes() == expected.tobytes()


@pytest.mark.once
def test_an_averaged_and_a_parallel_module_load(torchvision):
    module = randomise_statistics(torchvision.models.resnet18(num_classes=3))
    model = create_model("resnet18", num_classes=3)
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    for source in (torch.nn.DataParallel(module), averaged, averaged.state_dict()):
        assert load_torchvision(model, source).prefix == "module."
    assert to_torchvision(model)["fc.bias"].tobytes() == module.fc.bias.detach().numpy().tobytes()


def test_plain_numpy_arrays_load(resnet20):
    state = {key: tensor.numpy() for key, tensor in torch_resnet20().items()}
    load_torchvision(resnet20, state)
    assert to_torchvision(resnet20)["conv1.weight"].tobytes() == state["conv1.weight"].tobytes()


@pytest.mark.slow
@pytest.mark.long("tensorflow", "jax")
def test_a_cifar_file_from_the_wild_answers_as_its_own_code_does(shared, resnet20):
    """github.com/akamaster/pytorch_resnet_cifar10: 861 of these 1000 images, by its own code."""
    report = load_torchvision(resnet20, shared / "weights" / "resnet20-12fca82f.th", verify=True)
    assert report.sha256.startswith("12fca82f") and report.prefix == "module."
    prepare = Preprocess(resize_size=None, crop_size=None)
    folders = sorted((shared / "data" / "cifar10_small" / "test").iterdir())
    files = [(path, i) for i, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    images = np.stack([prepare(path) for path, _ in files])
    logits = resnet20.predict(images, batch_size=250, verbose=0)
    assert len(files) == 1000
    assert int((logits.argmax(1) == [label for _, label in files]).sum()) == 861


@pytest.mark.once
def test_sources_that_are_none_are_refused(tmp_path, resnet20):
    with pytest.raises(NotFoundError, match=r"nowhere\.pth"):
        load_torchvision(resnet20, tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="a path, a dict of arrays or a torch module"):
        load_torchvision(resnet20, 3)
    with pytest.raises(InputError, match="holds no tensors"):
        load_torchvision(resnet20, {"epoch": 3})
    with pytest.raises(InputError, match="quantised to 8 bits"):
        load_torchvision(resnet20, "resnet18_fbgemm_16fa66dd.pth")
    with pytest.raises(InputError, match="no entry 'ema'"):
        load_torchvision(resnet20, {"model": torch_resnet20()}, key="ema")
    with pytest.raises(InputError, match="head must be"):
        load_torchvision(resnet20, torch_resnet20(), head="drop")


# --- Heads --------------------------------------------------------------------------------------


@pytest.mark.once
def test_another_number_of_classes_is_one_line_with_the_remedy():
    model = create_model("resnet20", num_classes=4)
    before = weights_of(model)
    with pytest.raises(InputError) as caught:
        load_torchvision(model, torch_resnet20(10))
    message = str(caught.value)
    assert "has 10 classes, resnet20 has 4" in message
    assert 'load_torchvision(model, source, head="skip")' in message and "\n" not in message
    assert_untouched(model, before)


def test_skipping_the_head_loads_the_backbone_and_leaves_the_head():
    model = create_model("resnet20", num_classes=4)
    before = to_torchvision(model)
    state = torch_resnet20(10)
    report = load_torchvision(model, state, head="skip")
    after = to_torchvision(model)
    assert report.ok and set(report.skipped) == {"linear.weight", "linear.bias"}
    for key in report.loaded:
        assert after[key].tobytes() == state[key].numpy().tobytes(), key
    for key in report.skipped:
        assert after[key].tobytes() == before[key].tobytes(), key
    proof = verify(model, state)
    assert proof.passed and not proof.head_compared and "logits" in str(proof)


@pytest.mark.once
def test_skipping_the_head_takes_a_model_whose_head_has_another_name():
    backbone = create_model("resnet20", include_top=False, pooling="avg")
    outputs = keras.layers.Dense(3, name="my_head")(backbone.output)
    model = keras.Model(backbone.input, outputs)
    report = load_torchvision(model, torch_resnet20(10), head="skip")
    assert {"linear.weight", "linear.bias", "my.head.weight", "my.head.bias"} == set(report.skipped)


def test_a_model_without_a_head_skips_it():
    model = create_model("resnet20", include_top=False)
    state = torch_resnet20(10)
    with pytest.raises(InputError, match="head="):
        load_torchvision(model, state)
    report = load_torchvision(model, state, head="skip")
    assert report.ok and set(report.skipped) == {"linear.weight", "linear.bias"}
    assert verify(model, state).passed


@pytest.mark.once
def test_a_source_without_a_head_loads_and_proves():
    state = {k: v for k, v in torch_resnet20().items() if not k.startswith("linear")}
    for options in ({"include_top": False}, {"num_classes": 4}):
        model = create_model("resnet20", **options)
        assert load_torchvision(model, state, head="skip", verify=True).verification.passed


def test_replacing_the_head_draws_it_anew_even_where_it_fits():
    model = create_model("resnet20", num_classes=10)
    before = to_torchvision(model)["linear.weight"]
    state = torch_resnet20(10)
    report = load_torchvision(model, state, head="replace")
    after = to_torchvision(model)["linear.weight"]
    assert report.ok and set(report.skipped) == {"linear.weight", "linear.bias"}
    assert "drawn anew" in str(report)
    assert not np.array_equal(after, state["linear.weight"].numpy())
    assert not np.array_equal(after, before)
    # As initialised: uniform or normal around 0 with the same spread.
    assert 0.7 < after.std() / before.std() < 1.4
    with pytest.raises(InputError, match="missing"):
        headless = {k: v for k, v in state.items() if not k.startswith("linear")}
        load_torchvision(model, headless, head="replace")


# --- What does not fit --------------------------------------------------------------------------


@pytest.mark.once
def test_a_file_of_another_variant_is_named_and_the_model_stays(torchvision, resnet20):
    with torch.device("meta"):
        shapes = torchvision.models.resnet34().state_dict()
    state = {k: np.zeros(v.shape, np.float32) for k, v in shapes.items()}
    before = weights_of(resnet20)
    with pytest.raises(InputError, match=r"does not fit resnet20: it fits resnet34 \(1000 class"):
        load_torchvision(resnet20, state)
    assert_untouched(resnet20, before)


@pytest.mark.once
def test_missing_unexpected_and_mismatched_are_reported_and_nothing_is_loaded(resnet20):
    state = torch_resnet20()
    state["extra.weight"] = torch.zeros(3)
    del state["bn1.bias"]
    state["conv1.weight"] = torch.zeros(16, 3, 5, 5)
    before = weights_of(resnet20)
    for strict in (True, False):  # another shape is an error either way
        with pytest.raises(InputError) as caught:
            load_torchvision(resnet20, state, strict=strict)
        report = caught.value.report
        assert report.missing == {"bn1.bias": (16,)}
        assert report.unexpected == {"extra.weight": (3,)}
        assert report.mismatched == {"conv1.weight": ((16, 3, 5, 5), (16, 3, 3, 3))}
        assert not report.done and "nothing was loaded" in str(report)
        assert_untouched(resnet20, before)


@pytest.mark.once
def test_not_strict_loads_what_there_is_and_reports_the_rest(resnet20):
    state = torch_resnet20()
    state["extra.weight"] = torch.zeros(3)
    kept = to_torchvision(resnet20)["bn1.bias"]
    del state["bn1.bias"]
    report = load_torchvision(resnet20, state, strict=False)
    assert (set(report.missing), set(report.unexpected)) == ({"bn1.bias"}, {"extra.weight"})
    exported = to_torchvision(resnet20)
    assert exported["bn1.bias"].tobytes() == kept.tobytes()
    assert exported["conv1.weight"].tobytes() == state["conv1.weight"].numpy().tobytes()
    with pytest.raises(InputError, match="no entry in common"):
        load_torchvision(resnet20, {"a": torch.zeros(3)}, strict=False)


@pytest.mark.once
def test_another_kind_of_entry_is_told_by_kind(resnet20):
    state = torch_resnet20()
    state["linear.weight"] = state["linear.weight"][..., None, None]  # a 1x1 convolution's
    with pytest.raises(InputError, match=r"a convolution's.*a fully connected layer's"):
        load_torchvision(resnet20, state)
    state = torch_resnet20()
    state["bn1.weight"] = torch.ones(16, dtype=torch.int8)
    with pytest.raises(InputError, match="int8"):
        load_torchvision(resnet20, state)


def test_a_failure_half_way_puts_the_old_values_back(monkeypatch, resnet20):
    before = weights_of(resnet20)
    kind = type(resnet20.weights[0])
    assign, calls = kind.assign, []

    def failing(self, value):
        calls.append(self)
        if len(calls) == 20:
            raise MemoryError("no room")
        return assign(self, value)

    monkeypatch.setattr(kind, "assign", failing)
    with pytest.raises(MemoryError):
        load_torchvision(resnet20, torch_resnet20())
    assert len(calls) > 20
    assert_untouched(resnet20, before)
    assert "weights" not in resnet20.info


def test_batches_tracked_survive_or_start_at_zero(resnet20):
    state = torch_resnet20()
    load_torchvision(resnet20, state)
    counts = {k: v for k, v in to_torchvision(resnet20).items() if k.endswith("tracked")}
    assert {int(v) for v in counts.values()} == {77}
    assert all(v.dtype == np.int64 and v.shape == () for v in counts.values())
    state["bn1.num_batches_tracked"] = torch.tensor(5)
    load_torchvision(resnet20, state)
    exported = to_torchvision(resnet20)
    assert int(exported["bn1.num_batches_tracked"]) == 5
    assert int(exported["layer3.2.bn2.num_batches_tracked"]) == 77
    old_file = {k: v for k, v in state.items() if not k.endswith("tracked")}
    assert load_torchvision(resnet20, old_file).ok
    assert int(to_torchvision(resnet20)["bn1.num_batches_tracked"]) == 0


def test_the_origin_travels_in_the_model_file(tmp_path, resnet20):
    torch.save(torch_resnet20(), tmp_path / "mine.pth")
    report = load_torchvision(resnet20, tmp_path / "mine.pth")
    resnet20.save(tmp_path / "model.keras")
    info = keras.saving.load_model(tmp_path / "model.keras").info["weights"]
    assert info["source"] == "mine.pth" and info["sha256"] == report.sha256
    assert info["loaded"] == len(report.loaded) and info["published_as"] is None
    assert info["num_batches_tracked"] == 77


@pytest.mark.once
def test_the_report_prints_short_and_goes_to_json(tmp_path, torchvision):
    model = create_model("resnet18", num_classes=10)
    with torch.device("meta"):
        shapes = torchvision.models.resnet50().state_dict()
    state = {k: np.zeros(v.shape, np.float32) for k, v in shapes.items()}
    with pytest.raises(InputError) as caught:
        load_torchvision(model, state)
    report = caught.value.report
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    lines = str(report).split("\n")
    assert len(lines) <= 22
    assert any("and" in line and "more unexpected" in line for line in lines)
    facts = json.loads(report.to_json(tmp_path / "report.json"))
    assert facts == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert facts["ok"] is False and facts["variants"] == [["resnet50", 1000], ["resnet50_v1", 1000]]
    assert facts["mismatched"]["fc.weight"] == [[1000, 2048], [10, 512]]


# --- Equal shapes, other strides ----------------------------------------------------------------


def bottleneck_net(stride_on: str):
    """A small network of this package's blocks, with torchvision's names."""
    inputs = keras.Input((32, 32, 16))
    x = conv_block(inputs, 3, [4, 4, 16], 2, "a", (1, 1), stride_on=stride_on)
    x = conv_block(x, 3, [8, 8, 32], 3, "a", (2, 2), stride_on=stride_on)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="fc")(x), name=f"net_{stride_on}")


class TorchBottlenecks(torch.nn.Module):
    """The same in torch; only the strides matter here."""

    def __init__(self, stride_on):
        super().__init__()
        self.layer1 = torch.nn.ModuleList([self.block(16, 4, 1, stride_on)])
        self.layer2 = torch.nn.ModuleList([self.block(16, 8, 2, stride_on)])
        self.fc = torch.nn.Linear(32, 3)

    @staticmethod
    def block(fed, width, stride, stride_on):
        block = torch.nn.Module()
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        block.conv1 = torch.nn.Conv2d(fed, width, 1, first, bias=False)
        block.bn1 = torch.nn.BatchNorm2d(width)
        block.conv2 = torch.nn.Conv2d(width, width, 3, second, 1, bias=False)
        block.bn2 = torch.nn.BatchNorm2d(width)
        block.conv3 = torch.nn.Conv2d(width, 4 * width, 1, bias=False)
        block.bn3 = torch.nn.BatchNorm2d(4 * width)
        block.downsample = torch.nn.Sequential(
            torch.nn.Conv2d(fed, 4 * width, 1, stride, bias=False),
            torch.nn.BatchNorm2d(4 * width),
        )
        return block


@pytest.mark.once
def test_weights_that_look_like_torchvisions_are_refused_by_a_v1_model():
    state = TorchBottlenecks("3x3").state_dict()
    model = bottleneck_net("1x1")
    before = weights_of(model)
    with pytest.raises(InputError, match=r"strides on the 1x1: the shapes are the same"):
        load_torchvision(model, state)
    assert_untouched(model, before)
    assert load_torchvision(model, state, allow_other_strides=True).ok
    assert load_torchvision(bottleneck_net("3x3"), state).ok


@pytest.mark.once
def test_a_module_shows_where_it_strides():
    load_torchvision(bottleneck_net("1x1"), TorchBottlenecks("1x1"))
    load_torchvision(bottleneck_net("3x3"), TorchBottlenecks("3x3"))
    for own, theirs in (("1x1", "3x3"), ("3x3", "1x1")):
        with pytest.raises(InputError, match=f"strides on the {theirs} .* on the {own}"):
            load_torchvision(bottleneck_net(own), TorchBottlenecks(theirs))


@pytest.mark.once
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_written_here_says_where_it_strides(tmp_path, suffix):
    path = tmp_path / f"v1{suffix}"
    with pytest.warns(UserWarning, match="torchvision's model of these shapes strides on the 3x3"):
        save_torchvision(bottleneck_net("1x1"), path)
    assert inspect_checkpoint(path).metadata["stride_on"] == "1x1"
    assert load_torchvision(bottleneck_net("1x1"), path).ok
    with pytest.raises(InputError, match="the file's metadata"):
        load_torchvision(bottleneck_net("3x3"), path)


@pytest.mark.once
def test_the_refusal_names_the_row_to_use(torchvision):
    model = create_model("resnet50_v1", input_shape=(SIZE, SIZE, 3))
    with pytest.raises(InputError, match=r"Either use resnet50, or pass allow_other_strides=True"):
        load_torchvision(model, torchvision.models.resnet50())


@pytest.mark.once
def test_a_published_file_is_known_by_its_hash_whatever_its_name(tmp_path, monkeypatch):
    """The registry's hashes are the real files'; here a small file stands for one of them."""
    state = torch_resnet20()
    path = tmp_path / "renamed.pth"
    torch.save(state, path)
    row = published.resolve_weights("resnet50", "IMAGENET1K_V1")
    fake = row.__class__(**{**row.__dict__, "sha256_prefix": download.file_sha256(path)[:8]})
    monkeypatch.setattr(published, "registry", lambda: (fake,))
    unnamed = create_model("resnet20")
    load_torchvision(unnamed, path)
    assert "class_names" not in unnamed.info  # a thousand names are none of ten outputs
    monkeypatch.setattr(published, "imagenet_class_names", lambda: list("abcdefghij"))
    model = create_model("resnet20")
    load_torchvision(model, path)
    assert model.info["weights"]["published_as"] == "resnet50 IMAGENET1K_V1"
    assert Preprocess.from_config(model.info["preprocess"]) == row.preprocess
    assert model.info["class_names"] == list("abcdefghij")
    new_head = create_model("resnet20", num_classes=3)
    load_torchvision(new_head, path, head="skip")
    assert "class_names" not in new_head.info and "preprocess" in new_head.info


# --- Proof --------------------------------------------------------------------------------------


def test_a_single_changed_weight_is_found_where_it_is(resnet20):
    state = torch_resnet20()
    load_torchvision(resnet20, state)
    assert verify(resnet20, state).passed
    kernel = resnet20.get_layer("layer2_1_conv2").kernel
    value = keras.ops.convert_to_numpy(kernel.value).copy()
    value[1, 1, 3, 5] += 1.0
    kernel.assign(value)
    report = verify(resnet20, state)
    assert not report.passed and report.first_difference == "layer2"
    errors = {name: error for name, _, error in report.stages}
    assert errors["layer1"] < 1e-5 < 1e-4 < errors["layer2"]
    assert "DIFFERS from 'layer2' on" in str(report) and "<-- differs" in str(report)


def test_nan_never_passes(tmp_path, resnet20):
    state = torch_resnet20()
    load_torchvision(resnet20, state)
    resnet20.get_layer("bn1").beta.assign(np.full(16, np.nan, np.float32))
    report = verify(resnet20, state)
    assert not report.passed and report.first_difference == "stem"
    assert json.loads(report.to_json())["passed"] is False


@pytest.mark.once
@pytest.mark.slow
def test_swapped_strides_are_found_in_layer2(torchvision):
    module = randomise_statistics(torchvision.models.resnet50(num_classes=10))
    model = create_model("resnet50_v1", num_classes=10, input_shape=(SIZE, SIZE, 3))
    load_torchvision(model, module, allow_other_strides=True)
    report = verify(model, module)  # the module shows its strides
    assert report.first_difference == "layer2" and "3x3" in report.strides
    state = module.state_dict()
    assert verify(model, state, stride_on="3x3").first_difference == "layer2"
    unknown = verify(model, state)
    assert unknown.passed and "the source does not say" in unknown.strides


def test_a_failed_proof_puts_the_old_weights_back(resnet20):
    state = torch_resnet20()
    resnet20.get_layer("bn1").epsilon = 10.0
    before = weights_of(resnet20)
    with pytest.raises(InputError, match="answer differently from 'stem' on"):
        load_torchvision(resnet20, state, verify=True)
    assert_untouched(resnet20, before)


def test_preprocessing_dropout_and_softmax_do_not_disturb_the_proof():
    state = torch_resnet20()
    model = create_model(
        "resnet20", include_preprocessing=True, dropout=0.3, classifier_activation="softmax"
    )
    load_torchvision(model, state)
    report = verify(model, state)
    assert report.passed and report.head_compared
    pixels = np.full((2, 32, 32, 3), 255, np.float32)
    assert verify(model, state, images=pixels).passed


def test_open_sides_take_the_asked_size():
    state = torch_resnet20()
    model = create_model("resnet20", input_shape=(None, None, 3))
    load_torchvision(model, state)
    assert verify(model, state, image_size=(40, 24)).images == (1, 40, 24, 3)
    assert verify(model, state).images == (1, 32, 32, 3)
    with pytest.raises(InputError, match="takes images of"):
        verify(create_model("resnet20"), state, image_size=40)


@pytest.mark.once
def test_planning_needs_no_torch(monkeypatch, resnet20):
    """Arrays are told by what they have, so a machine without torch imports all the same."""
    assert "torch" not in vars(sources)
    state = {key: tensor.numpy() for key, tensor in torch_resnet20().items()}
    monkeypatch.setattr(torch.Tensor, "detach", None)
    assert sources.read_source(state, None, expected_keys(resnet20), None).shapes


@pytest.mark.once
@pytest.mark.parametrize("channels, how", [(1, "summed for 1"), (5, "repeated and scaled for 5")])
def test_rgb_weights_fit_other_channels_as_timm_adapts_them(channels, how, tmp_path):
    rgb = create_model("resnet_tiny")
    path = tmp_path / "rgb.pth"
    save_torchvision(rgb, path)
    model = create_model("resnet_tiny", weights=path, input_shape=(16, 16, channels))
    stem, theirs = (m.get_layer("conv1").get_weights()[0] for m in (model, rgb))
    expected = (
        theirs.sum(2, keepdims=True) if channels == 1 else theirs[:, :, [0, 1, 2, 0, 1]] * 0.6
    )
    np.testing.assert_allclose(stem, expected, rtol=1e-6)
    timm = pytest.importorskip("timm.models._manipulate")
    torch = pytest.importorskip("torch")
    torch_stem = timm.adapt_input_conv(channels, torch.tensor(theirs.transpose(3, 2, 0, 1)))
    np.testing.assert_allclose(stem.transpose(3, 2, 0, 1), torch_stem.numpy(), rtol=1e-6)
    assert verify(model, path).passed
    report = load_torchvision(model, path)
    assert str(report).splitlines()[0].endswith(f"; conv1.weight of 3 channels {how}")
    assert how in model.info["weights"]["adapted"]
