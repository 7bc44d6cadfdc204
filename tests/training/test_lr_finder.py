"""The learning-rate finder suggests a rate that trains, and leaves the model as it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet.cli import main as cli
from keras_resnet.models.zoo import create_model
from keras_resnet.system.errors import InputError
from keras_resnet.training.lr_finder import (
    LrFinderResult,
    is_noise,
    lr_find,
    smooth,
    suggest,
    valley,
)

OPTIONS = {"image_size": 16, "batch_size": 8, "workers": 1, "model": None}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("ant", "bee")):
        (folder / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            pixels[..., k] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def swept(pictures):
    keras.utils.set_random_seed(0)
    model = create_model(
        "resnet20", num_classes=2, input_shape=(16, 16, 3), include_preprocessing=True
    )
    model.compile("adam", "mse")
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    result = lr_find(
        pictures, recipe="cifar", start=1e-5, stop=1e3, steps=40, **{**OPTIONS, "model": model}
    )
    return model, before, result


@pytest.mark.slow
def test_the_rates_rise_by_a_constant_factor_until_the_loss_leaves(swept):
    _, _, result = swept
    factors = result.rates[1:] / result.rates[:-1]
    np.testing.assert_allclose(factors, (1e3 / 1e-5) ** (1 / 39), rtol=1e-9)
    assert result.diverged and len(result.rates) == len(result.losses) < 40
    assert np.isfinite(result.smoothed).all()


def test_the_first_loss_is_that_of_the_untrained_model(swept):
    # Two classes, nothing learned: near ln 2, not the mean of all batches.
    _, _, result = swept
    assert result.losses[0] == pytest.approx(np.log(2), abs=1.5)
    assert result.losses.min() < 0.7 * result.losses[0]


def test_the_suggestion_is_below_where_it_diverges(swept):
    _, _, result = swept
    assert result.suggestion in result.rates
    assert 1e-5 < result.suggestion < result.rates[-1] / 3
    assert f"{result.suggestion:.1e}" in str(result) and "diverged" in str(result)


def test_the_model_is_left_as_it_was(swept):
    model, before, _ = swept
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    assert model.loss == "mse" and type(model.optimizer).__name__ == "Adam"


@pytest.mark.once
def test_smoothing_is_bias_corrected():
    losses = np.array([3.0, 1.0, 2.0])
    # By hand, beta 0.5: averages 1.5, 1.25, 1.625; corrected by 0.5, 0.75, 0.875.
    np.testing.assert_allclose(smooth(losses, 0.5), [3.0, 1.25 / 0.75, 1.625 / 0.875])


@pytest.mark.once
def test_a_loss_that_never_falls_gets_no_suggestion():
    rates = np.geomspace(1e-4, 1, 9)
    assert suggest(rates, np.linspace(1, 2, 9)) is None
    assert suggest(rates, np.ones(9)) is None


def curve(limit, wave):
    """100 rates, and a loss that falls around 1e-2 and leaves at the limit."""
    i = np.arange(100)
    rates = 10 ** (-6 + 7 * i / 99)
    loss = 2.3 - 1 / (1 + 0.01 / rates) + 2 * (rates / limit) ** 2 + wave * np.sin(1.7 * i)
    return rates, loss


@pytest.mark.once
@pytest.mark.parametrize(
    ("limit", "wave", "step"),
    [(1, 0, 40), (1, 0.02, 52), (1, 0.1, 65), (3, 0.02, 56), (0.1, 0.05, 50), (100, 0.01, 60)],
)
def test_the_suggestion_is_fastais(limit, wave, step):
    # Steps by fastai 2.8.12: valley(lrs[10:-5], losses[10:-5], 100), as its lr_find calls it.
    rates, losses = curve(limit, wave)
    assert suggest(rates, losses) == rates[step]


@pytest.mark.once
def test_a_sweep_that_ended_early_leaves_out_a_tenth_of_the_planned_steps():
    rates, losses = curve(1, 0.05)
    assert suggest(rates[:60], losses[:60], steps=100) == rates[44]  # by fastai 2.8.12, too
    assert valley(np.array([3.0, 2.9, 2.5, 1.8, 1.2, 1.0, 1.1, 4.0])) == (0, 5, 2)
    assert valley(np.ones(4)) is None


@pytest.mark.once
def test_a_curve_that_is_noise_gets_no_suggestion_and_a_fall_does(tmp_path):
    flat = falling = 0
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, 0.1, 100)
        for losses, fall in ((2.3 + noise, False), (curve(1, 0)[1] + noise, True)):
            called = is_noise(losses, smooth(losses, 0.9), 0.9, 100)
            flat += called and not fall
            falling += called and fall
    assert flat >= 36 and falling == 0
    rates, _ = curve(1, 0)
    result = LrFinderResult(rates, losses, smooth(losses, 0.9), None, False, noise=True)
    assert "The curve is noise" in str(result) and "no suggestion" in str(result)
    assert result.plot(tmp_path / "lr.png").is_file()


@pytest.mark.once
def test_noisy_first_steps_give_no_tiny_rate():
    # The steepest descent of 0.1 was among the first steps, where little is averaged yet.
    for seed in range(20):
        rates, losses = curve(1, 0)
        losses = losses + np.random.default_rng(seed).normal(0, 0.2, 100)
        smoothed = smooth(losses, 0.9)
        assert rates[smoothed.argmin()] / 100 < suggest(rates, smoothed) < 0.3


@pytest.mark.once
@pytest.mark.slow
def test_the_command_draws_its_plot(pictures, tmp_path, capsys):
    plot = tmp_path / "lr.png"
    code = cli.main(
        ["lr-find", str(pictures), "--model", "resnet20", "--image-size", "16", "--batch-size",
         "8", "--workers", "1", "--steps", "12", "--plot", str(plot)]
    )  # fmt: skip
    assert code == 0 and "Lowest loss" in capsys.readouterr().out
    with Image.open(plot) as picture:
        assert picture.width > 300


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0, "stop": 0.1}, "from a low to a high"),
        ({"steps": 2}, "at least 3"),
        ({"accumulate": 4}, "accumulate=1"),
        ({"beta": 1.0}, "beta"),
    ],
)
def test_sweeps_that_cannot_work_are_refused(pictures, options, message):
    with pytest.raises(InputError, match=message):
        lr_find(pictures, **{**OPTIONS, **options})


@pytest.mark.once
def test_a_model_with_other_classes_is_refused(pictures):
    model = create_model("resnet20", num_classes=3, input_shape=(16, 16, 3))
    with pytest.raises(InputError, match="3 outputs, the folder 2 classes"):
        lr_find(pictures, **{**OPTIONS, "model": model})
