"""Checkpoints as other projects write them: the network is found, or the file is refused in a line.

Key lists are facts about those projects; numbers are of torchvision's own class, with random batch
norms. `pytest -s -k table_of_the_docs` prints the table of `docs/weights.md`.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_load import randomise_statistics

from keras_resnet.models.files import convert_file, load_model
from keras_resnet.models.zoo import create_model
from keras_resnet.recipes import get_recipe
from keras_resnet.system.errors import InputError
from keras_resnet.training.freeze import load_pretrained
from keras_resnet.variants import SPECS
from keras_resnet.weights.checkpoint import inspect_checkpoint
from keras_resnet.weights.load import load_torchvision
from keras_resnet.weights.mapping import to_torchvision
from keras_resnet.weights.matching import find_networks, grouped, spec_shapes
from keras_resnet.weights.verify import verify

pytestmark = pytest.mark.once
CLASSES = 7


def at(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def body(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def other(state):
    """The same network with other numbers: an average, a teacher."""
    return {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}


def some(**shapes):
    """Other entries: their names with `_` for a dot where it is written `__`."""
    return {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}


def mlp(prefix, *widths, bias=True):
    """A projector of Linear, BatchNorm1d, ReLU as nn.Sequential numbers them."""
    state = {}
    for i, (fed, out) in enumerate(itertools.pairwise(widths)):
        state[f"{prefix}{3 * i}.weight"] = torch.ones(out, fed)
        if bias:
            state[f"{prefix}{3 * i}.bias"] = torch.ones(out)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{prefix}{3 * i + 1}.{name}"] = torch.ones(out)
        state[f"{prefix}{3 * i + 1}.num_batches_tracked"] = torch.tensor(3)
    return state


def uncounted(state):
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


# What is saved, made of the state dict of a ResNet-18 of 7 classes; what is given for it beside
# num_classes; and whether the head is the file's own.
LAYOUTS = {
    "torchvision": (lambda s: s, {}, True),
    "timm train.py": (
        lambda s: {"epoch": 3, "arch": "resnet18", "state_dict": s, "optimizer": {"state": {}}},
        {}, True,
    ),
    "timm EMA": (
        lambda s: {"state_dict": other(s), "state_dict_ema": s}, {"key": "state_dict_ema"}, True,
    ),
    "DataParallel, DDP": (lambda s: at("module.", s), {}, True),
    "torch.compile": (lambda s: at("_orig_mod.", s), {}, True),
    "SWA AveragedModel": (
        lambda s: {"n_averaged": torch.tensor(4)} | at("module.", s), {}, True,
    ),
    "Lightning, a loss's weights": (
        lambda s: {"epoch": 3, "pytorch-lightning_version": "2.4", "hyper_parameters": {"lr": 0.1},
                   "state_dict": at("model.", s) | some(criterion__weight=(7,)),
                   "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]},
        {}, True,
    ),
    "Lightning, metrics": (
        lambda s: {"state_dict": at("net.", s) | some(val_acc__correct=(), val_cm__confmat=(7, 7))},
        {}, True,
    ),
    "Lightning and torch.compile": (
        lambda s: {"state_dict": at("model._orig_mod.", s) | some(loss_fn__weight=(7,))}, {}, True,
    ),
    "Lightning, one network under two names": (
        lambda s: {"state_dict": at("model.", s) | at("backbone.", s)}, {}, True,
    ),
    "EMA beside the model": (
        lambda s: {"state_dict": at("model.", other(s)) | at("ema.module.", s)},
        {"key": "state_dict.ema.module"}, True,
    ),
    "MoCo v2": (
        lambda s: {"arch": "resnet18", "state_dict": at("module.encoder_q.", body(s))
                   | some(module__encoder_q__fc__0__weight=(512, 512),
                          module__encoder_q__fc__0__bias=(512,),
                          module__encoder_q__fc__2__weight=(128, 512),
                          module__encoder_q__fc__2__bias=(128,))
                   | at("module.encoder_k.", body(other(s)))
                   | some(module__encoder_k__fc__0__weight=(512, 512),
                          module__queue=(128, 64), module__queue_ptr=(1,))},
        {"key": "encoder_q"}, False,
    ),
    "MoCo v3": (
        lambda s: {"state_dict": at("module.base_encoder.", body(s))
                   | mlp("module.base_encoder.fc.", 512, 64, 32, bias=False)
                   | at("module.momentum_encoder.", body(other(s)))
                   | mlp("module.momentum_encoder.fc.", 512, 64, 32, bias=False)
                   | mlp("module.predictor.", 32, 64, 32, bias=False)},
        {"key": "module.base_encoder"}, False,
    ),
    "SimCLR": (
        lambda s: {"state_dict": at("backbone.", body(s))
                   | some(backbone__fc__0__weight=(512, 512), backbone__fc__0__bias=(512,),
                          backbone__fc__2__weight=(128, 512), backbone__fc__2__bias=(128,))},
        {}, False,
    ),
    "SimSiam": (
        lambda s: {"state_dict": at("module.encoder.", body(s))
                   | mlp("module.encoder.fc.", 512, 512, 512, bias=False)
                   | mlp("module.predictor.", 512, 128, 512)},
        {}, False,
    ),
    "BYOL": (
        lambda s: at("net.", body(s)) | at("online_encoder.net.", body(s))
        | mlp("online_encoder.projector.", 512, 64, 32) | mlp("online_predictor.", 32, 64, 32)
        | at("target_encoder.net.", body(other(s))),
        {"key": "online_encoder.net"}, False,
    ),
    "SwAV": (
        lambda s: at("module.", body(s)) | mlp("module.projection_head.", 512, 64)
        | some(module__projection_head__3__weight=(128, 64), module__prototypes__weight=(300, 128)),
        {}, False,
    ),
    "DINO": (
        lambda s: {"student": at("module.backbone.", body(other(s)))
                   | some(module__head__mlp__0__weight=(64, 512),
                          module__head__last_layer__weight_g=(32, 1)),
                   "teacher": at("backbone.", body(s)) | some(head__mlp__0__weight=(64, 512)),
                   "optimizer": {"state": {}}, "epoch": 3, "dino_loss": some(center=(1, 32))},
        {"key": "teacher.backbone"}, False,
    ),
    "Barlow Twins": (
        lambda s: {"epoch": 3, "optimizer": {"state": {}}, "model": at("module.backbone.", body(s))
                   | mlp("module.projector.", 512, 64, 64, bias=False)
                   | some(module__bn__running_mean=(64,), module__bn__running_var=(64,))},
        {}, False,
    ),
    "VICReg": (
        lambda s: {"model": at("module.backbone.", body(s)) | mlp("module.projector.", 512, 64)},
        {}, False,
    ),
    "DeepLab v3 (torchvision)": (
        lambda s: at("backbone.", body(s))
        | some(classifier__0__convs__0__0__weight=(256, 512, 1, 1), classifier__4__bias=(21,),
               aux_classifier__0__weight=(64, 256, 3, 3)),
        {}, False,
    ),
    "Faster R-CNN (torchvision)": (
        lambda s: at("backbone.body.", uncounted(body(s)))
        | some(backbone__fpn__inner_blocks__0__0__weight=(256, 64, 1, 1),
               rpn__head__conv__0__0__weight=(256, 256, 3, 3),
               roi_heads__box_head__fc6__weight=(1024, 256)),
        {}, False,
    ),
    "U-Net (segmentation_models_pytorch)": (
        lambda s: at("encoder.", body(s))
        | some(decoder__blocks__0__conv1__0__weight=(256, 768, 3, 3),
               segmentation_head__0__weight=(1, 16, 3, 3)),
        {}, False,
    ),
    "mmpretrain": (
        lambda s: {"meta": {"epoch": 3}, "state_dict": at("backbone.", body(s))
                   | some(head__fc__weight=(7, 512), head__fc__bias=(7,))},
        {}, False,
    ),
    "robustness": (
        lambda s: {"model": some(module__normalizer__new_mean=(3, 1, 1)) | at("module.model.", s)
                   | some(module__attacker__normalize__new_mean=(3, 1, 1))
                   | at("module.attacker.model.", s), "epoch": 3},
        {}, True,
    ),
    "FixMatch": (
        lambda s: {"epoch": 3, "state_dict": s, "ema_state_dict": other(s), "acc": 0.9,
                   "optimizer": {"state": {}}, "scheduler": {"base_lrs": [0.1]}},
        {}, True,
    ),
    "pycls": (lambda s: {"epoch": 3, "model_state": s, "test_err": 0.2}, {}, True),
    "entries of other names": (
        lambda s: {"run": {"weights_of_epoch_3": at("f.", s)}, "extra": some(mean=(3,))}, {}, True,
    ),
    "a loss in the entry that is called model": (
        lambda s: {"model": some(criterion__weight=(7,)), "encoder": s}, {}, True,
    ),
    "distillation, a teacher of another depth": (
        lambda s: {"state_dict": at("student.", s) | {
            f"teacher.{k}": torch.ones(v) for k, v in spec_shapes(SPECS["resnet_tiny"]).items()}},
        {}, True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def resnet18(torchvision):
    torch.manual_seed(0)
    return randomise_statistics(torchvision.models.resnet18(num_classes=CLASSES))


@pytest.fixture(scope="module")
def model():
    return create_model("resnet18", num_classes=CLASSES, input_shape=(32, 32, 3))


def differences(model, module, images):
    """Largest difference of the features in front of the head, and of the logits, both relative."""
    import keras

    middle = keras.Model(model.input, [model.layers[-2].output, model.output])
    last = torch.nn.Sequential(*list(module.children())[:-1])
    with torch.no_grad():
        nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        theirs = [last(nchw).flatten(1).numpy(), module(nchw).numpy()]
    ours = [keras.ops.convert_to_numpy(x) for x in middle(images, training=False)]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_what_the_real_class_gives(layout, resnet18, model, rng):
    make, options, own_head = LAYOUTS[layout]
    state = resnet18.state_dict()
    report = load_torchvision(model, make(state), head="strict" if own_head else "skip", **options)
    assert report.ok and report.done
    features, logits = differences(model, resnet18, rng.standard_normal((1, 32, 32, 3), "float32"))
    assert features < 1e-5 and (logits < 1e-5 or not own_head)


@pytest.mark.parametrize("layout", [k for k, (_, options, _) in LAYOUTS.items() if options])
def test_several_networks_are_listed_each_with_a_key_that_means_it(layout, resnet18, model):
    make, _, _ = LAYOUTS[layout]
    if layout == "timm EMA":
        return  # state_dict comes first: documented
    saved = make(resnet18.state_dict())
    with pytest.raises(InputError, match=r"2 networks that fit; name one of key='.*', key='") as e:
        load_torchvision(model, saved, head="skip")
    assert "\n" not in str(e.value)
    for key in str(e.value).split("key='")[1:]:
        assert load_torchvision(model, saved, head="skip", key=key.partition("'")[0]).ok


# --- What is none, or not whole -------------------------------------------------------------------


@pytest.fixture
def tiny(rng):
    """A state dict for `resnet_tiny`, and a second one of other numbers."""
    shapes = spec_shapes(SPECS["resnet_tiny"])
    return [
        {k: rng.random(v, "float32") + 0.5 if v else np.int64(3) for k, v in shapes.items()}
        for _ in range(2)
    ]


def zeros(shapes):
    return {k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items()}


# What is put among or taken from a whole network, and what the refusal says of it.
BROKEN = {
    "attention between the stages": ({"bam1.conv.weight": (4, 8, 1, 1)}, r"bam1\.conv\.weight"),
    "attention inside the blocks": ({"layer1.0.se.fc.weight": (8, 8)}, r"layer1\.0\.se"),
    "biases on a convolution": ({"conv1.bias": (8,)}, r"conv1\.bias"),
    "a longer stem": ({"bn2.weight": (8,), "bn2.bias": (8,)}, r"bn2\.\*"),
    "a stage more": ({"layer3.0.conv1.weight": (8, 8, 1, 1)}, r"layer3"),
    "deconvolutions behind it": ({"deconv_layers.0.weight": (8, 8, 4, 4)}, "deconv_layers"),
    "two norms in one": ({"bn1.aux_bn.weight": (8,)}, r"bn1\.aux_bn"),
    "a norm before the head": ({"neck.weight": (16,), "neck.running_var": (16,)}, 'head="skip"'),
    "one entry less": ({"layer2.0.bn2.running_mean": None}, r"1 missing \(layer2\.0\.bn2\.run"),
    "one entry of another shape": ({"bn1.bias": (9,)}, r"bn1\.bias: source \(9,\), model \(8,\)"),
    "a head that more is fed to": ({"fc.weight": (10, 32)}, r"\(10, 32\), model \(10, 16\)"),
}


@pytest.mark.parametrize("prefix", ["", "model.encoder."])
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_almost_the_network_is_refused_in_a_line(broken, prefix, tiny):
    changes, message = BROKEN[broken]
    state = tiny[0] | zeros({k: v for k, v in changes.items() if v})
    state = at(prefix, {k: v for k, v in state.items() if changes.get(k, 1)})
    model = create_model("resnet_tiny")
    before = model.get_weights()
    with pytest.raises(InputError, match=message) as caught:
        load_torchvision(model, state | zeros({"loss.weight": (3,)}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_clips_resnet_50_is_refused_with_a_reason():
    shapes = {k: v for k, v in spec_shapes(SPECS["resnet50"]).items() if not k.startswith("fc")}
    shapes |= {"conv1.weight": (32, 3, 3, 3), "conv2.weight": (32, 32, 3, 3), "bn2.weight": (32,)}
    shapes |= {"attnpool.positional_embedding": (50, 2048), "attnpool.c_proj.weight": (1024, 2048)}
    state = zeros(at("visual.", shapes) | {"token_embedding.weight": (49408, 512)})
    reason = (
        r"it fits no model.*nearest to resnet50: conv1\.weight is \(32, 3, 3, 3\), not "
        r"\(64, 3, 7, 7\); attnpool\.\* \(2\), .*not its own"
    )
    with pytest.raises(InputError, match=reason):
        create_model("resnet50", include_top=False, weights=state)


def test_parts_at_several_places_are_never_mixed(tiny):
    halves = [{k: v for k, v in state.items() if "layer1" not in k} for state in tiny]
    saved = at("a.", halves[0]) | at("b.", halves[1])
    model = create_model("resnet_tiny")
    with pytest.raises(InputError, match="at several places: name one of key='a', key='b'"):
        load_torchvision(model, saved, strict=False)
    assert load_torchvision(model, saved, strict=False, key="b").left_out == {}
    assert np.array_equal(to_torchvision(model)["bn1.bias"], tiny[1]["bn1.bias"])


def test_more_networks_than_a_file_has_are_no_trouble():
    shapes = spec_shapes(SPECS["resnet_tiny"])
    found = find_networks({f"x{i}.{k}": v for i in range(200) for k, v in shapes.items()})
    assert 10 < len(found) < 100


def test_what_stands_beside_the_network_is_named(tiny):
    extra = zeros({"queue": (8, 9), "loss.weight": (3,), "old.a": (2,), "old.b": (2,)})
    model = create_model("resnet_tiny")
    report = load_torchvision(model, at("model.", tiny[0]) | extra)
    assert report.ok and "left out     loss.weight, old.* (2), queue" in str(report)
    assert model.info["weights"]["left_out"] == "loss.weight, old.* (2), queue"
    assert report.prefix == "model." and not report.unexpected


def test_a_body_without_a_head_takes_a_new_one_where_that_is_asked_for(tiny):
    state = at("encoder.", {k: v for k, v in tiny[0].items() if not k.startswith("fc")})
    state |= zeros({"encoder.fc.0.weight": (16, 16), "encoder.fc.0.bias": (16,)})
    with pytest.raises(InputError, match=r"no 'fc' as resnet_tiny has it: num_classes=N makes"):
        create_model("resnet_tiny", weights=state)
    with pytest.raises(InputError, match=r"no 'fc' .*fc\.0.* in its place.*head=.skip"):
        load_torchvision(create_model("resnet_tiny"), state)
    with pytest.warns(UserWarning, match="'fc' is new"):
        model = create_model("resnet_tiny", weights=state, num_classes=4)
    assert np.array_equal(to_torchvision(model)["bn1.bias"], tiny[0]["bn1.bias"])
    assert verify(model, state).passed


def test_a_key_means_one_network_on_every_way_in(tiny, tmp_path, capsys):
    from keras_resnet.cli.main import main

    saved = {"state_dict": at("student.net.", tiny[0]) | at("teacher.net.", tiny[1])}
    path, made = tmp_path / "both.pth", tmp_path / "made.keras"
    torch.save({"state_dict": {k: torch.tensor(v) for k, v in saved["state_dict"].items()}}, path)
    text = str(inspect_checkpoint(path))
    for name in ("student", "teacher"):
        assert f"network  resnet_tiny, 10 classes, key='state_dict.{name}.net'" in text
    assert main(["inspect", str(path)]) == 0
    assert "2 networks: --key says which" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"name one of key='state_dict\.student\.net' \(resnet_ti"):
        convert_file(path, made)
    assert main(["convert", str(path), str(made), "--key", "teacher"]) == 0
    assert np.array_equal(to_torchvision(load_model(made))["bn1.bias"], tiny[1]["bn1.bias"])
    assert main(["verify", str(made), str(path), "--key", "state_dict.teacher.net"]) == 0
    model = create_model("resnet_tiny", num_classes=3)
    recipe = get_recipe("finetune").with_options(weights=str(path), key="teacher")
    assert "38 of 38" not in load_pretrained(model, recipe.weights, key=recipe.key)
    assert np.array_equal(to_torchvision(model)["bn1.bias"], tiny[1]["bn1.bias"])
    model = create_model("resnet_tiny", weights=path, key="student")
    assert np.array_equal(to_torchvision(model)["bn1.bias"], tiny[0]["bn1.bias"])


def test_the_networks_own_level_is_the_empty_key(tiny):
    saved = tiny[0] | at("teacher.", tiny[1])
    model = create_model("resnet_tiny")
    with pytest.raises(InputError, match=r"key='', key='teacher'"):
        load_torchvision(model, saved)
    load_torchvision(model, saved, key="")
    assert np.array_equal(to_torchvision(model)["bn1.bias"], tiny[0]["bn1.bias"])


@pytest.mark.long
def test_the_table_of_the_docs(torchvision):
    """With a ResNet-50; `pytest -s` prints it."""
    torch.manual_seed(0)
    module = randomise_statistics(torchvision.models.resnet50(num_classes=CLASSES))
    model = create_model("resnet50", num_classes=CLASSES, input_shape=(64, 64, 3))
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), "float32")
    head = ("fc.weight", "fc.bias")
    for name, (make, options, own_head) in LAYOUTS.items():
        state = module.state_dict()
        saved = make(state)
        report = load_torchvision(model, saved, head="strict" if own_head else "skip", **options)
        error = differences(model, module, images)[own_head]
        left = grouped([*report.left_out, *(k for k in report.skipped if k not in head)], 4)
        key = f"`{options['key']}`" if options else ""
        print(f"| {name} | {key} | {f'`{left}`' if left else ''} | {error:.1e} |")
        assert error < 1e-5
