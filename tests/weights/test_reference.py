"""The NumPy reference against torch: torchvision's modules, and rewritten ones of the others."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from keras_resnet.system.errors import InputError
from keras_resnet.weights import numpy_ops, reference

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.once

# ---- torch's side -------------------------------------------------------------------------------


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a trained net's size, and batch norms whose four vectors all matter."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                fan_in = m.weight[0].numel()
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator) / fan_in**0.5)
                if m.bias is not None:
                    m.bias.copy_(uniform(m.bias, -0.5, 0.5))
            elif isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(uniform(m.weight, 0.3, 1.2))
                m.bias.copy_(uniform(m.bias, -0.4, 0.4))
                m.running_mean.copy_(uniform(m.running_mean, -0.5, 0.5))
                m.running_var.copy_(uniform(m.running_var, 0.3, 2.0))
    return module.eval()


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def pictures(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def torch_outputs(module: nn.Module, images: np.ndarray, names: dict[str, str]) -> dict:
    """Outputs of the named submodules (their names -> ours), flattened where the pool is."""
    outputs = {}

    def hook(name):
        return lambda _module, _inputs, y: outputs.__setitem__(name, y.numpy().copy())

    handles = [
        module.get_submodule(theirs).register_forward_hook(hook(ours))
        for theirs, ours in names.items()
    ]
    with torch.no_grad():
        outputs["logits"] = module(torch.from_numpy(images)).numpy()
    for handle in handles:
        handle.remove()
    return outputs


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_same(module, images, names, tolerance=2e-5, **options):
    ours = reference.forward(arrays(module), images, **options)
    theirs = torch_outputs(module, images, names)
    assert theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        actual = ours[name].reshape(expected.shape) if name == "pool" else ours[name]
        assert relative(actual, expected) < tolerance, name
    return ours


RESNET = {"maxpool": "stem", "avgpool": "pool"} | {f"layer{i}": f"layer{i}" for i in range(1, 5)}
ALEXNET = {"features": "features", "avgpool": "pool"}


# ---- torchvision --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (2, 3, 64, 64)),
        ("resnet18", (1, 3, 33, 47)),
        ("resnet18", (1, 3, 1, 1)),
        ("resnet50", (2, 3, 33, 47)),
        ("resnet50", (1, 3, 224, 224)),
        ("resnext50_32x4d", (2, 3, 45, 64)),
        ("wide_resnet50_2", (1, 3, 50, 31)),
    ],
)
def test_resnets_agree_with_torchvision_at_every_stage(torchvision, name, shape):
    module = randomised(torchvision.models.get_model(name, num_classes=17))
    ours = assert_same(module, pictures(*shape), RESNET)
    stages = ["layer1", "layer2", "layer3", "layer4"]
    assert list(ours) == ["stem", *stages, "pool", "logits"]


@pytest.mark.parametrize("size", [(63, 63), (224, 224), (97, 130)])
def test_alexnet_agrees_with_torchvision_at_any_size(torchvision, size):
    module = randomised(torchvision.models.alexnet(num_classes=17))
    ours = assert_same(module, pictures(2, 3, *size), ALEXNET)
    assert list(ours) == ["features", "pool", "logits"]


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "alexnet"])
def test_double_precision_agrees_to_1e_10(torchvision, name):
    module = randomised(torchvision.models.get_model(name, num_classes=5)).double()
    images = pictures(1, 3, 65, 79, dtype=np.float64)
    names = ALEXNET if name == "alexnet" else RESNET
    assert_same(module, images, names, tolerance=1e-10, dtype=np.float64)


def test_v1_is_v1_5_with_the_stride_on_the_first_1x1(torchvision):
    module = randomised(torchvision.models.resnet50(num_classes=17))
    for stage in (module.layer2, module.layer3, module.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    images = pictures(2, 3, 33, 47)
    assert_same(module, images, RESNET, stride_on="1x1")
    v1_5 = reference.forward(arrays(module), images)
    v1 = reference.forward(arrays(module), images, stride_on="1x1")
    assert np.array_equal(v1_5["layer1"], v1["layer1"])
    assert relative(v1_5["layer2"], v1["layer2"]) > 0.1  # same shapes, other answers


def test_many_pictures_and_large_ones_are_worked_through_in_parts(torchvision, monkeypatch):
    module = randomised(torchvision.models.resnext50_32x4d(num_classes=5))
    images = pictures(3, 3, 70, 53)
    whole = reference.forward(arrays(module), images)
    # 1 MiB: several rows a part in the stem, several images a part at the end.
    monkeypatch.setattr(numpy_ops, "_COLUMN_BYTES", 2**20)
    parts = reference.forward(arrays(module), images)
    assert relative(parts["logits"], whole["logits"]) < 1e-6
    monkeypatch.setattr(numpy_ops, "_COLUMN_BYTES", 1)
    rows = reference.forward(arrays(module), images)
    assert relative(rows["logits"], whole["logits"]) < 1e-6


# ---- The networks that torchvision lacks, written from their descriptions -----------------------


class CifarBlock(nn.Module):
    """He et al. 4.2: two 3x3; where the shape changes, every second pixel and zero channels."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.grows = stride != 1 or inputs != planes
        self.side = planes // 4

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.grows:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))
        return (x + y).relu()


class CifarResNet(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for i, planes in enumerate((16, 32, 64), start=1):
            first = CifarBlock(inputs, planes, 1 if i == 1 else 2)
            rest = [CifarBlock(planes, planes, 1) for _ in range(n - 1)]
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))
            inputs = planes
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


class DoubleReluBottleneck(nn.Module):
    """Stride on the first 1x1, and a ReLU on the branch before the addition."""

    def __init__(self, inputs, planes, stride, project):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, stride, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if project:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x):
        y = x
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            y = bn(conv(y)).relu()
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class StageResNet(nn.Module):
    def __init__(self, depths=(3, 4, 6, 3), classes=11):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for i, depth in enumerate(depths):
            planes, stride = 64 * 2**i, 1 if i == 0 else 2
            blocks = [DoubleReluBottleneck(inputs, planes, stride, True)]
            inputs = 4 * planes
            blocks += [DoubleReluBottleneck(inputs, planes, 1, False) for _ in range(depth - 1)]
            self.add_module(f"stage{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for i in range(1, 5):
            x = self.get_submodule(f"stage{i}")(x)
        return self.fc(x.mean(dim=(2, 3)))


class WayBlock(nn.Module):
    """Biased convolutions; the branch ends in a ReLU; the shortcut is a bare 1x1, or nothing."""

    def __init__(self, inputs, planes, stride, project):
        super().__init__()
        layers = []
        for channels, s in ((inputs, stride), (planes, 1)):
            layers += [nn.Conv2d(channels, planes, 3, s, 1), nn.BatchNorm2d(planes), nn.ReLU()]
        self.longway = nn.Sequential(*layers)
        if project:
            self.shortway = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride))

    def forward(self, x):
        shortcut = self.shortway(x) if hasattr(self, "shortway") else x
        return (shortcut + self.longway(x)).relu()


class WayResNet(nn.Module):
    def __init__(self, depths=(3, 4, 6, 3)):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        inputs = 64
        for i, depth in enumerate(depths):
            planes, stride = 64 * 2**i, 1 if i == 0 else 2
            first = nn.Sequential(WayBlock(inputs, planes, stride, True))
            rest = [WayBlock(planes, planes, 1, False) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
            inputs = planes
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        x = self.conv1(x)
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return self.fc(x.mean(dim=(2, 3)))


class PlainAlexNet(nn.Module):
    """Five convolutions and three linear layers, a Sequential each; no adaptive pooling."""

    def __init__(self, filters, convs, pool, pixels, classes):
        super().__init__()
        inputs = 3
        for i, (out, (kernel, stride, padding)) in enumerate(
            zip(filters, convs, strict=True), start=1
        ):
            layers = [nn.Conv2d(inputs, out, kernel, stride, padding), nn.ReLU()]
            layers += [nn.MaxPool2d(*pool)] if i in (1, 2, 5) else []
            self.add_module(f"conv{i}", nn.Sequential(*layers))
            inputs = out
        self.fc1 = nn.Sequential(nn.Flatten(), nn.Linear(inputs * pixels, 4096), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU())
        self.fc3 = nn.Sequential(nn.Linear(4096, classes))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def paper_alexnet(classes=19):
    convs = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
    return PlainAlexNet((96, 256, 384, 384, 256), convs, (3, 2), 36, classes)


def cifar_alexnet():
    return PlainAlexNet((64, 256, 384, 256, 256), ((3, 1, 1),) * 5, (2, 2), 16, 10)


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 3, 33, 47)])
def test_cifar_resnets_agree_with_torch(shape):
    module = randomised(CifarResNet(3))
    names = {f"layer{i}": f"layer{i}" for i in (1, 2, 3)}
    ours = assert_same(module, pictures(*shape), names)
    assert list(ours) == ["stem", "layer1", "layer2", "layer3", "pool", "logits"]
    assert_same(module.double(), pictures(*shape, dtype=np.float64), names, 1e-10, dtype=np.float64)


@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (2, 3, 33, 47)])
def test_a_relu_before_the_addition_and_stage_names_agree_with_torch(shape):
    names = {"maxpool": "stem"} | {f"stage{i}": f"stage{i}" for i in range(1, 5)}
    assert_same(randomised(StageResNet()), pictures(*shape), names)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 63, 81)])
def test_sequential_blocks_with_bare_projections_agree_with_torch(shape):
    names = {"conv1": "stem"} | {f"layer{i}": f"layer{i}" for i in range(1, 5)}
    assert_same(randomised(WayResNet()), pictures(*shape), names)


@pytest.mark.parametrize(("build", "size"), [(paper_alexnet, 224), (cifar_alexnet, 32)])
def test_alexnets_without_adaptive_pooling_agree_with_torch(build, size):
    ours = assert_same(randomised(build()), pictures(2, 3, size, size), {"conv5": "features"})
    assert list(ours) == ["features", "logits"]


@pytest.mark.slow
def test_a_trained_resnet20_gives_the_answers_of_its_own_code(shared):
    from PIL import Image

    path = shared / "weights" / "resnet20-12fca82f.th"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name: tensor.numpy() for name, tensor in state.items()}
    assert all(name.startswith("module.") for name in state)

    folders = sorted((shared / "data" / "cifar10_small" / "test").iterdir())
    files = [(file, label) for label, d in enumerate(folders) for file in sorted(d.iterdir())]
    assert len(files) == 1000
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB"), np.float32) for f, _ in files])
    labels = np.array([label for _, label in files])
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    images = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)

    start = time.perf_counter()
    logits = np.concatenate(
        [reference.forward(state, images[i : i + 250])["logits"] for i in range(0, 1000, 250)]
    )
    print(f"1,000 images of 32x32 in {time.perf_counter() - start:.2f} s")
    assert int((logits.argmax(axis=1) == labels).sum()) == 861

    module = CifarResNet(3).eval()
    module.load_state_dict(
        {name.removeprefix("module."): torch.from_numpy(value) for name, value in state.items()},
        strict=False,  # the file is older than num_batches_tracked
    )
    with torch.no_grad():
        theirs = module(torch.from_numpy(np.ascontiguousarray(images))).numpy()
    assert relative(logits, theirs) < 2e-5


# ---- Entries: halves, prefixes, counters --------------------------------------------------------


def test_halves_are_widened_and_prefixes_and_counters_do_not_matter():
    import ml_dtypes

    module = randomised(CifarResNet(1))
    images = pictures(2, 3, 32, 32)
    for half in (np.float16, ml_dtypes.bfloat16):
        state = {
            f"_orig_mod.module.{name}": value.astype(half) if "conv" in name else value
            for name, value in arrays(module).items()
            if not name.endswith("num_batches_tracked")
        }
        rounded = {
            name.removeprefix("_orig_mod.module."): torch.from_numpy(value.astype(np.float32))
            for name, value in state.items()
        }
        twin = CifarResNet(1).eval()
        twin.load_state_dict(rounded, strict=False)
        expected = torch_outputs(twin, images, {})["logits"]
        logits = reference.forward(state, images)["logits"]
        assert logits.dtype == np.float32
        assert relative(logits, expected) < 1e-5


def test_neither_the_state_nor_the_pictures_are_written_to():
    state, images = arrays(randomised(CifarResNet(1))), pictures(1, 3, 32, 32)
    before = {name: value.copy() for name, value in state.items()}, images.copy()
    for array in (*state.values(), images):
        array.flags.writeable = False
    first = reference.forward(state, images)
    second = reference.forward(state, images)
    assert all(np.array_equal(state[name], before[0][name]) for name in state)
    assert np.array_equal(images, before[1])
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_numpy_is_all_it_needs():
    code = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('keras_resnet')\n"
        "package.__path__ = [sys.argv[1]]\n"
        "sys.modules['keras_resnet'] = package\n"
        "import keras_resnet.weights.reference\n"
        "print(sorted(n for n in sys.modules if n.startswith('keras')))\n"
        "print({'torch', 'tensorflow', 'jax', 'PIL'} & set(sys.modules))\n"
    )
    folder = str(reference.__file__).rsplit("weights/reference.py", 1)[0]
    result = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [
        "['keras_resnet', 'keras_resnet.system', 'keras_resnet.system.errors', "
        "'keras_resnet.weights', 'keras_resnet.weights.numpy_ops', "
        "'keras_resnet.weights.reference', 'keras_resnet.weights.reference_check']",
        "set()",
    ]


# ---- What the state dict is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ("resnet", "basic", (2, 2, 2, 2), 1, 64)),
        ("resnet34", ("resnet", "basic", (3, 4, 6, 3), 1, 64)),
        ("resnet50", ("resnet", "bottleneck", (3, 4, 6, 3), 1, 64)),
        ("resnet101", ("resnet", "bottleneck", (3, 4, 23, 3), 1, 64)),
        ("resnet152", ("resnet", "bottleneck", (3, 8, 36, 3), 1, 64)),
        ("resnext50_32x4d", ("resnet", "bottleneck", (3, 4, 6, 3), 32, 4)),
        ("resnext101_32x8d", ("resnet", "bottleneck", (3, 4, 23, 3), 32, 8)),
        ("resnext101_64x4d", ("resnet", "bottleneck", (3, 4, 23, 3), 64, 4)),
        ("wide_resnet50_2", ("resnet", "bottleneck", (3, 4, 6, 3), 1, 128)),
        ("wide_resnet101_2", ("resnet", "bottleneck", (3, 4, 23, 3), 1, 128)),
        ("alexnet", ("alexnet", None, (), 1, 64)),
    ],
)
def test_torchvision_architectures_are_read_from_names_and_shapes(torchvision, name, expected):
    with torch.device("meta"):
        module = torchvision.models.get_model(name, num_classes=7)
    # Zeros that take no memory: only the shapes are read.
    state = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in module.state_dict().items()}
    assert reference.architecture(state) == reference.Architecture(*expected, 7, 3)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: CifarResNet(5), ("resnet_cifar", "basic", (5, 5, 5), 1, 16, 10, 3)),
        (StageResNet, ("resnet_stage", "bottleneck", (3, 4, 6, 3), 1, 64, 11, 3)),
        (WayResNet, ("resnet_sequential", "basic", (3, 4, 6, 3), 1, 64, 10, 3)),
        (paper_alexnet, ("alexnet_paper", None, (), 1, 96, 19, 3)),
        (cifar_alexnet, ("alexnet_cifar10", None, (), 1, 64, 10, 3)),
    ],
)
def test_other_architectures_are_read_from_names_and_shapes(build, expected):
    with torch.device("meta"):
        module = build()
    state = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in module.state_dict().items()}
    assert reference.architecture(state) == reference.Architecture(*expected)


# ---- Errors -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18(torchvision):
    return arrays(randomised(torchvision.models.resnet18(num_classes=5)))


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


IMAGES = np.zeros((1, 3, 32, 32), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "layer3.0.conv1.weight"),
            r"no convolution 'layer3\.0\.conv1\.weight'",
        ),
        (
            lambda s: without(s, "layer3.0.downsample.0.weight"),
            r"no convolution 'layer3\.0\.downsample\.0\.weight'",
        ),
        (
            lambda s: without(s, "bn1.running_mean", "bn1.running_var"),
            r"no batch norm 'bn1\.running_mean' \(and 1 more: bn1\.running_var",
        ),
        (lambda s: without(s, "fc.weight"), r"no linear layer 'fc\.weight'"),
        (lambda s: without(s, "fc.bias"), r"no bias 'fc\.bias'"),
        (lambda s: without(s, "conv1.weight"), r"no convolution 'conv1\.weight'"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("layer3.")},
            r"no convolution 'layer3\.0\.conv1\.weight'",
        ),
        (
            lambda s: s | {"layer1.0.conv1.bias": np.zeros(64, np.float32)},
            r"unexpected 'layer1\.0\.conv1\.bias'",
        ),
        (lambda s: s | {"optimizer.lr": np.float32(0.1)}, r"unexpected 'optimizer\.lr'"),
        (
            lambda s: s | {"layer2.0.conv2.weight": np.zeros((128, 128), np.float32)},
            r"'layer2\.0\.conv2\.weight' has shape \(128, 128\); a convolution has 4 dimensions",
        ),
        (
            lambda s: s | {"layer2.0.conv2.weight": np.zeros((128, 128, 5, 5), np.float32)},
            r"'layer2\.0\.conv2\.weight' has shape .* expected a 3x3 convolution of 128 channels",
        ),
        (
            lambda s: s | {"layer2.0.conv2.weight": np.zeros((128, 64, 3, 3), np.float32)},
            r"'layer2\.0\.conv2\.weight' has shape",
        ),
        (
            lambda s: s | {"layer2.0.bn2.running_var": np.zeros(64, np.float32)},
            r"'layer2\.0\.bn2\.running_var' has 64 values for 128 channels",
        ),
        (
            lambda s: s | {"fc.weight": np.zeros((5, 256), np.float32)},
            r"'fc\.weight' has shape \(5, 256\); the layer before it gives 512",
        ),
        (
            lambda s: s | {"fc.weight": s["fc.weight"].astype(np.int8)},
            r"'fc\.weight' holds int8; weights must be floating point",
        ),
        (lambda s: {}, r"no ResNet's .* and no AlexNet's"),
        (lambda s: {"encoder.weight": np.zeros(3)}, r"no ResNet's .* Received: 'encoder\.weight'"),
        (lambda s: {"layer1.99999999999.conv1.weight": np.zeros((1, 1, 1, 1))}, r"no ResNet's"),
    ],
)
def test_a_state_dict_that_cannot_work_is_named(resnet18, change, message):
    with pytest.raises(InputError, match=message):
        reference.forward(change(resnet18), IMAGES)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((3, 32, 32), np.float32),
            r"\(n, 3, height, width\), n at .* Received: \(3, 32, 32\)",
        ),
        (np.zeros((0, 3, 32, 32), np.float32), r"Received: \(0, 3, 32, 32\)"),
        (np.zeros((1, 32, 32, 3), np.float32), r"Received: \(1, 32, 32, 3\)"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"normalised\. Received: uint8"),
        (np.zeros((1, 3, 0, 32), np.float32), r"too small"),
    ],
)
def test_pictures_that_cannot_work_are_named(resnet18, images, message):
    with pytest.raises(InputError, match=message):
        reference.forward(resnet18, images)


def test_alexnet_says_when_pictures_are_too_small_or_of_another_size(torchvision):
    state = arrays(torchvision.models.alexnet(num_classes=5))
    with pytest.raises(InputError, match=r"too small: at features\.10's pooling 2 pixels"):
        reference.forward(state, np.zeros((1, 3, 62, 63), np.float32))
    with pytest.raises(InputError, match=r"'fc1\.1' takes 4096 features and received 16384"):
        reference.forward(arrays(cifar_alexnet()), np.zeros((1, 3, 64, 64), np.float32))


@pytest.mark.parametrize("options", [{"stride_on": "v1"}, {"dtype": np.float16}, {"dtype": int}])
def test_unknown_options_are_refused(resnet18, options):
    with pytest.raises(InputError, match=rf"{next(iter(options))} must be"):
        reference.forward(resnet18, IMAGES, **options)


# ---- Speed --------------------------------------------------------------------------------------


def test_resnet50_at_224_takes_less_than_a_few_seconds(torchvision):
    state = arrays(randomised(torchvision.models.resnet50()))
    images = pictures(1, 3, 224, 224)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        reference.forward(state, images)
        times.append(time.perf_counter() - start)
    print(f"resnet50 at 224, one image: {min(times):.2f} s (the best of 3)")
    # Room for a busy machine; not for a convolution without matrix products.
    assert min(times) < 5
