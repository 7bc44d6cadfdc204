"""SGD against torch.optim.SGD: every option, many steps, a changing rate, on every backend."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json

import keras
import numpy as np
import pytest
from keras import ops
from rounding import allowed

from keras_resnet.recipes import get_recipe
from keras_resnet.system.errors import InputError
from keras_resnet.training import schedules
from keras_resnet.training.optimizers import SGD
from keras_resnet.training.prepare import compile_model, make_optimizer

torch = pytest.importorskip("torch")

# Paths as in the models: (layer, variable, shape).
LAYOUT = [
    ("layer1_conv1", "kernel", (3, 3, 2, 4)),
    ("layer1_bn1", "gamma", (4,)),
    ("layer1_bn1", "beta", (4,)),
    ("fc", "kernel", (4, 5)),
    ("fc", "bias", (5,)),
]
OPTIONS = [
    {"momentum": m, "dampening": d, "weight_decay": w, "nesterov": n}
    for m, d, w, n in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True))
    if not (n and (m == 0 or d != 0)) and not (d and m == 0)
]


def option_name(options):
    return ",".join(f"{k}={v}" for k, v in options.items() if v) or "plain"


def make_variables(values, dtype="float32"):
    variables = []
    for (layer, name, _), value in zip(LAYOUT, values, strict=True):
        with keras.name_scope(layer):
            variables.append(keras.Variable(value, dtype=dtype, name=name))
    return variables


def random_arrays(rng, count=None, dtype="float32"):
    def one():
        return [rng.standard_normal(shape).astype(dtype) for *_, shape in LAYOUT]

    return one() if count is None else [one() for _ in range(count)]


def rates(count):
    return [0.1 * (1 + np.cos(np.pi * i / count)) for i in range(count)]


def numpy_of(variables):
    return [np.asarray(ops.convert_to_numpy(v)) for v in variables]


def step_function(optimizer, variables, backend):
    """How each backend's fit() calls an optimizer: traced where it traces."""
    optimizer.build(variables)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda gradients: optimizer.apply(gradients))
    if backend == "jax":
        import jax

        apply = jax.jit(optimizer.stateless_apply)

        def step(gradients):
            new, slots = apply(
                [v.value for v in optimizer.variables], gradients, [v.value for v in variables]
            )
            updated = [*variables, *optimizer.variables]
            for variable, value in zip(updated, [*new, *slots], strict=True):
                variable.assign(value)

        return step
    return optimizer.apply


def run(optimizer, start, gradients, backend, dtype="float32", learning_rates=None):
    variables = make_variables(start, dtype)
    step = step_function(optimizer, variables, backend)
    for i, arrays in enumerate(gradients):
        if learning_rates is not None:
            optimizer.learning_rate = learning_rates[i]
        step([ops.convert_to_tensor(a, dtype) for a in arrays])
    return numpy_of(variables)


def run_torch(start, gradients, learning_rates, groups=None, **options):
    """torch.optim.SGD on the same numbers; `groups` gives options of single parameters."""
    parameters = [torch.nn.Parameter(torch.tensor(a)) for a in start]
    groups = groups or [{}] * len(parameters)
    factors = [g.get("factor", 1.0) for g in groups]
    optimizer = torch.optim.SGD(
        [
            {"params": [p], **{k: v for k, v in g.items() if k != "factor"}}
            for p, g in zip(parameters, groups, strict=True)
        ],
        lr=1.0,
        **options,
    )
    for arrays, lr in zip(gradients, learning_rates, strict=True):
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = lr * factor
        for parameter, array in zip(parameters, arrays, strict=True):
            parameter.grad = None if array is None else torch.tensor(array)
        optimizer.step()
    return [p.detach().numpy() for p in parameters]


def assert_close(got, expected, rtol=1e-6):
    for g, e in zip(got, expected, strict=True):
        # Relative to the size of the tensor: single weights pass through zero.
        np.testing.assert_allclose(g, e, rtol=rtol, atol=rtol * np.abs(e).max())


@contextlib.contextmanager
def floatx(dtype):
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_fifty_steps_with_a_changing_rate_equal_torchs(options, backend, rng):
    start, gradients = random_arrays(rng), random_arrays(rng, 50)
    got = run(SGD(1.0, **options), start, gradients, backend, learning_rates=rates(50))
    assert_close(got, run_torch(start, gradients, rates(50), **options))


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_fifty_steps_in_float64_equal_torchs(options, backend, rng):
    if backend == "jax":
        pytest.skip("JAX computes in float32 unless told otherwise")
    start = random_arrays(rng, dtype="float64")
    gradients = random_arrays(rng, 50, dtype="float64")
    with floatx("float64"):
        got = run(SGD(1.0, **options), start, gradients, backend, "float64", rates(50))
    assert_close(got, run_torch(start, gradients, rates(50), **options), rtol=1e-12)


@pytest.mark.once
def test_float64_weights_see_the_rate_that_was_meant(rng):
    # floatx stays float32, so that Keras holds the learning rate 0.1 as 0.10000000149.
    start = random_arrays(rng, dtype="float64")
    gradients = random_arrays(rng, 20, dtype="float64")
    optimizer = SGD(0.1, momentum=0.9, weight_decay=1e-4)
    got = run(optimizer, start, gradients, "torch", "float64")
    expected = run_torch(start, gradients, [0.1] * 20, momentum=0.9, weight_decay=1e-4)
    assert_close(got, expected, rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_the_step_without_tracing_equals_torchs(options, rng):
    start, gradients = random_arrays(rng), random_arrays(rng, 5)
    variables, optimizer = make_variables(start), SGD(0.2, **options)
    for arrays in gradients:
        optimizer.apply([ops.convert_to_tensor(a) for a in arrays], variables)
    assert_close(numpy_of(variables), run_torch(start, gradients, [0.2] * 5, **options))


@pytest.mark.once
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_stateless_apply_on_torch_equals_torchs_and_changes_nothing_in_place(options, rng):
    start, gradients = random_arrays(rng), random_arrays(rng, 10)
    variables, optimizer = make_variables(start), SGD(0.2, **options)
    optimizer.build(variables)
    slots = [v.value.detach().clone() for v in optimizer.variables]
    values = [torch.tensor(a) for a in start]
    for arrays in gradients:
        kept = [v.clone() for v in values]
        new, slots = optimizer.stateless_apply(slots, [torch.tensor(a) for a in arrays], values)
        assert all(torch.equal(k, v) for k, v in zip(kept, values, strict=True))
        values = new
    assert_close([v.numpy() for v in values], run_torch(start, gradients, [0.2] * 10, **options))
    assert_close(numpy_of(variables), start, rtol=0)


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("decay_biases", [True, False])
def test_decay_is_excluded_by_kind_as_in_torchvisions_recipes(
    decay_norms, decay_biases, backend, rng
):
    options = {"momentum": 0.9, "weight_decay": 0.05}
    # torchvision references/classification/utils.py, set_weight_decay: norm layers by their
    # class, biases by the name "bias", which a batch norm's beta has there as well.
    decayed = {
        "kernel": True,
        "gamma": decay_norms,
        "beta": decay_norms and decay_biases,
        "bias": decay_biases,
    }
    groups = [{} if decayed[name] else {"weight_decay": 0.0} for _, name, _ in LAYOUT]
    start, gradients = random_arrays(rng), random_arrays(rng, 10)
    optimizer = SGD(0.1, decay_norms=decay_norms, decay_biases=decay_biases, **options)
    got = run(optimizer, start, gradients, backend)
    assert_close(got, run_torch(start, gradients, [0.1] * 10, groups, **options))


def test_keras_own_exclusion_from_weight_decay_is_kept(backend, rng):
    start, gradients = random_arrays(rng), random_arrays(rng, 5)
    optimizer = SGD(0.1, weight_decay=0.05)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    got = run(optimizer, start, gradients, backend)
    groups = [{"weight_decay": 0.0} if n == "kernel" else {} for _, n, _ in LAYOUT]
    assert_close(got, run_torch(start, gradients, [0.1] * 5, groups, weight_decay=0.05))


def test_rate_multipliers_are_torchs_parameter_groups(backend, rng):
    options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    start, gradients = random_arrays(rng), random_arrays(rng, 20)
    optimizer = SGD(1.0, rate_multipliers={"bn1/gamma": 0.5, "^layer1": 0.1}, **options)
    got = run(optimizer, start, gradients, backend, learning_rates=rates(20))
    groups = [{"factor": f} for f in (0.1, 0.5, 0.1, 1.0, 1.0)]
    assert_close(got, run_torch(start, gradients, rates(20), groups, **options))


def test_a_pattern_that_matches_nothing_is_an_error(rng):
    optimizer = SGD(0.1, rate_multipliers={"fc": 1.0, "layr1_bn1": 0.1})
    with pytest.raises(
        InputError, match=r"'layr1_bn1' .* none of the 5.*Did you mean 'layer1_bn1'"
    ):
        optimizer.build(make_variables(random_arrays(rng)))


def test_a_weight_whose_first_gradient_comes_late_begins_its_buffer_then(rng):
    start, gradients = random_arrays(rng), random_arrays(rng, 8)
    for arrays in gradients[:3]:
        arrays[1] = None
    options = {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01}
    variables, optimizer = make_variables(start), SGD(0.1, **options)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        for arrays in gradients:
            tensors = [None if a is None else ops.convert_to_tensor(a) for a in arrays]
            optimizer.apply(tensors, variables)
    assert_close(numpy_of(variables), run_torch(start, gradients, [0.1] * 8, **options))


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_accumulated_gradients_are_averaged_then_decayed_once(dampening, backend, rng):
    options = {"momentum": 0.9, "weight_decay": 0.05, "dampening": dampening}
    start, gradients = random_arrays(rng), random_arrays(rng, 12)
    got = run(SGD(0.1, gradient_accumulation_steps=3, **options), start, gradients, backend)
    means = [
        [np.mean(group, axis=0) for group in zip(*gradients[i : i + 3], strict=True)]
        for i in range(0, 12, 3)
    ]
    assert_close(got, run_torch(start, means, [0.1] * 4, **options), rtol=2e-6)


def clipped(arrays, by_norm=None, by_global_norm=None):
    parameters = [torch.nn.Parameter(torch.tensor(a)) for a in arrays]
    for parameter, array in zip(parameters, arrays, strict=True):
        parameter.grad = torch.tensor(array)
    if by_global_norm:
        torch.nn.utils.clip_grad_norm_(parameters, by_global_norm)
    else:
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_([parameter], by_norm)
    return [p.grad.numpy() for p in parameters]


@pytest.mark.parametrize(
    "ours, theirs",
    [({"global_clipnorm": 1.0}, {"by_global_norm": 1.0}), ({"clipnorm": 0.7}, {"by_norm": 0.7})],
    ids=["global", "each"],
)
def test_clipping_equals_torchs(ours, theirs, backend, rng):
    options = {"momentum": 0.9, "weight_decay": 0.05}
    start, gradients = random_arrays(rng), random_arrays(rng, 10)
    gradients[4] = [a * 1e-3 for a in gradients[4]]  # one step below the limit
    got = run(SGD(0.1, **ours, **options), start, gradients, backend)
    expected = run_torch(start, [clipped(g, **theirs) for g in gradients], [0.1] * 10, **options)
    # torch divides by norm + 1e-6
    assert_close(got, expected, rtol=3e-6)


def test_a_loss_scale_around_it_skips_overflow_and_changes_nothing_else(backend, rng):
    options = {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
    start, gradients = random_arrays(rng), random_arrays(rng, 6)
    schedule = schedules.StepSchedule(0.1, 1, 0.5, steps_per_epoch=2)
    optimizer = keras.optimizers.LossScaleOptimizer(SGD(schedule, **options), initial_scale=1024.0)
    scale, scaled = 1024.0, []
    for i, arrays in enumerate(gradients):
        scaled.append([a * np.float32(scale) for a in arrays])
        if i in (0, 3):
            scaled[-1][3] = np.full_like(scaled[-1][3], np.inf)
            scale /= 2
    got = run(optimizer, start, scaled, backend)
    good = [g for i, g in enumerate(gradients) if i not in (0, 3)]
    assert_close(got, run_torch(start, good, [0.1, 0.1, 0.05, 0.05], **options))


def torch_steps(start, batches, clip, accumulate, lost):
    """A linear layer in half precision, by torch.amp.GradScaler and torch.optim.SGD."""
    kernel, bias = (torch.nn.Parameter(torch.tensor(a)) for a in start)
    optimizer = torch.optim.SGD([kernel, bias], 0.1, momentum=0.9, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    scales, done = [], 0
    for i, (x, y) in enumerate(batches):
        if accumulate > 1 and i in lost:
            continue  # of several batches that one alone is left out; torch would lose them all
        logits = torch.tensor(x).half() @ kernel.half() + bias.half()
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(y))
        scaler.scale(loss / accumulate).backward()
        done += 1
        if done % accumulate == 0:
            scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_([kernel, bias], clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scales.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return [kernel.detach().numpy(), bias.detach().numpy()], scales


@pytest.mark.parametrize("clip, accumulate", [(None, 1), (0.05, 1), (0.05, 2)])
def test_half_precision_is_scaled_as_by_torchs_grad_scaler(clip, accumulate, rng):
    lost = (1, 5)  # their gradients are beyond float16, and their losses are not
    batches = [(rng.standard_normal((6, 4)), rng.integers(0, 3, 6)) for _ in range(10)]
    batches = [(x.astype("float32") * (100 if i in lost else 1), y) for i, (x, y) in
               enumerate(batches)]  # fmt: skip
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="mixed_float16")])
    start = [rng.standard_normal((4, 3)).astype("float32") * 0.1, np.zeros(3, "float32")]
    model.set_weights(start)
    recipe = get_recipe("resnet_v1").with_options(
        clip_norm=clip, accumulate=accumulate, weight_decay=0.01
    )
    compile_model(model, make_optimizer(recipe, 0.1), soft_labels=False)
    optimizer = model.optimizer
    optimizer.dynamic_growth_steps = 3
    scales = []
    for i, (x, y) in enumerate(batches):
        before = numpy_of([*model.weights, *optimizer.inner_optimizer.variables])
        assert np.isfinite(model.train_on_batch(x, y)[0])
        after = numpy_of([*model.weights, *optimizer.inner_optimizer.variables])
        if i in lost:
            for old, new in zip(before, after, strict=True):
                np.testing.assert_array_equal(old, new)
        scales.append((float(optimizer.dynamic_scale), int(optimizer.step_counter)))
    expected, torchs = torch_steps(start, batches, clip, accumulate, lost)
    if accumulate == 1:  # torch's counts what is accumulated as one
        assert scales == torchs and {scale for scale, _ in scales} == {2.0**14, 2.0**15}
    # float16's sums are rounded by each backend in its own order
    np.testing.assert_allclose(model.get_weights()[0], expected[0], rtol=5e-4, atol=5e-5)
    np.testing.assert_allclose(model.get_weights()[1], expected[1], rtol=5e-4, atol=5e-5)


def test_a_schedule_counts_the_steps(backend, rng):
    schedule = schedules.CosineSchedule(0.5, epochs=5, steps_per_epoch=4, warmup_epochs=2)
    start, gradients = random_arrays(rng), random_arrays(rng, 24)
    got = run(SGD(schedule, momentum=0.9), start, gradients, backend)
    expected = run_torch(start, gradients, [schedule.value_at(i) for i in range(24)], momentum=0.9)
    assert_close(got, expected)


def test_a_schedule_of_keras_and_a_callable_work(backend, rng):
    start, gradients = random_arrays(rng), random_arrays(rng, 6)
    kerass = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=2, decay_rate=0.5)
    got = run(SGD(kerass, momentum=0.9), start, gradients, backend)
    halves = [0.1 * 0.5 ** (i / 2) for i in range(6)]
    assert_close(got, run_torch(start, gradients, halves, momentum=0.9))
    got = run(SGD(lambda: 0.3), start, gradients, backend)
    assert_close(got, run_torch(start, gradients, [0.3] * 6))


def test_the_rate_can_be_read_and_set():
    optimizer = SGD(1)
    optimizer.learning_rate = 0.25
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == 0.25
    optimizer.learning_rate = schedules.ConstantSchedule(0.5)
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == 0.5


@pytest.mark.parametrize("dtype, rtol", [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_half_precision_variables_are_updated(dtype, rtol, backend, rng):
    start, gradients = random_arrays(rng), random_arrays(rng, 10)
    options = {"momentum": 0.9, "weight_decay": 0.01}
    variables, optimizer = make_variables(start, dtype), SGD(0.01, **options)
    step = step_function(optimizer, variables, backend)
    for arrays in gradients:
        step([ops.cast(ops.convert_to_tensor(a), dtype) for a in arrays])
    assert {keras.backend.standardize_dtype(v.dtype) for v in variables} == {dtype}
    got = [np.asarray(ops.convert_to_numpy(ops.cast(v, "float32"))) for v in variables]
    assert_close(got, run_torch(start, gradients, [0.01] * 10, **options), rtol)


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_torchs_to_the_bit(dtype, rng):
    start = [torch.tensor(a).to(dtype) for a in random_arrays(rng)]
    gradients = [[torch.tensor(a).to(dtype) for a in arrays] for arrays in random_arrays(rng, 10)]
    parameters = [torch.nn.Parameter(t.clone()) for t in start]
    reference = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01, foreach=True)
    variables = make_variables(start, str(dtype).removeprefix("torch."))
    optimizer = SGD(0.1, momentum=0.9, weight_decay=0.01)
    for tensors in gradients:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.grad = tensor.clone()
        reference.step()
        optimizer.apply(tensors, variables)
    for variable, parameter in zip(variables, parameters, strict=True):
        assert torch.equal(variable.value, parameter)


@pytest.mark.once
def test_on_torch_all_variables_are_updated_in_one_go(monkeypatch, rng):
    def slow(*args):
        raise AssertionError("the fast path was left: this Keras does not call "
                             "`_backend_update_step` any more")  # fmt: skip

    monkeypatch.setattr(SGD, "update_step", slow)
    variables, optimizer = make_variables(random_arrays(rng)), SGD(0.1, momentum=0.9)
    optimizer.apply([torch.ones_like(v.value) for v in variables], variables)
    assert optimizer.iterations.value.item() == 1


@pytest.mark.once
@pytest.mark.parametrize(
    "rate", [0.1, schedules.CosineSchedule(0.1, epochs=5)], ids=["number", "schedule"]
)
def test_on_torch_no_step_waits_for_the_device(rate, rng):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    optimizer = SGD(rate, momentum=0.9, dampening=0.1, weight_decay=1e-4)
    variables = make_variables(random_arrays(rng))
    gradients = [torch.ones_like(v.value) for v in variables]
    optimizer.apply(gradients, variables)
    optimizer.apply(gradients, variables)
    with Record():
        for _ in range(3):
            optimizer.apply(gradients, variables)
    assert any("_fused_sgd_" in name for name in seen)
    assert not [name for name in seen if "_local_scalar_dense" in name or "_to_copy" in name]


@pytest.mark.once
def test_a_step_counter_that_was_assigned_is_noticed(rng):
    schedule = schedules.StepSchedule(0.1, step_size=1, gamma=0.1)
    variables, optimizer = make_variables(random_arrays(rng)), SGD(schedule)
    gradients = [torch.ones_like(v.value) for v in variables]
    optimizer.apply(gradients, variables)
    optimizer._iterations.assign(3)
    before = numpy_of(variables)[4].copy()
    optimizer.apply(gradients, variables)
    np.testing.assert_allclose(before - numpy_of(variables)[4], 1e-4, rtol=1e-2)
    assert int(optimizer.iterations.value) == 4


@pytest.mark.once
def test_slots_have_the_strides_of_their_parameter_and_any_gradient_will_do(rng):
    # A convolution kernel kept in OHWI memory, and gradients that came in another order.
    start = rng.standard_normal((3, 3, 2, 4)).astype("float32")
    parameter = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.SGD([parameter], 0.1, momentum=0.9, weight_decay=0.01)
    ohwi = torch.tensor(start).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    variable = keras.Variable(ohwi, name="kernel")
    assert variable.value.stride() == ohwi.stride() != parameter.stride()
    optimizer = SGD(0.1, momentum=0.9, weight_decay=0.01, gradient_accumulation_steps=2)
    optimizer.build([variable])
    for slot in (optimizer.momentums[0], optimizer._accumulated_gradients[0]):
        assert slot.value.stride() == ohwi.stride()
    optimizer = SGD(0.1, momentum=0.9, weight_decay=0.01)
    for i in range(6):
        gradient = torch.tensor(rng.standard_normal(start.shape).astype("float32"))
        parameter.grad = gradient.clone()
        reference.step()
        optimizer.apply([gradient if i % 2 else torch.empty_like(ohwi).copy_(gradient)], [variable])
    assert variable.value.stride() == ohwi.stride()
    assert_close(numpy_of([variable]), [parameter.detach().numpy()])


@pytest.mark.once
@pytest.mark.parametrize("rate", [0.1, schedules.StepSchedule(0.1, 2, 0.5)], ids=["float", "step"])
@pytest.mark.slow
def test_torch_compile_gives_the_same(rate, rng):
    options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    start, gradients = random_arrays(rng), random_arrays(rng, 6)
    variables, optimizer = make_variables(start), SGD(rate, **options)
    optimizer.build(variables)
    step = torch.compile(optimizer.apply, backend="aot_eager")
    for arrays in gradients:
        step([torch.tensor(a) for a in arrays])
    expected = [0.1] * 6 if rate == 0.1 else [rate.value_at(i) for i in range(6)]
    assert_close(numpy_of(variables), run_torch(start, gradients, expected, **options))


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="fc1"),
            keras.layers.BatchNormalization(name="bn1", momentum=0.9, epsilon=1e-5),
            keras.layers.ReLU(),
            keras.layers.Dense(3, name="fc2"),
        ]
    )


def data(rng, count=40):
    return rng.standard_normal((count, 6)).astype("float32"), rng.standard_normal(
        (count, 3)
    ).astype("float32")


def torch_kernels(start, x, y, options):
    """The kernels of torch's small model, trained from `start` for five epochs of five batches."""
    kernel1, bias1, *_, kernel2, bias2 = start
    fc1, fc2, bn = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3), torch.nn.BatchNorm1d(8)
    with torch.no_grad():
        for layer, kernel, bias in ((fc1, kernel1, bias1), (fc2, kernel2, bias2)):
            layer.weight.copy_(torch.tensor(kernel.T.copy()))
            layer.bias.copy_(torch.tensor(bias))
    reference = torch.nn.Sequential(fc1, bn, torch.nn.ReLU(), fc2)
    sgd = torch.optim.SGD(reference.parameters(), 0.1, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, step_size=2, gamma=0.3)
    for _ in range(5):
        for i in range(0, 40, 8):
            sgd.zero_grad()
            torch.nn.functional.mse_loss(reference(x[i : i + 8]), y[i : i + 8]).backward()
            sgd.step()
        scheduler.step()
    return [fc1.weight.detach().numpy().T, fc2.weight.detach().numpy().T]


def test_fit_trains_a_model_to_torchs_weights(rng):
    x, y = data(rng)
    model = small_model()
    start = [np.array(w) for w in model.get_weights()]
    options = {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    schedule = schedules.StepSchedule(0.1, step_size=2, gamma=0.3, steps_per_epoch=5)
    model.compile(SGD(schedule, **options), loss="mse")
    model.fit(x, y, batch_size=8, epochs=5, shuffle=False, verbose=0)
    ours = numpy_of([model.get_layer("fc1").kernel, model.get_layer("fc2").kernel])

    def train_torch(change):
        return torch_kernels(start, change(torch.tensor(x)), torch.tensor(y), options)

    def difference(some, others):
        return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(some, others, strict=True))

    theirs = train_torch(lambda x: x)
    found = difference(ours, theirs)
    assert found <= allowed(2e-5, found, train_torch, theirs, difference)


def test_tensorflow_lets_a_trained_model_go(rng, backend):
    if backend != "tensorflow":
        pytest.skip("TensorFlow keeps the graphs")
    from tensorflow.python.framework.func_graph import FuncGraph

    def graphs_after_training():
        model = small_model()
        model.compile(SGD(0.1, momentum=0.9), loss="mse")
        model.train_on_batch(*data(rng))
        del model
        gc.collect()
        return sum(isinstance(thing, FuncGraph) for thing in gc.get_objects())

    assert graphs_after_training() == graphs_after_training()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"dampening": 0.3, "rate_multipliers": {"fc1": 0.1}, "decay_norms": False},
            marks=pytest.mark.long("tensorflow", "jax"),
        ),
        {"gradient_accumulation_steps": 3, "nesterov": True, "global_clipnorm": 1.0},
    ],
    ids=["dampening", "accumulation"],
)
def test_training_continued_from_a_file_is_equal_to_the_bit(options, rng, tmp_path):
    x, y = data(rng)
    schedule = schedules.CosineSchedule(0.1, epochs=4, steps_per_epoch=5)
    model = small_model()
    model.compile(SGD(schedule, momentum=0.9, weight_decay=1e-3, **options), loss="mse")

    def train(model):
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)

    train(model)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again.optimizer, SGD)
    assert again.optimizer.get_config() == model.optimizer.get_config()
    train(model)
    train(again)
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(*numpy_of([one, other]))


@pytest.mark.once
def test_the_config_round_trips_through_json():
    optimizer = SGD(
        schedules.StepSchedule(0.1),
        momentum=0.9,
        weight_decay=1e-4,
        nesterov=True,
        decay_norms=False,
        decay_biases=False,
        rate_multipliers={"^layer": 0.1, "fc": 2},
        global_clipnorm=1.0,
        name="mine",
    )
    saved = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    assert saved["registered_name"] == "keras_resnet>SGD"
    again = keras.optimizers.deserialize(saved)
    assert type(again) is SGD
    assert again.get_config() == optimizer.get_config()


@pytest.mark.once
@pytest.mark.parametrize(
    "options, message",
    [
        ({"momentum": -0.1}, r"`momentum` must be a float between \[0, 1\]. Received: -0\.1"),
        ({"momentum": 2.0}, r"`momentum` must be a float between \[0, 1\]."),
        ({"weight_decay": -1e-4}, "weight_decay must be"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"nesterov": True}, "needs a momentum above 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "no dampening"),
    ],
)
def test_options_that_torch_refuses_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SGD(**options)


def test_kernels_are_updated_where_they_lie(backend, rng):
    """No copies: torch's fused kernel makes them of what is not contiguous."""
    if backend != "torch":
        pytest.skip("a property of the torch path")
    import torch

    from keras_resnet.layers.conv import Conv2D

    layer = Conv2D(6, 3)
    layer.build((None, 8, 8, 4))
    weight = layer.kernel.value
    expected = torch.nn.Parameter(weight.detach().clone())
    gradient = torch.tensor(rng.normal(size=(6, 3, 3, 4)).astype("float32")).permute(1, 2, 3, 0)
    optimizer = SGD(0.1, momentum=0.9, weight_decay=0.01)
    reference = torch.optim.SGD([expected], 0.1, momentum=0.9, weight_decay=0.01)
    address = weight.data_ptr()
    for step in range(3):
        with torch.profiler.profile() as profile, torch.no_grad():
            optimizer.apply([gradient], [layer.kernel])
        assert "aten::clone" not in {event.key for event in profile.key_averages()} or step == 0
        expected.grad = gradient.clone()
        reference.step()
    assert layer.kernel.value.data_ptr() == address
    np.testing.assert_allclose(weight.detach().numpy(), expected.detach().numpy(), rtol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize(
    "strides, fused",
    [
        ((77, 5, 4, 1), True),  # contiguous, but on axes of size one
        ((1, 1, 1, 6), True),  # as a convolution's gradient comes from OIHW memory, and again
        ((24, 24, 1, 6), True),
        ((96, 96, 2, 12), False),  # gaps
    ],
)
def test_strides_of_axes_of_size_one_leave_the_fused_kernel(strides, fused, rng):
    from torch.optim.sgd import sgd

    from keras_resnet.training.optimizers import _can_fuse

    def lying(array, strides):
        return torch.empty_strided(array.shape, strides).copy_(torch.tensor(array))

    weight, grad, buffer = rng.normal(size=(3, 1, 1, 6, 4)).astype("float32")
    own = (24, 24, 4, 1) if strides[-1] == 1 else (24, 24, 1, 6)
    given = lying(weight, own), lying(grad, strides), lying(buffer, own)
    assert _can_fuse(*([tensor] for tensor in given)) is fused
    if fused:  # as it would be for each number by itself
        sgd(
            [given[0]], [given[1]], [given[2]], weight_decay=0.1, momentum=0.9, lr=0.1,
            dampening=0.0, nesterov=False, maximize=False, fused=True, foreach=False,
        )  # fmt: skip
        expected = 0.9 * buffer + grad + 0.1 * weight
        np.testing.assert_allclose(given[2].numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(given[0].numpy(), weight - 0.1 * expected, rtol=1e-5, atol=1e-6)
