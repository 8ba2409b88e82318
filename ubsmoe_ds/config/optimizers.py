"""Declare the optimisers and learning-rate schedulers of the DeepSpeed JSON: their parameters, defaults and bounds.

DeepSpeed checks them when it makes them, on every rank, after seconds of imports. With these tables the config is
refused before. Imports no torch: tests/unit/client/test_optimizer.py compares the tables with torch and DeepSpeed.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ubsmoe_ds.config.sections import Count, Fraction, NotNegative, Positive, PositiveInt, Section

Rate = Annotated[float, Field(ge=0, lt=1)]
UpToOne = Annotated[float, Field(ge=0, le=1)]
Rates = Annotated[list[Rate], Field(min_length=2, max_length=2)]
Pair = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class Parameters(Section):
    """Parameters of every optimiser of torch, but for gradients of gradients and CUDA graphs, which are not used."""

    kept: ClassVar[int] = 2  # values that it keeps for each weight
    keeps_more: ClassVar[tuple[str, ...]] = ()  # parameters of which each, where it is set, adds one
    lr: NotNegative = 0.001
    maximize: bool = False
    foreach: bool | None = None
    differentiable: Literal[False] = False


class Decaying(Parameters):
    """Those with weight decay."""

    weight_decay: NotNegative = 0.0


class Fusable(Decaying):
    """Those that torch has a fused kernel for."""

    fused: bool | None = None

    @model_validator(mode="after")
    def _one_kernel(self) -> Fusable:
        if self.fused and self.foreach:
            raise ValueError("fused and foreach cannot both be true; leave one out")
        return self


class Adam(Fusable):
    """Adam and AdamW, which DeepSpeed takes for the same unless `adam_w_mode` is false."""

    keeps_more = ("amsgrad",)
    betas: Rates = [0.9, 0.999]
    eps: NotNegative = 1e-8
    amsgrad: bool = False
    capturable: Literal[False] = False
    torch_adam: Literal[True] = True
    adam_w_mode: bool = True


class Adagrad(Fusable):
    """torch.optim.Adagrad."""

    kept = 1
    lr: NotNegative = 0.01
    lr_decay: NotNegative = 0.0
    initial_accumulator_value: NotNegative = 0.0
    eps: NotNegative = 1e-10


class SGD(Fusable):
    """torch.optim.SGD."""

    kept = 0
    keeps_more = ("momentum",)
    momentum: NotNegative = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov(self) -> SGD:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov true needs a momentum above 0 and dampening 0")
        return self


class Adadelta(Decaying):
    """torch.optim.Adadelta."""

    lr: NotNegative = 1.0
    rho: UpToOne = 0.9
    eps: NotNegative = 1e-6
    capturable: Literal[False] = False


class Adamax(Decaying):
    """torch.optim.Adamax."""

    lr: NotNegative = 0.002
    betas: Rates = [0.9, 0.999]
    eps: NotNegative = 1e-8
    capturable: Literal[False] = False


class ASGD(Decaying):
    """torch.optim.ASGD."""

    kept = 1
    lr: NotNegative = 0.01
    lambd: float = 1e-4
    alpha: float = 0.75
    t0: float = 1e6
    capturable: Literal[False] = False


class RAdam(Decaying):
    """torch.optim.RAdam."""

    betas: Rates = [0.9, 0.999]
    eps: NotNegative = 1e-8
    decoupled_weight_decay: bool = False
    capturable: Literal[False] = False


class NAdam(RAdam):
    """torch.optim.NAdam."""

    lr: NotNegative = 0.002
    momentum_decay: NotNegative = 0.004


class RMSprop(Decaying):
    """torch.optim.RMSprop."""

    kept = 1
    keeps_more = ("momentum", "centered")
    lr: NotNegative = 0.01
    alpha: NotNegative = 0.99
    eps: NotNegative = 1e-8
    momentum: NotNegative = 0.0
    centered: bool = False
    capturable: Literal[False] = False


class Rprop(Parameters):
    """torch.optim.Rprop."""

    lr: NotNegative = 0.01
    etas: Pair = [0.5, 1.2]
    step_sizes: Pair = [1e-6, 50.0]
    capturable: Literal[False] = False

    @model_validator(mode="after")
    def _around_one(self) -> Rprop:
        if not self.etas[0] < 1 < self.etas[1]:
            raise ValueError(f"etas {self.etas} must lie below and above 1")
        return self


# DeepSpeed's names, in any case; then torch's classes, as they are written
DEEPSPEED_OPTIMIZERS: dict[str, type[Parameters]] = {"adam": Adam, "adamw": Adam, "adagrad": Adagrad}
TORCH_OPTIMIZERS: dict[str, type[Parameters]] = {
    kind.__name__: kind for kind in (SGD, Adadelta, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop)
}
_A_NUMBER = "DeepSpeed's kernels keep its step as a number that a checkpoint cannot restore"
UNSUPPORTED = {
    "lamb": _A_NUMBER,
    "lion": _A_NUMBER,
    **dict.fromkeys(("muadam", "muadamw", "musgd"), "it needs the package mup, which is not installed"),
    "muon": "it takes matrices, and the adapters of experts are stacked",
    "adafactor": "it keeps less than one value per weight, which no other layout could restore",
    "lbfgs": "it calls the model by itself",
    "sparseadam": "it needs sparse gradients",
}


class LRRangeTest(Section):
    """DeepSpeed's."""

    lr_range_test_min_lr: NotNegative = 0.001
    lr_range_test_step_size: PositiveInt = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False


class OneCycle(Section):
    """DeepSpeed's."""

    cycle_min_lr: NotNegative
    cycle_max_lr: NotNegative
    decay_lr_rate: float = 0.0
    cycle_first_step_size: PositiveInt = 2000
    cycle_second_step_size: Count | None = None
    cycle_first_stair_count: Count = 0
    cycle_second_stair_count: Count | None = None
    decay_step_size: Count = 0
    cycle_momentum: bool = True
    cycle_min_mom: Rate = 0.8
    cycle_max_mom: Rate = 0.9
    decay_mom_rate: float = 0.0


class WarmupLR(Section):
    """DeepSpeed's; `warmup_max_lr` null: the optimiser's lr."""

    warmup_min_lr: NotNegative = 0.0
    warmup_max_lr: NotNegative | None = None
    warmup_num_steps: PositiveInt = 1000
    warmup_type: Literal["log", "linear"] = "log"


class WarmupDecayLR(WarmupLR):
    """DeepSpeed's."""

    total_num_steps: PositiveInt
    warmup_max_lr: NotNegative | None = 0.001


class WarmupCosineLR(Section):
    """DeepSpeed's."""

    total_num_steps: PositiveInt
    warmup_min_ratio: NotNegative = 0.0
    warmup_num_steps: PositiveInt = 1000
    cos_min_ratio: NotNegative = 0.0001
    warmup_type: Literal["log", "linear"] = "log"


class StepLR(Section):
    """torch's, as all below."""

    step_size: PositiveInt
    gamma: NotNegative = 0.1


class MultiStepLR(Section):
    """torch's."""

    milestones: list[Count]
    gamma: NotNegative = 0.1


class ConstantLR(Section):
    """torch's."""

    factor: UpToOne = 1 / 3
    total_iters: PositiveInt = 5


class LinearLR(Section):
    """torch's."""

    start_factor: Fraction = 1 / 3
    end_factor: UpToOne = 1.0
    total_iters: PositiveInt = 5


class ExponentialLR(Section):
    """torch's."""

    gamma: NotNegative


class PolynomialLR(Section):
    """torch's."""

    total_iters: PositiveInt = 5
    power: NotNegative = 1.0


class CosineAnnealingLR(Section):
    """torch's."""

    T_max: PositiveInt
    eta_min: NotNegative = 0.0


class CosineAnnealingWarmRestarts(Section):
    """torch's."""

    T_0: PositiveInt
    T_mult: PositiveInt = 1
    eta_min: NotNegative = 0.0


DEEPSPEED_SCHEDULERS: dict[str, type[Section]] = {
    kind.__name__: kind for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
# they take an optimiser of torch, which DeepSpeed gives them in fp32 and at ZeRO stage 0 only
TORCH_SCHEDULERS: dict[str, type[Section]] = {
    kind.__name__: kind
    for kind in (
        *(StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR),
        *(CosineAnnealingLR, CosineAnnealingWarmRestarts),
    )
}
