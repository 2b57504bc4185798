"""The optimizers against bitsandbytes and torch on the same values; schedules; the loss scaler of float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn

from octavo.errors import CheckpointError, UsageError
from octavo.layers.lora import FlatGroup, flatten_
from octavo.train.optim import OPTIMIZERS, SCHEDULES, Adam, LossScaler, OptimizerSettings, Schedule

# More than 4096 values with weight decay, so that their moments are stored in 8 bits; those of biases are not.
SHAPES = {"a": (64, 80), "bias": (30,), "b": (7, 11), "norm": (5,)}
DECAYING = ("a", "b")
UNCLIPPED = OptimizerSettings(weight_decay=0.1, max_grad_norm=0.0)


def fresh_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def flat(tensors: dict[str, Tensor], group: FlatGroup) -> Tensor:
    return torch.cat([tensors[name].detach().reshape(-1) for name in group.names])


def fill(groups: list[FlatGroup], gradients: dict[str, Tensor]) -> None:
    for group in groups:
        assert group.values.grad is not None
        group.values.grad.copy_(flat(gradients, group))


def optimizer_of(settings: OptimizerSettings) -> Adam:
    return Adam(flatten_(fresh_parameters()), settings)


def advance(optimizer: Adam, steps: range) -> None:
    for step in steps:
        fill(optimizer.groups, gradients_of(step))
        optimizer.step(0.01 * (step + 1), gradient_norm=optimizer.gradient_norm())


def test_the_8_bit_state_has_the_format_of_bitsandbytes() -> None:
    ours = optimizer_of(UNCLIPPED)
    values = [nn.Parameter(group.values.detach().clone()) for group in ours.groups]
    arguments = [{"params": [values[0]], "weight_decay": 0.1}, {"params": [values[1]], "weight_decay": 0.0}]
    theirs: Any = AdamW8bit(arguments, lr=0.0)
    for step in range(5):
        for group, value in zip(ours.groups, values, strict=True):
            value.grad = flat(gradients_of(step), group)
        for arguments_of_group in theirs.param_groups:
            arguments_of_group["lr"] = 0.01 * (step + 1)
        if step == 4:  # ours continues from their state after four steps
            saved = {
                f"{index}.{key}": torch.as_tensor(tensor)
                for index, value in enumerate(values)
                for key, tensor in theirs.state[value].items()
            }
            ours.load_state(saved)
            assert saved["0.state1"].dtype == torch.uint8
            assert {key for key in saved if "qmap" not in key} == ours.state().keys()
            assert all(tensor.dtype == saved[key].dtype for key, tensor in ours.state().items())
            for group, value in zip(ours.groups, values, strict=True):
                group.values.data.copy_(value.data)
        theirs.step()
    advance(ours, range(4, 5))
    for group, value in zip(ours.groups, values, strict=True):
        torch.testing.assert_close(group.values.detach(), value.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.groups[0].values, values[0])


def test_32_bit_adam_on_flat_groups_equals_torch_adamw_on_separate_tensors() -> None:
    ours, parameters = optimizer_of(OptimizerSettings("adamw", weight_decay=0.1, max_grad_norm=0.0)), fresh_parameters()
    theirs = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in DECAYING], "weight_decay": 0.1},
            {"params": [parameters[name] for name in ("bias", "norm")], "weight_decay": 0.0},
        ],
        lr=0.0,
    )
    for step in range(5):
        for name, gradient in gradients_of(step).items():
            parameters[name].grad = gradient
        for arguments in theirs.param_groups:
            arguments["lr"] = 0.01 * (step + 1)
        theirs.step()
    advance(ours, range(5))
    for group in ours.groups:
        torch.testing.assert_close(group.values.detach(), flat(dict(parameters), group), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clipping_over_all_groups_equals_torch(clip: float) -> None:
    optimizer, parameters = optimizer_of(OptimizerSettings("adamw", max_grad_norm=clip)), fresh_parameters()
    for name, gradient in gradients_of(0).items():
        parameters[name].grad = gradient
    expected_norm = nn.utils.clip_grad_norm_(list(parameters.values()), clip)
    fill(optimizer.groups, gradients_of(0))
    norm = optimizer.gradient_norm()
    optimizer.step(0.1, gradient_norm=norm)
    torch.testing.assert_close(norm, expected_norm)
    clipped = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for group in optimizer.groups:
        torch.testing.assert_close(group.values.grad, flat(clipped, group))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_the_norm_is_not_finite_if_one_gradient_is_not(wrong: float) -> None:
    optimizer = optimizer_of(UNCLIPPED)
    assert optimizer.groups[1].values.grad is not None
    optimizer.groups[1].values.grad[3] = wrong
    assert not optimizer.gradient_norm().isfinite()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_only_matrices_decay(kind: str) -> None:
    optimizer = optimizer_of(OptimizerSettings(kind, weight_decay=0.5))
    before = [group.values.detach().clone() for group in optimizer.groups]
    optimizer.zero_gradients()
    optimizer.step(0.1, gradient_norm=optimizer.gradient_norm())
    matrices, vectors = optimizer.groups
    torch.testing.assert_close(matrices.values.detach(), before[0] * (1 - 0.1 * 0.5))
    assert set(matrices.names) == set(DECAYING)
    assert torch.equal(vectors.values, before[1])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_loaded_state_continues_bit_identically(kind: str) -> None:
    settings = OptimizerSettings(kind, weight_decay=0.1)
    uninterrupted, first, second = (optimizer_of(settings) for _ in range(3))
    advance(uninterrupted, range(6))
    advance(first, range(3))
    state = first.state()
    with torch.no_grad():
        for old, new in zip(first.groups, second.groups, strict=True):
            new.values.copy_(old.values)
    second.load_state(state)
    advance(second, range(3, 6))
    for expected, group in zip(uninterrupted.groups, second.groups, strict=True):
        assert torch.equal(group.values, expected.values)
    assert all(torch.equal(tensor, second.state()[key]) for key, tensor in uninterrupted.state().items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_is_a_copy(kind: str) -> None:
    optimizer, other = optimizer_of(OptimizerSettings(kind)), optimizer_of(OptimizerSettings(kind))
    advance(optimizer, range(2))
    state = optimizer.state()
    saved = {key: tensor.clone() for key, tensor in state.items()}
    advance(optimizer, range(2, 3))
    other.load_state(state)
    advance(other, range(2, 3))
    assert all(torch.equal(state[key], saved[key]) for key in saved)


def test_an_incomplete_state_raises_an_error() -> None:
    optimizer = optimizer_of(UNCLIPPED)
    advance(optimizer, range(1))
    state = optimizer.state()
    del state["0.absmax2"]
    with pytest.raises(CheckpointError, match="lacks absmax2"):
        optimizer.load_state(state)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_of_other_parameters_raises_an_error(kind: str) -> None:
    optimizer = optimizer_of(OptimizerSettings(kind))
    advance(optimizer, range(1))
    smaller = Adam(flatten_({"a": nn.Parameter(torch.zeros(64, 79))}), OptimizerSettings(kind))
    with pytest.raises(CheckpointError, match="another set of trained parameters"):
        smaller.load_state(optimizer.state())


def test_an_unknown_optimizer_or_schedule_raises_an_error_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"'sgd'(.|\n)*adamw8bit or adamw"):
        optimizer_of(OptimizerSettings("sgd"))
    with pytest.raises(UsageError, match=r"'steps'(.|\n)*cosine, linear, constant"):
        Schedule(1.0, 10, kind="steps")


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(kind: str) -> None:
    schedule = Schedule(2.0, 20, warmup=4, kind=kind, floor=0.1)
    assert [schedule.at(step) for step in range(1, 5)] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_rates_decrease_from_the_peak_to_the_floor(kind: str) -> None:
    schedule = Schedule(2.0, 24, warmup=4, kind=kind, floor=0.1)
    rates = [schedule.at(step) for step in range(4, 25)]
    assert rates == sorted(rates, reverse=True)
    middle, last = {"constant": (2.0, 2.0), "linear": (1.1, 0.2), "cosine": (1.1, 0.2)}[kind]
    assert schedule.at(14) == pytest.approx(middle)
    assert schedule.at(24) == pytest.approx(last)


def test_a_cosine_schedule_decreases_later_than_a_linear_one() -> None:
    linear, cosine = (Schedule(1.0, 100, kind=kind) for kind in ("linear", "cosine"))
    assert linear.at(25) == pytest.approx(0.75)
    assert cosine.at(25) == pytest.approx((1 + 2**-0.5) / 2)
    assert Schedule(1.0, 3, warmup=3).at(3) == 1.0  # warm-up only


def test_an_overflow_halves_the_scale_and_finite_steps_double_it() -> None:
    scaler = LossScaler(torch.float16, patience=3)
    start = scaler.scale
    scaler.update(finite=False)
    assert scaler.scale == start / 2
    for finite in (True, True, False, True, True):  # the overflow resets the count
        scaler.update(finite=finite)
    assert scaler.scale == start / 4
    scaler.update(finite=True)
    assert scaler.scale == start / 2
    assert scaler.good_steps == 0


def test_the_scale_doubles_after_200_finite_steps_up_to_2_to_the_24() -> None:
    scaler = LossScaler(torch.float16)
    for _ in range(199):
        scaler.update(finite=True)
    assert scaler.scale == 2.0**13
    for _ in range(12 * 200 + 1):
        scaler.update(finite=True)
    assert scaler.scale == 2.0**24


def test_unscale_divides_gradients_by_the_loss_scale() -> None:
    scaler, groups = LossScaler(torch.float16), flatten_(fresh_parameters())
    fill(groups, {name: gradient * scaler.scale for name, gradient in gradients_of(0).items()})
    scaler.unscale_(groups)
    assert scaler.scale > 1
    for group in groups:
        assert group.values.grad is not None
        assert torch.equal(group.values.grad, flat(gradients_of(0), group))


def test_a_scaler_continues_from_its_state() -> None:
    scaler, other = LossScaler(torch.float16, patience=3), LossScaler(torch.float16, patience=3)
    for finite in (False, True, True):
        scaler.update(finite=finite)
    other.load_state(scaler.state())
    for continued in (scaler, other):
        continued.update(finite=True)
    assert other.state() == scaler.state() == {"scale": 2.0**13, "good_steps": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scaler_is_inactive_in_float32_and_bfloat16(dtype: torch.dtype) -> None:
    scaler = LossScaler(dtype, patience=1)
    scaler.update(finite=False)
    scaler.update(finite=True)
    assert (scaler.active, scaler.scale) == (False, 1.0)
