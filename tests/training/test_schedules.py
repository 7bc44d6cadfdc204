"""Learning-rate schedules, value by value against torch.optim.lr_scheduler."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_resnet.system.errors import InputError
from keras_resnet.training import schedules

torch = pytest.importorskip("torch")
lr_scheduler = torch.optim.lr_scheduler


def torch_rates(make, count, lr):
    """Rates that a torch scheduler sets before each of `count` steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "scheduler.step() before optimizer.step()" and the like
        scheduler = make(optimizer)
        for position in range(count):
            if position:
                scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return np.array(rates)


def with_warmup(main, units, decay=0.01, method="linear"):
    """What torchvision's references/classification/train.py builds."""

    def make(optimizer):
        if not units:
            return main(optimizer)
        if method == "linear":
            warmup = lr_scheduler.LinearLR(optimizer, start_factor=decay, total_iters=units)
        else:
            warmup = lr_scheduler.ConstantLR(optimizer, factor=decay, total_iters=units)
        return lr_scheduler.SequentialLR(optimizer, [warmup, main(optimizer)], milestones=[units])

    return make


def cosine(length, lr_min=0.0):
    return lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=length, eta_min=lr_min)


def step(size, gamma):
    return lambda o: lr_scheduler.StepLR(o, step_size=size, gamma=gamma)


def multi_step(milestones, gamma):
    return lambda o: lr_scheduler.MultiStepLR(o, milestones=milestones, gamma=gamma)


def exponential(gamma):
    return lambda o: lr_scheduler.ExponentialLR(o, gamma=gamma)


# name: (schedule built for `per` and `steps`, torch's scheduler for lengths times n, epochs, lr)
BY_EPOCH = {
    "resnet_v1 step": (
        lambda **k: schedules.StepSchedule(0.1, step_size=30, gamma=0.1, **k),
        lambda n: step(30 * n, 0.1),
        90,
        0.1,
    ),
    "step after a warm-up": (
        lambda **k: schedules.StepSchedule(0.4, step_size=7, gamma=0.3, warmup_epochs=5, **k),
        lambda n: with_warmup(step(7 * n, 0.3), 5 * n),
        60,
        0.4,
    ),
    "exponential": (
        lambda **k: schedules.StepSchedule(0.045, step_size=1, gamma=0.98, **k),
        lambda n: exponential(0.98) if n == 1 else step(n, 0.98),
        120,
        0.045,
    ),
    "multi-step": (
        lambda **k: schedules.MultiStepSchedule(0.1, milestones=[12, 20, 20, 27], **k),
        lambda n: multi_step([m * n for m in (12, 20, 20, 27)], 0.1),
        40,
        0.1,
    ),
    "multi-step after a constant warm-up": (
        lambda **k: schedules.MultiStepSchedule(
            0.1, [8, 12], gamma=0.2, warmup_epochs=1, warmup_decay=0.1,
            warmup_method="constant", **k,
        ),
        lambda n: with_warmup(multi_step([8 * n, 12 * n], 0.2), n, 0.1, "constant"),
        20,
        0.1,
    ),
    "resnet50_v2 cosine": (
        lambda **k: schedules.CosineSchedule(0.5, epochs=600, warmup_epochs=5, **k),
        lambda n: with_warmup(cosine(595 * n), 5 * n),
        600,
        0.5,
    ),
    "cosine to a floor": (
        lambda **k: schedules.CosineSchedule(0.2, epochs=50, lr_min=1e-3, warmup_epochs=3,
                                             warmup_decay=0.033, **k),
        lambda n: with_warmup(cosine(47 * n, 1e-3), 3 * n, 0.033),
        50,
        0.2,
    ),
    "cosine alone": (
        lambda **k: schedules.CosineSchedule(0.1, epochs=30, **k),
        lambda n: cosine(30 * n),
        30,
        0.1,
    ),
    "constant": (
        lambda **k: schedules.ConstantSchedule(0.1, warmup_epochs=4, **k),
        lambda n: with_warmup(lambda o: lr_scheduler.ConstantLR(o, factor=1.0), 4 * n),
        10,
        0.1,
    ),
}  # fmt: skip

ONE_CYCLE = {
    "defaults": {},
    "linear": {"anneal_strategy": "linear", "pct_start": 0.4},
    "three phases": {"three_phase": True, "pct_start": 0.3, "div_factor": 10.0},
    "odd": {"pct_start": 0.137, "final_div_factor": 77.0, "div_factor": 3.0},
}


@pytest.mark.parametrize("name", BY_EPOCH)
def test_by_epoch_every_step_of_an_epoch_has_torchs_rate(name):
    make, reference, epochs, lr = BY_EPOCH[name]
    steps = 13
    schedule = make(steps_per_epoch=steps)
    expected = torch_rates(reference(1), epochs, lr)
    every = np.arange(epochs * steps)
    np.testing.assert_allclose(
        [schedule.value_at(s) for s in every], np.repeat(expected, steps), rtol=1e-9, atol=1e-15
    )
    # The tensors that an optimizer sees: float32 of the same.
    edges = np.unique(np.concatenate([every[::steps], every[steps - 1 :: steps]]))
    got = [float(ops.convert_to_numpy(schedule(ops.convert_to_tensor(int(s), "int32"))))
           for s in edges[:: max(1, len(edges) // 100)]]  # fmt: skip
    wanted = expected[edges[:: max(1, len(edges) // 100)] // steps]
    np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-15)


@pytest.mark.once
@pytest.mark.parametrize("name", BY_EPOCH)
def test_by_step_equals_torchs_scheduler_with_lengths_in_steps(name):
    make, reference, epochs, lr = BY_EPOCH[name]
    schedule = make(steps_per_epoch=5, per="step")
    expected = torch_rates(reference(5), epochs * 5, lr)
    got = [schedule.value_at(s) for s in range(epochs * 5)]
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-15)


@pytest.mark.once
@pytest.mark.parametrize("name", ONE_CYCLE)
@pytest.mark.parametrize("epochs, steps", [(10, 37), (1, 50), (3, 10)])
def test_one_cycle_equals_torchs_at_every_step(name, epochs, steps):
    options = ONE_CYCLE[name]
    schedule = schedules.OneCycleSchedule(0.3, epochs=epochs, steps_per_epoch=steps, **options)
    total = epochs * steps

    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, 0.3, total_steps=total, cycle_momentum=False, **options
        )

    got = [schedule.value_at(s) for s in range(total)]
    np.testing.assert_allclose(got, torch_rates(make, total, 0.3), rtol=1e-9, atol=1e-16)
    assert schedule.value_at(total + 5) == got[-1]


def test_epoch_boundaries_are_exact_late_in_a_long_run():
    # 90 epochs of 5004 steps; float32 steps over epoch boundaries here.
    schedule = schedules.CosineSchedule(0.1, epochs=90, steps_per_epoch=5004, warmup_epochs=5)
    expected = torch_rates(with_warmup(cosine(85), 5), 90, 0.1).astype("float32")
    for epoch in (1, 5, 6, 44, 88, 89):
        first = 5004 * epoch
        for number, wanted in ((first - 1, expected[epoch - 1]), (first, expected[epoch])):
            traced = schedule(ops.convert_to_tensor(number, "int32"))
            np.testing.assert_allclose(float(ops.convert_to_numpy(traced)), wanted, rtol=1.2e-7)


def test_the_rate_is_right_inside_a_compiled_function(backend):
    schedule = schedules.StepSchedule(0.1, step_size=1, gamma=0.5, steps_per_epoch=3)
    if backend == "tensorflow":
        import tensorflow as tf

        call = tf.function(schedule, jit_compile=True)
        steps = [tf.constant(s, "int64") for s in range(9)]
    elif backend == "jax":
        import jax

        call, steps = jax.jit(schedule), list(np.arange(9, dtype="int32"))
    else:
        call = torch.compile(schedule, backend="eager")
        steps = [torch.tensor(s) for s in range(9)]
    got = [float(ops.convert_to_numpy(call(s))) for s in steps]
    np.testing.assert_allclose(got, np.repeat([0.1, 0.05, 0.025], 3), rtol=1e-7)


def test_a_keras_optimizer_takes_the_schedule():
    schedule = schedules.StepSchedule(0.5, step_size=1, gamma=0.1, steps_per_epoch=2)
    optimizer = keras.optimizers.SGD(schedule)
    variable = keras.Variable(np.zeros(1, "float32"))
    for _ in range(4):
        optimizer.apply([ops.ones((1,))], [variable])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-1.1], rtol=1e-6)


SOME = [
    schedules.ConstantSchedule(0.1, steps_per_epoch=7, warmup_epochs=2),
    schedules.StepSchedule(0.1, 3, 0.3, steps_per_epoch=7, warmup_epochs=1),
    schedules.MultiStepSchedule(0.1, [5, 2], steps_per_epoch=7, per="step"),
    schedules.CosineSchedule(
        0.1, 9, 1e-4, steps_per_epoch=7, warmup_epochs=2, warmup_method="constant"
    ),
    schedules.OneCycleSchedule(0.1, 9, 7, three_phase=True, anneal_strategy="linear"),
]


@pytest.mark.once
@pytest.mark.parametrize("schedule", SOME, ids=lambda s: type(s).__name__)
def test_a_schedule_survives_serialisation(schedule):
    saved = keras.optimizers.schedules.serialize(schedule)
    assert saved["registered_name"] == f"keras_resnet>{type(schedule).__name__}"
    again = keras.optimizers.schedules.deserialize(saved)
    assert again.get_config() == schedule.get_config()
    assert [again.value_at(s) for s in range(80)] == [schedule.value_at(s) for s in range(80)]


@pytest.mark.once
def test_a_schedule_of_ones_own_adds_to_the_config():
    class Mine(schedules.Schedule):
        def __init__(self, initial, power=2, **others):
            super().__init__(initial, **others)
            self.power = power

        def _main(self):
            return self.initial / np.arange(1, 4) ** self.power

        def get_config(self):
            return {**super().get_config(), "power": self.power}

    mine = Mine(0.1, power=3, warmup_epochs=2)
    assert Mine.from_config(mine.get_config()).get_config() == mine.get_config()
    assert mine.get_config()["warmup_epochs"] == 2 and "power=3" in repr(mine)


def test_a_rate_of_zero_stays_zero():
    assert schedules.StepSchedule(0.0).value_at(10**6) == 0.0


@pytest.mark.once
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: schedules.StepSchedule(0.1, per="epochs"), "'epoch' or 'step'.*Did you mean"),
        (
            lambda: schedules.StepSchedule(0.1, gamma=1.0),
            "gamma must be above 0 and below 1",
        ),
        (lambda: schedules.StepSchedule(0.1, step_size=0), "step_size must be a whole number"),
        (lambda: schedules.CosineSchedule(0.1, epochs=5, warmup_epochs=5), "the 5 of warm-up"),
        (lambda: schedules.CosineSchedule(-0.1, epochs=5), "initial must be at least 0"),
        (lambda: schedules.CosineSchedule(0.1, epochs=5, steps_per_epoch=2.5), "2.5"),
        (lambda: schedules.OneCycleSchedule(0.1, 5, pct_start=30), "pct_start must be"),
        (lambda: schedules.MultiStepSchedule(0.1, [1.5]), "milestones must be"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
