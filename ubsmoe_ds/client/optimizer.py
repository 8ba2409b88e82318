"""Describe a client's optimiser to DeepSpeed, reset it, and schedule its learning rate over the rounds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.deepspeed_json import DeepSpeedConfig
from ubsmoe_ds.config.training import TrainConfig

ADAMS = ("adam", "adamw")


def engine_config(settings: DeepSpeedConfig) -> dict[str, Any]:
    """Return the DeepSpeed section as DeepSpeed gets it: no progress lines, no clipping where it would be wrong."""
    config = settings.model_dump(exclude_none=True)
    config.setdefault("steps_per_print", 2**31)
    if settings.zero_stage == 0:
        config["gradient_clipping"] = 0.0  # see GradientHook
    optimizer = config["optimizer"]
    params = optimizer.get("params", {})
    if optimizer["type"].lower() in ADAMS and "torch_adam" not in params:
        # DeepSpeed compiles its own Adam at start; torch's needs no compiler and is as fast for adapters. Their
        # defaults differ in one value: DeepSpeed's does not decay weights, torch's AdamW does
        optimizer["params"] = {"torch_adam": True, "weight_decay": 0.0, **params}
    return config


def rate_factor(train: TrainConfig, number: int) -> float:
    """Return the factor of the learning rate in a round, the same for all clients and steps of it [ours].

    With W rounds of warm-up and R rounds in all, round n (from 1) has n / (W + 1) up to W; after that, with
    t = (n - W - 1) / (R - W) from 0 to just below 1, it has 1 (constant), 1 - t (linear) or (1 + cos(pi t)) / 2.

    Args:
        train: the section.
        number: the round.
    """
    warmup = train.warmup_rounds
    if number <= warmup:
        return number / (warmup + 1)
    t = (number - warmup - 1) / (train.rounds - warmup)
    return {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}[train.lr_schedule]


@contextmanager
def refusals_of_deepspeed() -> Iterator[None]:
    """Turn what DeepSpeed says about a wrong config into a user's error, so that nothing is started again.

    Raises:
        UserError: with DeepSpeed's words.
    """
    try:
        yield
    except (AssertionError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"deepspeed: refused by DeepSpeed ({type(error).__name__}: {message}); change it") from error


def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser the state of a new one, in place where it can be, so that ZeRO's references stay valid.

    Moments and steps start at 0, and the few others at what torch's optimisers set them to: NAdam's product of
    momenta and ASGD's mu at 1, ASGD's eta and Rprop's step sizes at the learning rate, Adagrad's sum at its option.
    """
    zero: list[Tensor] = []
    for group in optimizer.param_groups:
        first = {
            "mu_product": 1.0,
            "mu": 1.0,
            "eta": group["lr"],
            "step_size": group["lr"],
            "sum": group.get("initial_accumulator_value", 0.0),
        }
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if group.get("dampening"):
                state.clear()  # SGD dampens all gradients but the first
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if start := first.get(key, 0.0):
                    value.fill_(start)
                else:
                    zero.append(value)
    if zero:
        torch._foreach_zero_(zero)
