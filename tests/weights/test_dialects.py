"""The same network under other names: read with the same numbers, and written back bit by bit."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import pickle
import struct
import tracemalloc

import keras
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_load import answers, randomise_statistics, relative

import keras_resnet as kr
from keras_resnet.cli.main import main
from keras_resnet.data.preprocess import Preprocess
from keras_resnet.models import resnet
from keras_resnet.models.files import convert_file, load_model, model_preprocess
from keras_resnet.models.zoo import create_model
from keras_resnet.system.errors import CheckpointError, InputError
from keras_resnet.variants import COUNTER, SPECS, ResNetSpec
from keras_resnet.weights import h5_files, sources
from keras_resnet.weights.checkpoint import inspect_checkpoint, read_checkpoint
from keras_resnet.weights.dialects import DIALECTS, PIXELS, WORDS, names_in
from keras_resnet.weights.load import load_torchvision
from keras_resnet.weights.mapping import expected_keys, save_torchvision, to_torchvision
from keras_resnet.weights.matching import find_networks, grouped, spec_shapes
from keras_resnet.weights.sources import read_source
from keras_resnet.weights.verify import verify
from keras_resnet.weights.writing import write_checkpoint

pytestmark = pytest.mark.once

# Facts, each out of a state dict that the class itself gave, or its project's own converter.
STAGES = "resnet.encoder.stages"
FACTS = {
    "huggingface": {
        "conv1.weight": "resnet.embedder.embedder.convolution.weight",
        "bn1.running_var": "resnet.embedder.embedder.normalization.running_var",
        "layer1.0.downsample.0.weight": f"{STAGES}.0.layers.0.shortcut.convolution.weight",
        "layer1.0.downsample.1.bias": f"{STAGES}.0.layers.0.shortcut.normalization.bias",
        "layer4.2.conv3.weight": f"{STAGES}.3.layers.2.layer.2.convolution.weight",
        "layer2.1.bn1.weight": f"{STAGES}.1.layers.1.layer.0.normalization.weight",
        "fc.bias": "classifier.1.bias",
    },
    "sequential": {
        "conv1.weight": "0.weight",
        "bn1.running_mean": "1.running_mean",
        "layer1.0.downsample.0.weight": "4.0.downsample.0.weight",
        "layer4.2.bn3.num_batches_tracked": "7.2.bn3.num_batches_tracked",
        "fc.weight": "9.weight",
    },
    "detectron2": {
        "conv1.weight": "stem.conv1.weight",
        "bn1.weight": "stem.conv1.norm.weight",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer1.0.downsample.1.running_mean": "res2.0.shortcut.norm.running_mean",
        "layer4.2.bn3.bias": "res5.2.conv3.norm.bias",
        "fc.weight": "linear.weight",
    },
    "mmpretrain": {
        "conv1.weight": "backbone.conv1.weight",
        "layer1.0.downsample.1.bias": "backbone.layer1.0.downsample.1.bias",
        "fc.weight": "head.fc.weight",
    },
    "timm": {name: name for name in ("conv1.weight", "layer1.0.downsample.1.bias", "fc.weight")},
    "keras": {
        "conv1.weight": "conv1_conv.kernel",
        "bn1.running_var": "conv1_bn.moving_variance",
        "layer1.0.downsample.0.weight": "conv2_block1_0_conv.kernel",
        "layer4.2.conv3.weight": "conv5_block3_3_conv.kernel",
        "layer2.1.bn1.weight": "conv3_block2_1_bn.gamma",
        "fc.bias": "predictions.bias",
    },
}


def test_every_dialect_has_its_facts():
    assert ("torchvision", *FACTS) == (*WORDS, "keras")
    assert {dialect.name for dialect in DIALECTS} == FACTS.keys()


@pytest.mark.parametrize("to", FACTS)
def test_names_are_those_of_the_class(to):
    names = names_in(to, spec_shapes(SPECS["resnet50_v1"]))[1]
    assert {ours: names[ours] for ours in FACTS[to]} == FACTS[to]


def test_the_stem_of_openmmlabs_d_variant_is_a_list_of_modules():
    names = names_in("mmpretrain", spec_shapes(SPECS["resnet50d"]))[1]
    facts = {
        "conv1.3.weight": "backbone.stem.1.conv.weight",
        "bn1.weight": "backbone.stem.2.bn.weight",
        "layer1.0.downsample.1.weight": "backbone.layer1.0.downsample.0.weight",
        "layer2.0.downsample.1.weight": "backbone.layer2.0.downsample.1.weight",
    }
    assert {ours: names[ours] for ours in facts} == facts


@pytest.mark.parametrize(
    "name", ["resnet34", "resnet50", "resnet50d", "resnet20", "alexnet", "resnetv2_50"]
)
def test_a_network_is_found_by_its_names_in_each_dialect_that_has_it(name):
    shapes = spec_shapes(SPECS[name])
    spoken = []
    for to in FACTS:
        try:
            dialect, names = names_in(to, shapes)
        except InputError:
            continue
        spoken.append(to)
        there = {f"model.{theirs}": shapes[ours] for ours, theirs in names.items()}
        (found,) = find_networks(there | {"loss.weight": (1000,)})
        spoken_as = "torchvision" if dialect.of == "timm's ResNet" else to  # one and the same
        assert (found.prefix, found.dialect.name) == ("model.", spoken_as)
        assert {ours: theirs for ours, theirs in found.names.items()} == {
            ours: f"model.{theirs}" for ours, theirs in names.items()
        }
        assert (name, SPECS[name].num_classes) in found.variants
        assert found.beside == ("loss.weight",) and not found.near
        if dialect.trunk:  # the body alone, without what is around it
            body = {names[k].removeprefix(dialect.trunk): v for k, v in shapes.items()
                    if k in names and not k.startswith("fc")}  # fmt: skip
            (found,) = find_networks(body)
            assert (name, None) in found.variants and len(found.names) == len(body)
    both = ["sequential", "mmpretrain", "timm"]
    assert spoken == {
        "resnet34": [*FACTS][:-1], "resnet50": [*FACTS], "resnet50d": both,
        "resnet20": both[:1], "alexnet": both[:1], "resnetv2_50": ["timm", "keras"],
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("resnext50_32x4d", "huggingface", "no groups"),
        ("wide_resnet50_2", "huggingface", "no wider bottlenecks"),
        ("resnet20", "detectron2", "no first kernel of 3x3"),
        ("resnetv2_50", "sequential", "no name for 'bn.weight'"),
        ("resnet50_v2", "timm", "no biases in its convolutions"),
        ("resnet20", "timm", "no first kernel of 3x3"),
        ("resnet50_v1_relu", "sequential", "no name for 'stage1.0.conv1.weight'"),
    ],
)
def test_a_class_that_has_no_such_network_is_not_written_for(name, to, words):
    with pytest.raises(InputError, match=words):
        names_in(to, spec_shapes(SPECS[name]))


def test_batch_norms_without_statistics_are_no_group_norms(tmp_path):
    shapes = spec_shapes(SPECS["resnet50"])
    bare = {k: v for k, v in shapes.items() if not k.endswith(("mean", "var", COUNTER))}
    for to in ("huggingface", "mmpretrain", "detectron2"):
        with pytest.raises(InputError, match="no group norms"):
            names_in(to, bare)
        if to != "mmpretrain":  # whose body has torchvision's names
            names = names_in(to, shapes)[1]
            assert not find_networks({names[k]: v for k, v in bare.items()})
    write_checkpoint(tmp_path / "a.pth", {k: np.zeros(v, "f4") for k, v in bare.items()})
    with pytest.raises(InputError, match=r"no statistics of batch norms: .*--model resnet50_gn"):
        convert_file(tmp_path / "a.pth", tmp_path / "a.keras")


def test_openmmlabs_caffe_style_strides_elsewhere_and_takes_bgr(tmp_path):
    arrays = to_torchvision(network(BOTTLENECKS)).items()
    state = {f"backbone.{k}": torch.tensor(v) for k, v in arrays if "fc." not in k}
    for style, field in (("caffe", "config"), ("caffe", "cfg"), ("pytorch", "config")):
        text = f"model = dict(\n    backbone=dict(depth=50, style='{style}'))" + " " * 100
        file = tmp_path / f"{style}.pth"
        torch.save({"meta": {field: text, "CLASSES": ("a",)}, "state_dict": state}, file)
        found = read_source(file, None, expected_keys(network(BOTTLENECKS)), "fc")
        assert found.strides == {"caffe": "1x1", "pytorch": "3x3"}[style]
        assert ("BGR" in found.other_pixels) == (style == "caffe")
    with pytest.raises(InputError, match=r"strides on the 1x1 convolutions .style='caffe' in its"):
        load_torchvision(network(BOTTLENECKS), tmp_path / "caffe.pth", head="skip")


def test_a_file_written_again_keeps_what_it_said_and_names_what_it_lacks(tmp_path):
    state = {f"backbone.{k}": v for k, v in to_torchvision(create_model("resnet20")).items()}
    state["projector.0.weight"] = np.zeros((4, 4), "f4")
    write_checkpoint(tmp_path / "a.pth", state, metadata={"stride_on": "1x1"})
    convert_file(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert inspect_checkpoint(tmp_path / "b.safetensors").metadata == {"stride_on": "1x1"}
    done = convert_file(tmp_path / "a.pth", tmp_path / "c.pth", to="sequential")
    assert "Left out: projector.0.weight." in done.lines
    model = network(BOTTLENECKS)
    with pytest.warns(UserWarning, match=r"takes BGR pixels .*INPUT\.FORMAT"):
        save_torchvision(model, tmp_path / "d.pth", "detectron2")


@pytest.mark.parametrize("to", ["keras", "detectron2"])
def test_networks_that_may_take_bgr_pixels_say_so(to, tmp_path, monkeypatch):
    v1 = dataclasses.replace(BOTTLENECKS, stride_on="1x1")
    monkeypatch.setitem(SPECS, "small_v1", dataclasses.replace(v1, name="small_v1"))
    monkeypatch.setitem(SPECS, "small", dataclasses.replace(BOTTLENECKS, name="small"))
    model = create_model("small_v1", num_classes=10)
    names = names_in(to, expected_keys(model))[1]
    state = {names[k]: v for k, v in to_torchvision(model).items() if k in names}
    with pytest.warns(UserWarning, match=r"takes BGR pixels of 0\.\.255 less \[103"):
        report = load_torchvision(model, state, allow_other_strides=True)
    assert "BGR" in str(report) and "preprocess" not in model.info
    inside = create_model("small_v1", num_classes=10, include_preprocessing=True)
    with pytest.raises(InputError, match=r"BGR.*normalises inside"):
        load_torchvision(inside, state, allow_other_strides=True)
    write_checkpoint(tmp_path / "a.pth", state)
    with pytest.warns(UserWarning, match="BGR"):
        done = convert_file(tmp_path / "a.pth", tmp_path / "a.keras", allow_other_strides=True)
    made = load_model(tmp_path / "a.keras")
    assert "preprocess" not in made.info and "not assumed" in str(done) and "BGR" in str(done)
    assert made.name == "small_v1"  # as both stride unless told otherwise


# --- Against the real classes --------------------------------------------------------------------

NARROW = ResNetSpec("narrow", (1, 2), widths=(8, 16))
BOTTLENECKS = ResNetSpec("bottlenecks", (1, 2), bottleneck=True, widths=(8, 16))


def network(spec: ResNetSpec, num_classes: int = 10):
    x = keras.Input((64, 64, 3))
    return keras.Model(x, resnet.head(resnet.features(x, spec), spec, num_classes, 0, None))


def pictures(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, 64, 64)).astype(np.float32)


def assert_same_both_ways(model, module, state, to: str, file, key=lambda name: name) -> float:
    """The model answers as the module whose state it took, and gives the state back."""
    report = load_torchvision(model, state)
    assert report.ok and report.names == next(d.of for d in DIALECTS if d.name == to)
    theirs = module(pictures())
    error = relative(answers(model, pictures()), theirs)
    assert error < 1e-5
    assert verify(model, state).passed
    back = to_torchvision(model, to)
    wanted = {k: np.asarray(v) for k, v in state.items() if k in back or not k.endswith(COUNTER)}
    assert back.keys() == wanted.keys()
    same = (back[k].tobytes() == v.tobytes() for k, v in wanted.items() if not k.endswith(COUNTER))
    assert all(same)  # a plain Keras model counts no batches
    save_torchvision(model, file, to)
    assert load_torchvision(model, file).ok and verify(model, file).passed
    return error


@pytest.mark.slow
@pytest.mark.parametrize("spec", [NARROW, BOTTLENECKS], ids=lambda spec: spec.name)
def test_hugging_faces(spec, torchvision, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, depths=list(spec.blocks), num_labels=10,
        hidden_sizes=[32, 64] if spec.bottleneck else [8, 16],
        layer_type="bottleneck" if spec.bottleneck else "basic",
    )  # fmt: skip
    module = randomise_statistics(transformers.ResNetForImageClassification(config))

    def logits(images):
        with torch.no_grad():
            return module(torch.from_numpy(images)).logits.numpy()

    model = network(spec)
    assert_same_both_ways(model, logits, module.state_dict(), "huggingface", tmp_path / "a.pth")
    # as a folder: safetensors, and the config that says where it strides
    module.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    assert load_torchvision(model, file).ok
    save_torchvision(model, file, "huggingface")
    back = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "hf")
    before = module.state_dict()
    same = (torch.equal(v, before[k]) for k, v in back.state_dict().items() if COUNTER not in k)
    assert all(same)
    module.config.downsample_in_bottleneck = True
    module.save_pretrained(tmp_path / "hf")
    if spec.bottleneck:
        with pytest.raises(InputError, match=r"strides on the 1x1 convolutions \(its config.json"):
            load_torchvision(model, file)
    module.config.downsample_in_first_stage = True
    module.config.save_pretrained(tmp_path / "hf")
    with pytest.raises(InputError, match="downsample_in_first_stage = True"):
        load_torchvision(model, file)


def timms_preactivated(spec: ResNetSpec) -> torch.nn.Module:
    timm = pytest.importorskip("timm.models.resnetv2")
    wide = [4 * w if spec.bottleneck else w for w in spec.widths]
    return randomise_statistics(
        timm.ResNetV2(
            layers=spec.blocks, channels=wide, stem_chs=8, num_classes=10,
            basic=not spec.bottleneck, bottle_ratio=0.25 if spec.bottleneck else 1.0,
            norm_layer=timm.BatchNormAct2d, conv_layer=timm.create_conv2d,
        )
    )  # fmt: skip


@pytest.mark.parametrize("spec", [NARROW, BOTTLENECKS], ids=lambda spec: spec.name)
def test_timms_preactivated(spec, torchvision, tmp_path):
    module, images = timms_preactivated(spec), pictures()

    def logits(images):
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    spec, state = dataclasses.replace(spec, preactivation=True), module.state_dict()
    model = network(spec)
    model = kr.ImageModel(model.inputs, model.outputs)
    assert sorted(names_in("timm", expected_keys(model))[1].values()) == sorted(state)
    assert_same_both_ways(model, logits, state, "timm", tmp_path / "a.pth")
    # What the addition reads as well is no norm's alone: nothing folds into it.
    turned = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    folded = kr.optimize_for_inference(model)
    assert folded.info["optimized"]["folded_norms"] == sum(spec.blocks) * (1 + spec.bottleneck)
    for one in (model, folded):
        assert relative(one.predict_on_batch(turned), logits(images)) < 1e-5


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
@pytest.mark.parametrize("spec", [NARROW, BOTTLENECKS], ids=lambda spec: spec.name)
def test_preactivated_gradients(spec, torchvision, dtype, tmp_path):
    module = timms_preactivated(spec).double().train()
    torch.save(module.state_dict(), tmp_path / "a.pth")
    model = network(dataclasses.replace(spec, preactivation=True))
    model = kr.ImageModel(model.inputs, model.outputs)
    assert load_torchvision(model, tmp_path / "a.pth").ok
    images = torch.from_numpy(pictures()).double()
    (module(images) ** 2).sum().backward()
    (model(images.permute(0, 2, 3, 1), training=True) ** 2).sum().backward()
    ours = model.get_layer("conv1").kernel.value.grad.numpy().transpose(3, 2, 0, 1)
    assert relative(ours, module.stem.conv.weight.grad.numpy()) < 1e-10


@pytest.mark.slow
def test_sequential_children_and_a_fastai_learner(torchvision, tmp_path):
    block = torchvision.models.resnet.BasicBlock
    module = randomise_statistics(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10))
    *body, head = module.children()
    model = network(ResNetSpec("four", (1, 1, 1, 1)))

    def logits(images):
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    children = torch.nn.Sequential(*body, head).state_dict()
    assert_same_both_ways(model, logits, children, "sequential", tmp_path / "a.safetensors")
    before = to_torchvision(model)
    flattened = torch.nn.Sequential(*body, torch.nn.Flatten(), head)
    assert load_torchvision(network(ResNetSpec("four", (1, 1, 1, 1))), flattened).ok
    # a learner: the body under 0, and a head of fastai's own under 1
    norm, linear = torch.nn.BatchNorm1d(1024), torch.nn.Linear(1024, 10)
    learner = torch.nn.Sequential(
        torch.nn.Sequential(*body[:-1]), torch.nn.Sequential(norm, linear)
    )
    torch.save({"model": learner.state_dict(), "opt": {}}, tmp_path / "learner.pth")
    with pytest.raises(InputError, match="has no 'fc' as"):
        load_torchvision(model, tmp_path / "learner.pth")
    report = load_torchvision(model, tmp_path / "learner.pth", head="skip")
    assert report.prefix == "0." and all(name.startswith("1.") for name in report.left_out)
    assert len(report.left_out) == 7 and "left out     1." in str(report)
    after = to_torchvision(model)
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)


def converted_by_detectron2(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What tools/convert-torchvision-to-d2.py does to the names, step by step."""
    out = {}
    for name, array in state.items():
        name = name if "layer" in name else f"stem.{name}"
        for i in (1, 2, 3, 4):
            name = name.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        out[name] = array
    return out


def test_detectron2s_pickles(tmp_path):
    state = to_torchvision(network(BOTTLENECKS))
    named = converted_by_detectron2(state)
    file = tmp_path / "r50.pkl"
    # above the size that a state dict's own pickle may have
    content = {"model": named, "__author__": "torchvision", "large": np.zeros(5_000_000, "f4")}
    file.write_bytes(pickle.dumps(content))
    about = inspect_checkpoint(file)
    assert about.safe and about.format == "pickle" and about.problem is None
    model = network(BOTTLENECKS)
    report = load_torchvision(model, file)
    assert report.ok and report.names == "Detectron2's ResNet"
    assert all(v.tobytes() == state[k].tobytes() for k, v in to_torchvision(model).items())
    large = file.rename(tmp_path / "r50.pth")  # no name for arrays in a pickle
    with pytest.raises(CheckpointError, match="a length of 20,000,000 bytes"):
        inspect_checkpoint(large)
    with pytest.raises(InputError, match="does not say where its bottlenecks stride"):
        load_torchvision(model, named)
    # a detector: what is beside the backbone is named
    zoo = {f"backbone.bottom_up.{k}": v for k, v in named.items() if not k.startswith("stem.fc")}
    zoo["roi_heads.box_head.fc1.weight"] = np.zeros((4, 4), np.float32)
    report = load_torchvision(model, zoo, head="skip", allow_other_strides=True)
    assert report.prefix == "backbone.bottom_up." and len(report.left_out) == 1
    # what is no dict of arrays, or wants to run something, is refused as ever
    file.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.array([print])}}))
    assert not inspect_checkpoint(file).safe


def of_python_2(arrays: dict[str, np.ndarray]) -> bytes:
    """A pickle of protocol 2 as Python 2 wrote it: the arrays' numbers are text."""
    out = b"\x80\x02}("
    for name, array in arrays.items():
        out += b"U" + bytes([len(name)]) + name.encode()
        out += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
        out += b"".join(b"J" + struct.pack("<i", side) for side in array.shape) + b"t"
        out += b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN" + 2 * b"J\xff\xff\xff\xff"
        out += b"K\x00tb\x89T" + struct.pack("<i", array.nbytes) + array.tobytes() + b"tb"
    return out + b"u."


def test_caffe2s_pickles_of_python_2(tmp_path, rng):
    (theirs,) = (d for d in DIALECTS if d.of == "Caffe2's ResNet")
    facts = {  # detectron2/checkpoint/c2_model_loading.py, the other way round
        "conv1.weight": "conv1_w", "bn1.weight": "res_conv1_bn_s", "fc.bias": "fc1000_b",
        "layer1.0.downsample.0.weight": "res2_0_branch1_w",
        "layer1.0.downsample.1.bias": "res2_0_branch1_bn_b",
        "layer4.2.conv3.weight": "res5_2_branch2c_w", "layer4.2.bn1.bias": "res5_2_branch2a_bn_b",
    }  # fmt: skip
    assert {ours: theirs(ours) for ours in facts} == facts
    model = network(dataclasses.replace(BOTTLENECKS, stride_on="1x1"))
    blobs = {
        theirs(k): rng.normal(size=shape).astype("f4")
        for k, shape in expected_keys(model).items()
        if not k.endswith(("running_mean", "running_var", COUNTER))
    }
    more = {"conv1_b": np.zeros(8, "f4"), "conv1_w_momentum": np.zeros((8, 3, 7, 7), "f4")}
    more["large_w_momentum"] = rng.normal(size=5_000_000).astype("f4")
    file, raw = tmp_path / "R-50.pkl", of_python_2(blobs | more)
    file.write_bytes(raw)
    there = pickle.loads(raw, encoding="latin1")
    assert all(np.array_equal(there[k], v) for k, v in (blobs | more).items())
    assert inspect_checkpoint(file).safe
    tracemalloc.start()
    about, found = inspect_checkpoint(file), read_checkpoint(file)
    assert tracemalloc.get_traced_memory()[1] < 4e6  # the numbers stay where they are
    tracemalloc.stop()
    assert about.problem is None
    assert all(found[k].tobytes() == v.tobytes() for k, v in blobs.items())
    with pytest.raises(InputError, match="does not say where its bottlenecks stride"):
        load_torchvision(model, file)
    with pytest.warns(UserWarning, match="BGR"):
        report = load_torchvision(model, file, allow_other_strides=True)
    assert report.ok and sorted(report.left_out) == sorted(more)
    for key, array in to_torchvision(model).items():
        if key.endswith("running_var"):  # a frozen norm's: with the epsilon a deviation of 1
            assert np.allclose(array + np.float32(1e-5), 1, atol=1e-7)
        elif key.endswith("running_mean"):
            assert not array.any()
        elif not key.endswith(COUNTER):
            assert array.tobytes() == blobs[theirs(key)].tobytes()
    # Python 3 writes protocol 2 with the numbers as text in UTF-8
    file = tmp_path / "again.pkl"
    file.write_bytes(pickle.dumps(blobs | more, protocol=2))
    found = read_checkpoint(file)
    assert all(found[k].tobytes() == v.tobytes() for k, v in (blobs | more).items())


def test_a_model_is_made_for_ordinary_pixels_of_weights_for_others(tmp_path, monkeypatch, rng):
    v1 = dataclasses.replace(BOTTLENECKS, name="small_v1", stride_on="1x1", input_size=64)
    monkeypatch.setitem(SPECS, "small_v1", v1)
    model = create_model("small_v1", num_classes=10)
    names = names_in("keras", expected_keys(model))[1]
    state = {names[k]: v for k, v in to_torchvision(model).items() if k in names}
    write_checkpoint(tmp_path / "a.pth", state)
    pixels = rng.integers(0, 256, (2, 64, 64, 3)).astype("float32")
    for mode in PIXELS:
        done = convert_file(tmp_path / "a.pth", tmp_path / "a.keras", pixels=mode)
        assert done.passed and "BGR" not in str(done)
        made = load_model(tmp_path / "a.keras")
        found = model_preprocess(made)
        own = ((pixels / 255 - found.mean) / found.std).astype("float32")
        prepared = keras.applications.imagenet_utils.preprocess_input(pixels.copy(), mode=mode)
        expected = model.predict_on_batch(prepared)
        assert relative(made.predict_on_batch(own), expected) < 1e-4
    with pytest.raises(InputError, match=r"pixels='tf' is for a checkpoint that becomes a .keras"):
        convert_file(tmp_path / "a.pth", tmp_path / "b.pth", pixels="tf")
    command = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.keras"), "--pixels", "caffe"]
    assert main([*command, "--mean", "0.5", "0.5", "0.5"]) == 2


def test_hdf5_goes_to_its_library_by_its_name_and_not_deep(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["/".join(["a"] * 17)] = np.zeros(2, "f4")
    assert len(read_checkpoint(tmp_path / "a.h5")) == 1
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["/".join(["a"] * 16 + ["b", "c"])] = np.zeros(2, "f4")
    with pytest.raises(CheckpointError, match="in more than 16 groups"):
        read_checkpoint(tmp_path / "a.h5")
    with pytest.raises(CheckpointError, match=r"it is an HDF5 file, .* rename it to end in"):
        read_checkpoint((tmp_path / "a.h5").rename(tmp_path / "a.pth"))


def test_names_of_thousands_of_parts_are_passed_over():
    deep = dict.fromkeys([f"{'a.' * 5_000}{i}" for i in range(2)], ())
    tracemalloc.start()
    assert sources._most_like(deep | {"m.a.b": (), "m.c": ()}, {"a.b": (), "c": ()}) == ["m."]
    assert sources._most_like(deep, {}) == []
    assert tracemalloc.get_traced_memory()[1] < 1e6  # not each name's beginnings, 50 MB
    tracemalloc.stop()
    assert grouped(deep) == ", ".join(deep)
    assert grouped(["a.b.c", "a.b.d.e", "a.b.d.f"]) == "a.b.c, a.b.d.* (2)"


def test_keras_files_have_torchs_axes_and_the_layers_names(tmp_path):
    inside = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, (3, 2), name="conv1_conv"),
            keras.layers.BatchNormalization(name="conv1_bn"),
        ],
        name="resnet50",
    )
    x = keras.Input((8, 8, 3))
    top = keras.layers.Dense(2, name="top")
    model = keras.Model(x, top(keras.layers.GlobalAveragePooling2D()(inside(x))))
    model.save_weights(tmp_path / "a.weights.h5")
    model.save(tmp_path / "a.h5")
    kernel = keras.ops.convert_to_numpy(inside.layers[0].kernel)
    for name in ("a.weights.h5", "a.h5"):
        found = read_checkpoint(tmp_path / name)
        norms = ("gamma", "beta", "moving_mean", "moving_variance")
        assert found.keys() == {
            *("resnet50.conv1_conv.kernel", "resnet50.conv1_conv.bias", "top.kernel", "top.bias"),
            *(f"resnet50.conv1_bn.{norm}" for norm in norms),
        }
        assert np.array_equal(found["resnet50.conv1_conv.kernel"], kernel.transpose(3, 2, 0, 1))
        assert found["top.kernel"].shape == (2, 4)


@pytest.mark.slow
def test_keras_applications(tmp_path, rng, monkeypatch):
    theirs = keras.applications.ResNet50(
        weights=None, classes=10, input_shape=(64, 64, 3), classifier_activation=None
    )
    randomise(theirs, rng)
    theirs.save_weights(tmp_path / "a.weights.h5")
    model = create_model("resnet50_v1", num_classes=10, input_shape=(64, 64, 3))
    report = load_torchvision(model, tmp_path / "a.weights.h5")
    assert report.ok and report.names == "keras.applications' ResNet"
    assert report.variants == (("resnet50", 10), ("resnet50_v1", 10))
    images = pictures().transpose(0, 2, 3, 1)
    assert relative(model.predict_on_batch(images), theirs.predict_on_batch(images)) < 1e-4
    about = inspect_checkpoint(tmp_path / "a.weights.h5")
    assert "resnet50_v1, 10 classes, named as in keras.applications'" in str(about)
    assert "left out" not in str(about)
    assert sources.read_source(tmp_path / "a.weights.h5", None).strides == "1x1"
    # one of its own ImageNet files, which take BGR pixels: here RGB, and as `preprocess_input` does
    digest = hashlib.md5((tmp_path / "a.weights.h5").read_bytes()).hexdigest()
    monkeypatch.setattr(h5_files, "_IMAGENET", {digest: "caffe"})
    load_torchvision(model, tmp_path / "a.weights.h5", head="skip")
    pixels = rng.integers(0, 256, (2, 64, 64, 3))
    prepared = keras.applications.resnet.preprocess_input(pixels.astype("float32"))
    found = model_preprocess(model)
    own = ((pixels / 255 - found.mean) / found.std).astype("float32")
    assert relative(model.predict_on_batch(own), theirs.predict_on_batch(prepared)) < 1e-4


def randomise(model: keras.Model, rng) -> None:
    """Statistics and biases of a Keras model as training might leave them."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            ranges = ((0.5, 1.5), (-0.3, 0.3), (-0.3, 0.3), (1e-4, 1.5))
            layer.set_weights([rng.uniform(*ends, layer.gamma.shape) for ends in ranges])
        elif isinstance(layer, keras.layers.Conv2D) and layer.bias is not None:
            layer.bias.assign(rng.uniform(-0.3, 0.3, layer.bias.shape))


def test_keras_applications_preactivated(tmp_path, rng):
    resnets = inspect.getmodule(keras.applications.ResNet50V2).resnet

    def stages(x):
        x = resnets.stack_residual_blocks_v2(x, 64, 2, name="conv2")
        return resnets.stack_residual_blocks_v2(x, 16, 2, stride1=1, name="conv3")

    theirs = resnets.ResNet(
        stages, True, True, weights=None, classes=10, input_shape=(64, 64, 3),
        classifier_activation=None,
    )  # fmt: skip
    randomise(theirs, rng)
    theirs.save_weights(tmp_path / "a.weights.h5")
    row = SPECS["resnet50_v2"]
    model = network(dataclasses.replace(row, blocks=(2, 2), widths=(64, 16)))
    with pytest.warns(UserWarning, match=r"takes RGB pixels of -1\.\.1 unless told otherwise"):
        report = load_torchvision(model, tmp_path / "a.weights.h5")
    assert report.ok and report.names == "keras.applications' ResNetV2"
    images = pictures().transpose(0, 2, 3, 1)
    expected = theirs.predict_on_batch(images)
    for one in (model, kr.ImageModel(model.inputs, model.outputs)):
        assert relative(one.predict_on_batch(images), expected) < 3e-5
    assert verify(model, tmp_path / "a.weights.h5").passed
    published = {"resnet50_v2": 25_613_800, "resnet101_v2": 44_675_560, "resnet152_v2": 60_380_648}
    for name, count in published.items():  # of keras.io/api/applications, statistics included
        shapes = [v for k, v in spec_shapes(SPECS[name]).items() if not k.endswith(COUNTER)]
        assert sum(map(math.prod, shapes)) == count


def test_a_file_is_written_in_the_names_of_a_dialect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = create_model("resnet20")
    model.info["class_names"], model.info["options"]["task"] = list("abcdefghij"), "multi-label"
    model.info["preprocess"] = Preprocess.for_size(32).get_config()
    model.info["calibration"] = {"temperature": 2.0, "thresholds": [0.5] * 10}
    model.save("a.keras")
    assert main(["convert", "a.keras", "b.pth", "--to", "sequential"]) == 0
    line = "class names, how images are prepared, its task (multi-label), its temperature, its thr"
    assert capsys.readouterr().out.count(line) == 1
    assert "4.2.bn2.weight" in read_checkpoint("b.pth")
    assert main(["convert", "b.pth", "c.safetensors", "--to", "torchvision"]) == 0
    found, state = read_checkpoint("c.safetensors"), to_torchvision(model)
    assert all(found[k].tobytes() == v.tobytes() for k, v in state.items())
    assert main(["convert", "a.keras", "d.pth", "--to", "huggingface"]) == 2
    assert "has no first kernel of 3x3" in capsys.readouterr().err
    assert main(["convert", "b.pth", "e.keras", "--to", "sequential"]) == 2
    assert "names a checkpoint's entries" in capsys.readouterr().err
