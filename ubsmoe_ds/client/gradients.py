"""Between backward and the optimiser's step inside a DeepSpeed engine: clip the real gradient, then add the pseudo one.

DeepSpeed keeps fp32 master weights in four forms (none at all, one per parameter, or flat partitions of ZeRO 1, 2 and
of the bf16 optimiser). `MasterWeights` hides that; `GradientHook` acts in the base optimiser's `step` pre-hook,
the one moment at which, in every form, the reduced and unscaled fp32 gradients sit at their masters.
"""

import math
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from ubsmoe_ds.moe.collector import Addition, PseudoGradientCollector
from ubsmoe_ds.moe.layer import UBSMoE


class Fragment(NamedTuple):
    """Elements [offset, offset + numel) of a flat parameter are elements [start, start + numel) of a flat master."""

    master: Tensor
    start: int
    offset: int
    numel: int


class MasterWeights:
    """Read and write the fp32 values of an engine's trainable parameters, whatever its ZeRO stage and precision."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer
        self.parameters = [p for p in engine.module.parameters() if p.requires_grad]
        per_parameter: dict[int, Tensor] = {}
        if hasattr(self.optimizer, "fp16_groups"):  # bf16 without ZeRO: one master per parameter
            for low, high in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                per_parameter |= {id(p): master for p, master in zip(low, high, strict=True)}
        self._fragments = {id(p): self._locate(p, per_parameter) for p in self.parameters}

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Where this rank keeps (its part of) the master; None: on other ranks only."""
        return self._fragments[id(parameter)]

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 value (a collective over the parameter's data-parallel group under ZeRO)."""
        if hasattr(parameter, "_hp_mapping"):
            return safe_get_full_fp32_param(parameter)
        fragment = self._fragments[id(parameter)]
        assert fragment is not None
        return fragment.master.detach().float().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the model's weight and (this rank's part of) its master; call it on every rank that holds it."""
        parameter.data.copy_(value)
        fragment = self._fragments[id(parameter)]
        if fragment is not None and fragment.master is not parameter:
            master, start, offset, numel = fragment
            master.data.view(-1)[start : start + numel].copy_(value.reshape(-1)[offset : offset + numel])

    def _locate(self, parameter: nn.Parameter, per_parameter: dict[int, Tensor]) -> Fragment | None:
        if not hasattr(parameter, "_hp_mapping"):
            return Fragment(per_parameter.get(id(parameter), parameter), 0, 0, parameter.numel())
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = (
            getattr(self.optimizer, "single_partition_of_fp32_groups", None)
            or self.optimizer.fp32_groups_flat_partition
        )
        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(flat[mapping.param_group_index], high.start, low.start, high.numel)


class GradientHook:
    """Clips by the global norm of the real gradients, then adds the pseudo-gradients scaled by the same factor.

    A step whose gradients hold NaN or Inf, on whichever rank of the client, is skipped: no master gets a gradient, so
    that weights and moments stay as they are. To know that, the norm is read once a step, which waits for the device.

    The norm counts each parameter of the client once, experts of all its ranks included, and pseudo-gradients not at
    all: they change neither whether nor how much is clipped. They share the factor [ours], so that their proportion to
    the real gradient does not depend on clipping. DeepSpeed computes this norm and clips itself under ZeRO 1 and 2;
    without ZeRO its norm averages the local norms over ranks (fp32) or leaves experts out (bf16), so there it is
    computed here.

    Args:
        engine: an initialised DeepSpeed engine.
        layers: its UB-SMoE layers.
        max_norm: clipping threshold; 0 means none.
        collector: where pseudo-gradients come from; None: there are none.
    """

    def __init__(
        self, engine: Any, layers: list[UBSMoE], max_norm: float, collector: PseudoGradientCollector | None
    ) -> None:
        self.engine, self.layers, self.max_norm, self.collector = engine, layers, max_norm, collector
        self.masters = MasterWeights(engine)
        self.norms = (0.0, 0.0)  # of the latest step: of the real gradient before clipping, of the pseudo-gradient
        self.skipped = False  # whether the latest step was
        self._undecided = True
        self._additions: list[Addition] = []
        self._zero = engine.zero_optimization_stage() > 0
        engine.basic_optimizer.register_step_pre_hook(self._before_step)

    def prepare(self) -> None:
        """After the last backward pass of a step: sum the pseudo-gradients over the client (a collective)."""
        # DeepSpeed itself skips some steps that are not finite; then nobody calls `_before_step`
        self.skipped, self._undecided = True, True
        if self.collector is not None:
            self._additions = self.collector.reduce()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called by the base optimiser: once per step, or once per parameter group under ZeRO."""
        masters = {id(master) for group in optimizer.param_groups for master in group["params"]}
        if self._undecided:
            self.norms = self._read_norms()
            self.skipped, self._undecided = not math.isfinite(sum(self.norms)), False
        if self.skipped:
            for group in optimizer.param_groups:
                for master in group["params"]:
                    master.grad = None
            return
        factor = 1.0 if self.max_norm == 0 else min(1.0, self.max_norm / (self.norms[0] + 1e-6))
        if not self._zero and factor < 1:
            torch._foreach_mul_([g for _, g in self._gradients()], factor)
        for parameter, gradient in self._additions:
            fragment = self.masters.fragment(parameter)
            if fragment is not None and id(fragment.master) in masters:
                master, start, offset, numel = fragment
                assert master.grad is not None
                piece = gradient.reshape(-1)[offset : offset + numel].to(master.grad)
                master.grad.view(-1)[start : start + numel].add_(piece, alpha=factor)

    def _read_norms(self) -> tuple[float, float]:
        """Both at once, as it waits for the device."""
        real = self._norm_of_deepspeed() if self._zero else self._norm(self._gradients())
        pseudo = self._norm(self._additions)
        real_norm, pseudo_norm = torch.stack([real, pseudo.to(real)]).tolist()
        return real_norm, pseudo_norm

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, gradient at its master); without ZeRO a master is whole."""
        pairs = [(p, self.masters.fragment(p)) for p in self.masters.parameters]
        return [
            (p, fragment.master.grad)
            for p, fragment in pairs
            if fragment is not None and fragment.master.grad is not None
        ]

    def _norm(self, pairs: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """Over the whole client: (parameter, gradient) of this rank's, experts on other ranks too."""
        norm = nn.utils.get_total_norm
        experts = [gradient for parameter, gradient in pairs if is_moe_param(parameter)]
        others = [gradient for parameter, gradient in pairs if not is_moe_param(parameter)]
        of_experts = norm(experts).square().to(self.engine.device)
        return (norm(others).square() + self._over_expert_ranks(of_experts)).sqrt()

    def _norm_of_deepspeed(self) -> Tensor:
        norm = self.engine.optimizer._global_grad_norm
        return norm.float() if isinstance(norm, Tensor) else torch.tensor(float(norm))

    def _over_expert_ranks(self, value: Tensor) -> Tensor:
        """Sum over the ranks that hold different experts."""
        group = self.layers[0].deepspeed_moe.ep_group
        if dist.get_world_size(group) > 1:
            dist.all_reduce(value, group=group)
        return value
