"""The tables of optimisers and schedulers are torch's and DeepSpeed's; a reset optimiser is a new one to the bit."""

import inspect

import pytest
import torch
from torch import nn

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client.optimizer import engine_config, rate_factor, refusals_of_deepspeed, reset_state
from ubsmoe_ds.config import optimizers
from ubsmoe_ds.config.deepspeed_json import DeepSpeedConfig
from ubsmoe_ds.config.optimizers import (
    DEEPSPEED_OPTIMIZERS,
    DEEPSPEED_SCHEDULERS,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULERS,
)
from ubsmoe_ds.config.training import TrainConfig

CLASSES = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad} | {
    name: getattr(torch.optim, name) for name in TORCH_OPTIMIZERS
}
TABLE = DEEPSPEED_OPTIMIZERS | TORCH_OPTIMIZERS
DEEPSPEEDS_OWN = {"torch_adam", "adam_w_mode"}  # DeepSpeed takes them out before it calls torch


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 1, [1 / 2, 1, 1, 1, 1]),
        ("linear", 0, [1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ("cosine", 1, [1 / 2, 1, (1 + 2**-0.5) / 2, 1 / 2, (1 - 2**-0.5) / 2]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 3 / 4, 1 / 4]),
    ],
)
def test_the_learning_rate_of_five_rounds_by_hand(schedule, warmup, expected):
    """cos(pi / 4) = 2^-0.5, cos(pi / 3) = 1 / 2; no round has the rate 0."""
    train = TrainConfig(rounds=5, lr_schedule=schedule, warmup_rounds=warmup)
    assert [rate_factor(train, number) for number in range(1, 6)] == pytest.approx(expected)


def test_after_warm_up_the_factors_are_transformers():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for schedule, make in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = make(optimizer, num_warmup_steps=3, num_training_steps=11).lr_lambdas[0]
        train = TrainConfig(rounds=11, lr_schedule=schedule, warmup_rounds=3)
        for number in range(4, 12):
            assert rate_factor(train, number) == pytest.approx(theirs(number - 1))


def parameters_of(kind, *, without):
    """Name and default of each parameter of a constructor."""
    found = inspect.signature(kind.__init__).parameters
    return {name: p.default for name, p in found.items() if name not in {"self", *without}}


def defaults_of(section):
    """Name and default of each key of a table; `inspect`'s word for one that must be given."""
    empty = inspect.Parameter.empty
    return {name: empty if f.is_required() else f.default for name, f in section.model_fields.items()}


def same(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", TABLE)
def test_an_optimisers_parameters_and_defaults_are_torchs(name):
    """Only AdamW's weight decay is DeepSpeed's: 0, where torch's is 0.01."""
    left_out = {"decoupled_weight_decay"} if name == "adam" else set()  # DeepSpeed's word for it is adam_w_mode
    theirs = parameters_of(CLASSES[name], without={"params", *left_out})
    ours = {key: value for key, value in defaults_of(TABLE[name]).items() if key not in DEEPSPEEDS_OWN}
    if name == "adamw":
        assert theirs.pop("weight_decay") == 0.01 and ours.pop("weight_decay") == 0.0
    assert ours == {key: same(value) for key, value in theirs.items()}


def test_deepspeeds_adam_has_the_defaults_of_the_table():
    from deepspeed.ops.adam import FusedAdam

    theirs, ours = parameters_of(FusedAdam, without={"params"}), defaults_of(DEEPSPEED_OPTIMIZERS["adamw"])
    shared = set(theirs) & set(ours)
    assert shared == {"lr", "betas", "eps", "weight_decay", "amsgrad", "adam_w_mode"}
    assert {key: same(theirs[key]) for key in shared} == {key: ours[key] for key in shared}


@pytest.mark.parametrize("name", DEEPSPEED_SCHEDULERS | TORCH_SCHEDULERS)
def test_a_schedulers_parameters_and_defaults_are_theirs(name):
    from deepspeed.runtime import lr_schedules

    kind = getattr(lr_schedules if name in DEEPSPEED_SCHEDULERS else torch.optim.lr_scheduler, name)
    theirs = parameters_of(kind, without={"optimizer", "last_batch_iteration", "last_epoch"})
    assert defaults_of((DEEPSPEED_SCHEDULERS | TORCH_SCHEDULERS)[name]) == theirs


def test_the_keys_of_deepspeeds_sections_are_deepspeeds():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from ubsmoe_ds.config import deepspeed_json as ours

    pairs = [
        (ours.ZERO, DeepSpeedZeroConfig),
        (ours.BF16_KEYS, DeepSpeedBF16Config),
        (ours.FP16_KEYS, DeepSpeedFP16Config),
        (ours.COMMS, CommsLoggerConfig),
    ]
    for own, theirs in pairs:
        known = {field.alias or name for name, field in theirs.model_fields.items()}
        assert known - set(own.model_fields) <= {"zenflow"} and set(own.model_fields) <= known, theirs


def settings_for(kind, **params):
    return DeepSpeedConfig.model_validate(tiny.deepspeed() | {"optimizer": {"type": kind, "params": params}})


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "adamw"])
def test_a_silent_json_gets_deepspeeds_weight_decay(kind):
    """DeepSpeed's Adam decays nothing; who asks for torch's by name gets torch's default."""
    assert engine_config(settings_for(kind))["optimizer"]["params"] == {"torch_adam": True, "weight_decay": 0.0}
    assert engine_config(settings_for(kind, weight_decay=0.1))["optimizer"]["params"]["weight_decay"] == 0.1
    assert engine_config(settings_for(kind, torch_adam=True))["optimizer"]["params"] == {"torch_adam": True}


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adagrad"])
def test_other_optimisers_get_what_the_json_says(kind):
    assert engine_config(settings_for(kind, lr=0.5))["optimizer"] == {"type": kind, "params": {"lr": 0.5}}


# what an optimiser keeps depends on its options
OPTIONS = {
    **{name: [{}] for name in CLASSES},
    "adam": [{}, {"amsgrad": True}],
    "adamw": [{}, {"amsgrad": True}, {"foreach": False}],
    "adagrad": [{}, {"initial_accumulator_value": 0.3, "lr_decay": 0.1}],
    "SGD": [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}, {}],
    "RMSprop": [{}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}],
    "ASGD": [{}, {"t0": 1.0, "lambd": 0.1}],
}


def train(optimizer, weights, count, seed):
    """Take steps with known gradients; return the weights after each."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        seen.append([weight.detach().clone() for weight in weights])
    return seen


def new_weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((2, 3, 4), (5,), (1,))]


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in OPTIONS for options in OPTIONS[name]])
def test_a_reset_optimiser_is_a_new_one_to_the_bit(name, options):
    """Train, put the first weights back, reset, and train on: the same weights as with an optimiser just made."""
    used, fresh = new_weights(), new_weights()
    optimizer = CLASSES[name](used, **options)
    train(optimizer, used, 4, seed=1)
    with torch.no_grad():
        for weight, first in zip(used, fresh, strict=True):
            weight.copy_(first)
    reset_state(optimizer)
    after = train(optimizer, used, 4, seed=2)
    expected = train(CLASSES[name](fresh, **options), fresh, 4, seed=2)
    for step, step_expected in zip(after, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, step_expected, strict=True))


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in OPTIONS for options in OPTIONS[name]])
def test_the_values_kept_for_each_weight_are_counted(name, options):
    """As torch keeps them after a step; a step number or a rate of all weights together is no such value."""
    weights = new_weights()[:2]  # of more than one element
    optimizer = CLASSES[name](weights, **options)
    train(optimizer, weights, 1, seed=1)
    for weight in weights:
        kept = [value for value in optimizer.state[weight].values() if getattr(value, "shape", None) == weight.shape]
        assert settings_for(name, **options).moments == len(kept)


def test_every_optimiser_that_a_config_may_name_is_reset_in_a_test():
    assert set(OPTIONS) == set(TABLE)
    assert not set(optimizers.UNSUPPORTED) & {name.lower() for name in TABLE}


def test_moments_stay_where_they_are():
    """ZeRO holds references to them."""
    weights = new_weights()
    optimizer = torch.optim.AdamW(weights)
    train(optimizer, weights, 1, seed=1)
    held = optimizer.state[weights[0]]["exp_avg"]
    reset_state(optimizer)
    assert optimizer.state[weights[0]]["exp_avg"] is held and not held.any()


def test_what_deepspeed_refuses_is_a_users_error():
    with pytest.raises(UserError, match=r"deepspeed: refused by DeepSpeed \(TypeError: no such parameter\)"):
        with refusals_of_deepspeed():
            raise TypeError("no such\n parameter")
