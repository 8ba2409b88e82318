"""Clip the real gradient and add the pseudo-gradient, between backward and the optimiser's step of a DeepSpeed engine.

DeepSpeed keeps fp32 master weights in four forms (none at all, one per parameter, or flat partitions of ZeRO 1, 2 and
of the bf16 optimiser). `MasterWeights` hides that. `GradientHook` acts in the base optimiser's `step` pre-hook: only
there, in every form, do the reduced and unscaled fp32 gradients sit at their masters.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.nn import functional as F

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
        # whether each parameter is its own master and whole here: fp32 without ZeRO
        self.are_parameters = all(
            fragment is not None and fragment.master is p and p.dtype == torch.float32
            for p, fragment in zip(self.parameters, self._fragments.values(), strict=True)
        )

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Return where this rank keeps the master, or its part of it; None: it lies on other ranks only."""
        return self._fragments[id(parameter)]

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole fp32 value (a collective over the parameter's data-parallel group under ZeRO)."""
        return self.view(parameter).clone()

    def view(self, parameter: nn.Parameter) -> Tensor:
        """Return the same to be read at once: it may be the live value."""
        if hasattr(parameter, "_hp_mapping"):
            return safe_get_full_fp32_param(parameter)
        fragment = self._fragments[id(parameter)]
        assert fragment is not None
        return fragment.master.detach().float()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the model's weight and this rank's part of its master; call it on every rank that holds the weight."""
        self.write_all({parameter: value})

    def write_all(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Do the same for several, which is faster."""
        torch._foreach_copy_([parameter.data for parameter in values], list(values.values()))
        for parameter, value in values.items():
            fragment = self._fragments[id(parameter)]
            if fragment is not None and fragment.master is not parameter:
                master, start, offset, numel = fragment
                master.data.view(-1)[start : start + numel].copy_(value.reshape(-1)[offset : offset + numel])

    def read_beside(self, parameter: nn.Parameter, buffers: Mapping[Tensor, Tensor]) -> Tensor:
        """Return a parameter's whole part of buffers that lie beside the masters (a collective like `read`).

        Args:
            parameter: the parameter.
            buffers: by master a tensor of its shape.
        """
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        fragment = self._fragments[id(parameter)]
        if fragment is not None:
            master, start, offset, numel = fragment
            whole[offset : offset + numel] = buffers[master].view(-1)[start : start + numel]
        if hasattr(parameter, "_dp_group"):  # set with `_hp_mapping`
            dist.all_reduce(whole, group=parameter._dp_group)
        return whole.view(parameter.shape)

    def write_beside(self, parameter: nn.Parameter, buffers: Mapping[Tensor, Tensor], value: Tensor) -> None:
        """Set this rank's part of such buffers."""
        fragment = self._fragments[id(parameter)]
        if fragment is not None:
            master, start, offset, numel = fragment
            buffers[master].view(-1)[start : start + numel].copy_(value.reshape(-1)[offset : offset + numel])

    def _locate(self, parameter: nn.Parameter, per_parameter: dict[int, Tensor]) -> Fragment | None:
        """Return where the master lies. `_hp_mapping` is DeepSpeed's record of it where masters are flat partitions."""
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


class ExpertSquares:
    """Squared norms of each expert's real and pseudo-gradient as the optimiser gets them, summed over a round's steps.

    The sums stay on the device. Each element counts on one rank of the client: the first that holds it. So sums over
    the client's ranks mean the same in any layout.

    sums_LE2: layer, local expert, (real, pseudo); fp64.

    Args:
        layers: the client's UB-SMoE layers.
        whole: whether every rank holds whole masters (no ZeRO).
    """

    def __init__(self, layers: list[UBSMoE], whole: bool) -> None:
        pairs = [(i, pair) for i, layer in enumerate(layers) for pair in layer.experts.factors().values()]
        self._layer_of = {id(parameter): i for i, pair in pairs for parameter in pair}
        self._first_holder = dist.get_rank() < layers[0].ep_size
        self._whole = whole
        shape, device = (len(layers), layers[0].num_local_experts, 2), layers[0].gate.wg.weight.device
        self.sums_LE2 = torch.zeros(shape, dtype=torch.float64, device=device)

    def add_real(self, parameter: nn.Parameter, offset: int, gradient: Tensor) -> None:
        """Add elements [offset, offset + numel) of the real gradient of an expert adapter's factor, [local E, ...]."""
        if self._first_holder or not self._whole:
            rest = parameter.numel() - offset - len(gradient)
            whole = F.pad(gradient, (offset, rest)) if offset or rest else gradient
            self._add(parameter, 0, expert_norms(whole.view(parameter.shape)), 1.0)

    def add_pseudo(self, norms: list[tuple[nn.Parameter, Tensor]], factor: float) -> None:
        """Add `expert_norms` of whole pseudo-gradients, which are still to be multiplied by `factor`."""
        for parameter, norm_E in norms if self._first_holder else ():
            self._add(parameter, 1, norm_E, factor)

    def _add(self, parameter: nn.Parameter, column: int, norm_E: Tensor, factor: float) -> None:
        sums_E = self.sums_LE2[self._layer_of[id(parameter)], :, column]
        sums_E.add_(norm_E.double().square(), alpha=factor**2)


def expert_norms(gradient: Tensor) -> Tensor:
    """Return the L2 norm of each expert's part of a gradient [E, ...]; [E] fp32."""
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float32)


class GradientHook:
    """Clips by the global norm of the real gradients, then adds the pseudo-gradients scaled by the same factor.

    A step whose gradients hold NaN or Inf on any rank of the client is skipped: no master gets a gradient, so weights
    and moments stay as they are. To detect this, the norm is read once a step, which waits for the device.

    The norm counts each parameter of the client once, experts of all its ranks included. Pseudo-gradients do not count:
    they change neither whether nor how much is clipped. They share the factor [ours], so that their proportion to the
    real gradient does not depend on clipping. Under ZeRO 1 and 2 DeepSpeed computes this norm and clips. Without ZeRO
    its norm averages the local norms over ranks (fp32) or leaves experts out (bf16), so the norm is computed here.

    Args:
        engine: an initialised DeepSpeed engine.
        layers: its UB-SMoE layers.
        max_norm: clipping threshold; 0 means none.
        collector: source of the pseudo-gradients; None: there are none.

    `correct`, if set, is called last with the base optimiser; see drift.py.
    """

    def __init__(
        self, engine: Any, layers: list[UBSMoE], max_norm: float, collector: PseudoGradientCollector | None
    ) -> None:
        self.engine, self.layers, self.max_norm, self.collector = engine, layers, max_norm, collector
        self.masters = MasterWeights(engine)
        self.norms = (0.0, 0.0)  # latest step: norm of the real gradient before clipping, norm of the pseudo-gradient
        self.skipped = False  # whether the latest step was skipped
        self.correct: Callable[[torch.optim.Optimizer], None] | None = None
        self._undecided = True
        self._additions: list[Addition] = []
        self._zero = engine.zero_optimization_stage() > 0
        self.squares = None if collector is None else ExpertSquares(layers, whole=not self._zero)
        engine.basic_optimizer.register_step_pre_hook(self._before_step)

    def prepare(self) -> None:
        """Sum the pseudo-gradients over the client (a collective). Call it after the last backward pass of a step."""
        # DeepSpeed skips some non-finite steps by itself, without calling `_before_step`
        self.skipped, self._undecided = True, True
        if self.collector is not None:
            self._additions = self.collector.reduce()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Clip and add, or skip. The base optimiser calls it once a step, or once a parameter group under ZeRO."""
        masters = {id(master) for group in optimizer.param_groups for master in group["params"]}
        if self._undecided:
            pseudo_norms = [(parameter, expert_norms(gradient)) for parameter, gradient in self._additions]
            self.norms = self._read_norms(pseudo_norms)
            self.skipped, self._undecided = not math.isfinite(sum(self.norms)), False
            if self.squares is not None and not self.skipped:
                self.squares.add_pseudo(pseudo_norms, self._factor())
        if self.skipped:
            for group in optimizer.param_groups:
                for master in group["params"]:
                    master.grad = None
            return
        factor = self._factor()
        if not self._zero and factor < 1:
            torch._foreach_mul_([g for _, g in self._gradients()], factor)  # g <- factor g; ZeRO has done it
        # g <- g + factor p, on the part of each master that this rank keeps
        for parameter, gradient in self._additions:
            fragment = self.masters.fragment(parameter)
            if fragment is not None and id(fragment.master) in masters:
                master, start, offset, numel = fragment
                assert master.grad is not None and self.squares is not None
                piece = gradient.reshape(-1)[offset : offset + numel].to(master.grad)
                real = master.grad.view(-1)[start : start + numel]
                self.squares.add_real(parameter, offset, real)
                real.add_(piece, alpha=factor)
        if self.correct is not None:
            self.correct(optimizer)

    def _factor(self) -> float:
        """Return the step's clipping factor min(1, max_norm / ||g||); 1e-6 as in torch and DeepSpeed."""
        return 1.0 if self.max_norm == 0 else min(1.0, self.max_norm / (self.norms[0] + 1e-6))

    def _read_norms(self, pseudo_norms: list[tuple[nn.Parameter, Tensor]]) -> tuple[float, float]:
        """Return (real, pseudo) norm of the client, read together: each read waits for the device.

        Args:
            pseudo_norms: `expert_norms` of each pseudo-gradient.
        """
        real = self._norm_of_deepspeed() if self._zero else self._norm(self._gradients())
        pseudo = self._norm(pseudo_norms)
        real_norm, pseudo_norm = torch.stack([real, pseudo.to(real)]).tolist()
        return real_norm, pseudo_norm

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return pairs (parameter, gradient at its master). Used without ZeRO, where every master is whole."""
        pairs = [(p, self.masters.fragment(p)) for p in self.masters.parameters]
        return [
            (p, fragment.master.grad)
            for p, fragment in pairs
            if fragment is not None and fragment.master.grad is not None
        ]

    def _norm(self, pairs: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """Return the L2 norm over the whole client, experts on other ranks included.

        Args:
            pairs: (parameter, gradient) on this rank.
        """
        norm = nn.utils.get_total_norm
        experts = [gradient for parameter, gradient in pairs if is_moe_param(parameter)]
        others = [gradient for parameter, gradient in pairs if not is_moe_param(parameter)]
        # ||g_experts||^2, summed over the ranks that hold different experts
        expert_square = self._over_expert_ranks(norm(experts).square().to(self.engine.device))
        # ||g|| = sqrt(||g_others||^2 + ||g_experts||^2); the other gradients are the same on every rank
        return (norm(others).square() + expert_square).sqrt()

    def _norm_of_deepspeed(self) -> Tensor:
        """Return the norm that DeepSpeed computed under ZeRO."""
        norm = self.engine.optimizer._global_grad_norm
        return norm.float() if isinstance(norm, Tensor) else torch.tensor(float(norm))

    def _over_expert_ranks(self, value: Tensor) -> Tensor:
        """Sum a value over the ranks that hold different experts (a collective)."""
        group = self.layers[0].deepspeed_moe.ep_group
        if dist.get_world_size(group) > 1:
            dist.all_reduce(value, group=group)
        return value
