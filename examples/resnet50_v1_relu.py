"""A ResNet-50 with a ReLU before the addition too: its forward pass, and what sets it apart.

It needs no data:
    python examples/resnet50_v1_relu.py

Where the program's parts are: `Bottleneck` and `ResNet` are `kr.ResNet50V1ReLU` (its block:
keras_resnet/models/blocks.py; its row, with the stride and the ReLU: keras_resnet/variants.py); the
random image, the forward pass and the printed shape are `main`; why its weights look like another
network's is `compare`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
import numpy as np

import keras_resnet as kr

WHAT_DIFFERS = {
    "resnet50_v1_relu": "stride on the first 1x1, a ReLU before the addition and behind it",
    "resnet50_v1": "stride on the first 1x1 (the paper), a ReLU behind the addition alone",
    "resnet50": "stride on the 3x3 (torchvision's, v1.5), a ReLU behind the addition alone",
}


def compare(resnet, x, y, size):
    """The same weights in three networks: lines that say how far the answers are apart.

    They fit, for all shapes are the same, and only `stage1` is called `layer1`. That is why a wrong
    file loads without an error, and why kr asks to be sure.
    """
    state = {k.replace("stage", "layer"): v for k, v in kr.to_torchvision(resnet).items()}
    lines = []
    for name, difference in WHAT_DIFFERS.items():
        model, answer = resnet, y
        if name != "resnet50_v1_relu":
            model = kr.create_model(name, input_shape=(size, size, 3))
            try:
                kr.load_torchvision(model, state)
            except kr.InputError as error:
                print(f"{name} refuses the weights at first: {error}")
                kr.load_torchvision(model, state, allow_other_strides=True)
            answer = keras.ops.convert_to_numpy(model(x, training=False))
        lines += [
            f"{name}: {difference}",
            f"    {model.count_params():,} parameters, "
            f"{kr.count_flops(model, 224) / 1e9:.3f} G multiply-adds at 224x224",
            f"    with the same weights, logits that differ by up to "
            f"{np.abs(answer - y).max() / np.abs(y).max():.1%} of the largest",
        ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a folder whose first picture is taken instead of noise")
    parser.add_argument("--output", default="runs/resnet50_v1_relu")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--smoke", action="store_true", help="a trial: 64 pixels instead of 224")
    args = parser.parse_args()
    size, output = 64 if args.smoke else args.image_size, Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    # x = torch.randn(1, 3, 224, 224), channels last here
    x = np.random.default_rng(0).standard_normal((1, size, size, 3)).astype("float32")
    if args.data:
        dataset = kr.image_dataset_from_directory(args.data, labels=None, shuffle=False)
        prepare = kr.Preprocess(resize_size=round(size * 256 / 224), crop_size=size)
        x = prepare(dataset.file_paths[0])[None]

    # resnet = ResNet(Bottleneck, [3, 4, 6, 3]); x = resnet(x); print(x.shape)
    # Its AvgPool2d(7) fits 224 pixels only; here the mean is over whatever is there.
    resnet = kr.ResNet50V1ReLU(input_shape=(size, size, 3))
    y = keras.ops.convert_to_numpy(resnet(x, training=False))
    print("Output shape:", y.shape)
    (output / "summary.txt").write_text(f"{kr.summary(resnet)}\n")

    text = compare(resnet, x, y, size)
    print(text)
    (output / "differences.txt").write_text(text + "\n")
    print(f"Look into {output}: summary.txt, differences.txt")


if __name__ == "__main__":
    main()
