"""Train one federated client at a time: a DeepSpeed engine, local steps and counts. Other clients are unknown here.

Shapes: L layers, E experts, A answer positions, V vocabulary.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import functional as F

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client.deepspeed_setup import deepspeed_output
from ubsmoe_ds.client.drift import DriftCorrection
from ubsmoe_ds.client.gradients import GradientHook
from ubsmoe_ds.client.optimizer import engine_config, rate_factor, refusals_of_deepspeed, reset_state
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import ClientConfig, LoraConfig
from ubsmoe_ds.data.batches import StepBatch, Tokens
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.hf_config import check_alignment
from ubsmoe_ds.moe.collector import PseudoGradientCollector
from ubsmoe_ds.moe.estimators import ESTIMATORS
from ubsmoe_ds.moe.gate import GateConfig, GateCounts
from ubsmoe_ds.moe.moments import ExpertMoments


class LocalStats(NamedTuple):
    """Sums over one rank's local steps of a round: answer loss, tokens, routes, gradient norm of the whole client."""

    nll: float
    answer_tokens: float
    used_tokens: float
    dropped_routes: float
    routed_routes: float
    gradient_norm: float  # of the real gradient before clipping
    steps: float
    bad_steps: float  # skipped for NaN or Inf


@dataclass
class LocalProgress:
    """Progress of one rank's local steps within a round. The gates keep the counts of routes.

    steps: steps taken or skipped. bad_steps: steps skipped for NaN or Inf.
    sums: answer loss, answer tokens, used tokens, norm of the real gradient, summed over the steps taken; [4] fp64 on
        the CPU.
    deadline: on the monotonic clock. seconds: duration of the steps so far, those before a checkpoint included.
    """

    steps: int = 0
    bad_steps: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    deadline: float | None = None
    seconds: float = 0.0


def client_spec(exp: Experiment, config: ClientConfig, group_rank: int) -> UBSMoESpec:
    """Return what the conversion needs to build the model of one rank of a client."""
    gate = GateConfig(
        k=exp.active_experts(config),
        candidates=exp.candidates,
        capacity_factor=config.capacity_factor,
        min_capacity=exp.model.min_capacity,
        phi_range=(exp.dmr.phi_min, exp.dmr.phi_max) if exp.dmr.enabled else None,
        modulate=exp.dmr.modulate,
        learned_scale=exp.router.gate_rescale == "learned",
    )
    return UBSMoESpec(
        gate=gate,
        lora_rank=exp.lora.rank if exp.takes_turns else exp.lora_rank(config),
        full_rank=exp.lora.rank,
        lora_alpha=exp.lora_alpha(exp.lora.rank if exp.takes_turns else exp.lora_rank(config)),
        lora_attention=exp.lora.attention,
        router_trainable=exp.router.trainable,
        quantize=exp.model.quantize,
        expert_parallel=config.expert_parallel,
        expert_rank=group_rank % config.expert_parallel,
        seed=exp.seed,
    )


class Client:
    """A client's model and DeepSpeed engine on one of its ranks. Needs the rendezvous variables, see mpi/join.py.

    Args:
        exp: the experiment.
        config: this client's section.
        group_rank: this rank's place in the client's group.
        verbose: let DeepSpeed print.

    Raises:
        UserError: if bf16 is asked for and the device has none, or DeepSpeed refuses its config.
    """

    def __init__(self, exp: Experiment, config: ClientConfig, group_rank: int, verbose: bool = False) -> None:
        self.exp, self.config = exp, config
        self.k = exp.active_experts(config)
        self.device = torch.device(get_accelerator().current_device_name())
        if exp.deepspeed.use_bf16 and not get_accelerator().is_bf16_supported():
            raise UserError(f"deepspeed.bf16.enabled: true, but {self.device} has no bfloat16; set it to false")
        torch.manual_seed(exp.seed)
        self.spec = client_spec(exp, config, group_rank)
        self.model = load(exp.weights_dir, self.spec, torch.bfloat16 if exp.deepspeed.use_bf16 else torch.float32)
        self.hf_config = self.model.hf.config
        if exp.deepspeed.use_bf16 and self.device.type != "cpu":
            check_alignment(self.hf_config, "deepspeed.bf16.enabled: true")
        if exp.train.activation_checkpointing:
            self.model.checkpoint_activations()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with deepspeed_output(verbose), refusals_of_deepspeed():
            self.engine, *_ = deepspeed.initialize(
                model=self.model, model_parameters=trained, config=engine_config(exp.settings(config))
            )
        self._full_rate = self._common_rate = self.learning_rate
        self._gates = [layer.gate for layer in self.model.layers]
        self.counts = GateCounts(self._gates)
        self.collector, self.moments = None, None
        pg, layers = exp.pseudo_gradient, self.model.layers
        if pg.estimator != "none":
            collector = PseudoGradientCollector(layers, pg.estimator, exp.rho(config), pg.tokens_per_expert)
            self.collector = collector.attach()
            if ESTIMATORS[pg.estimator].moments:
                self.moments = ExpertMoments(layers, pg.moment_share)
        self._tail = self._tail_of(None)
        self.gradient_hook = GradientHook(self.engine, layers, exp.deepspeed.gradient_clipping, self.collector)
        self.drift = self._drift() if exp.train.prox_mu or exp.train.scaffold else None

    def _drift(self) -> DriftCorrection:
        """Let the gradients of local steps be corrected against drift."""
        hook, scales = self.gradient_hook, [gate.scale for gate in self._gates]
        own = [hook.masters.fragment(scale) for scale in scales if scale is not None]
        here = [fragment for fragment in own if fragment is not None]
        train, optimizer = self.exp.train, self.engine.basic_optimizer
        drift = DriftCorrection(optimizer, mu=train.prox_mu, scaffold=train.scaffold, own=here)
        hook.correct = drift.correct
        return drift

    def become(self, config: ClientConfig, number: int, scales_L: Tensor | None) -> None:
        """Be another client from now on; the caller loads its adapter, and the optimiser's state before it trains.

        K, capacity factor, weight of PG, scale of LoRA, batch, learning rate and learned scales are the client's.
        Random draws depend on the seed, the client, the round and this rank alone.

        Args:
            config: the client's section, with the ranks of its group.
            number: the round.
            scales_L: what its gates have learned for it alone; None: nothing yet.
        """
        self.config, self.k = config, self.exp.active_experts(config)
        factor = config.capacity_factor
        rank = self.exp.lora_rank(config)
        self.model.set_lora_scaling(self.exp.lora_alpha(rank) / rank)
        scales_L = (torch.ones(len(self._gates)) if scales_L is None else scales_L).to(self.device)
        for gate, scale in zip(self._gates, scales_L.split(1), strict=True):
            gate.drop_tokens, gate.capacity_factor = factor is not None, factor or 1.0
            if gate.scale is not None:
                self.gradient_hook.masters.write(gate.scale, scale)
        if self.collector is not None:
            self.collector.rho = self.exp.rho(config)
        batch = config.train_batch_size or self.exp.deepspeed.train_batch_size
        accumulation = config.gradient_accumulation_steps or self.exp.deepspeed.gradient_accumulation_steps
        micro, rest = divmod(batch, config.ranks * accumulation)
        if not rest:  # a group that may not train the client evaluates its view, whatever its batch
            self.engine.set_train_micro_batch_size(micro)
            self.engine.set_train_batch_size(batch)
        self.engine.micro_steps = 0  # or steps of several micro-batches would end in between
        self._full_rate = config.lr or self._common_rate
        seed = hash((self.exp.seed, zlib.crc32(config.name.encode()), number, dist.get_rank())) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 4 ms on a host without accelerator
        if self.device.type != "cpu":
            get_accelerator().manual_seed_all(seed)

    @property
    def learns_scales(self) -> bool:
        """Return whether gates learn a scale for the client alone."""
        return self._gates[0].scale is not None

    def learned_scales(self) -> Tensor | None:
        """Return the scales that the gates have learned for this client alone, [L] fp32 on the CPU; None without.

        A collective over the group under ZeRO.
        """
        scales = [gate.scale for gate in self._gates if gate.scale is not None]
        return torch.cat([self.gradient_hook.masters.read(scale) for scale in scales]).cpu() if scales else None

    def begin_round(self) -> None:
        """Reset the counts and, if configured, the optimiser."""
        if self.drift is not None:
            self.drift.begin_round()
        if self.exp.train.optimizer_state == "reset":
            self.reset_optimizer()
        self.reset_counts()

    def train(
        self,
        batches: Iterator[StepBatch],
        local: LocalProgress,
        count: int,
        stop: Callable[[], bool],
        lora_rank: int | None = None,
    ) -> None:
        """Take local steps, going on from `local`. The sums stay on the device until the end.

        Args:
            batches: the batches of the steps to come.
            local: progress within the round; updated in place.
            count: steps of a round.
            stop: whether to stop before the next step, the same on all ranks; too many bad steps stop the client too.
            lora_rank: the client's current LoRA rank, whose tail self-pruning penalises; None: the configured one.
        """
        self._tail = self._tail_of(lora_rank)
        self.engine.train()
        self.model.set_active_experts(self.k)
        sums = local.sums.to(self.device)
        while local.steps < count and not self.is_out(local) and not stop():
            batch = next(batches)
            nll = self.step(batch)
            local.steps += 1
            if self.gradient_hook.skipped:
                local.bad_steps += 1
                continue
            answers = sum(len(tokens.target_A) for tokens in batch.micro)
            sums[0] += nll
            # add Python scalars: building a tensor from them would force a device sync
            for place, value in enumerate((answers, batch.used_tokens, self.gradient_hook.norms[0]), start=1):
                sums[place] += value
        local.sums = sums.cpu()

    def is_out(self, local: LocalProgress) -> bool:
        """Return whether the client had too many bad steps to take part in this round's merge."""
        return local.bad_steps > self.exp.train.max_bad_steps

    def local_stats(self, local: LocalProgress, routed_LX: Tensor, dropped: int) -> LocalStats:
        """Return the sums over this rank's local steps of the round.

        Args:
            local: of the round.
            routed_LX, dropped: see `GateCounts.read`.
        """
        nll, answer_tokens, used_tokens, gradient_norm = local.sums.tolist()
        sums = (nll, answer_tokens, used_tokens, dropped, int(routed_LX[:, :-1].sum()), gradient_norm)
        return LocalStats(*sums, local.steps - local.bad_steps, local.bad_steps)

    def set_learning_rate(self, number: int) -> None:
        """Set the learning rate of a round, see `rate_factor`, unless DeepSpeed's scheduler sets it."""
        if self.engine.lr_scheduler is None:
            for group in self.engine.basic_optimizer.param_groups:
                group["lr"] = self._full_rate * rate_factor(self.exp.train, number)

    @property
    def learning_rate(self) -> float:
        """Return the current learning rate, which the round or DeepSpeed's scheduler has set."""
        return float(self.engine.basic_optimizer.param_groups[0]["lr"])

    def step(self, batch: StepBatch) -> Tensor:
        """Take one optimiser step; return the summed loss of this rank's answer tokens, detached."""
        if self.collector is not None:
            self.collector.reset()
        total = torch.zeros((), device=self.device)
        for number, tokens in enumerate(batch.micro):
            loss, nll = self._loss(self.engine, tokens.to(self.device), batch)
            self.engine.backward(loss)
            if number == len(batch.micro) - 1:
                self.gradient_hook.prepare()
            self.engine.step()
            total += nll
        return total

    def _loss(self, model: Any, tokens: Tokens, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return (loss for backward, summed answer loss).

        The answer loss is divided by the answer tokens of the whole step, all ranks and micro-batches together.
        DeepSpeed averages over both; the factor undoes that. So the gradient does not depend on the client's layout.
        """
        logits_AV = model(tokens.input_ids, tokens.used, tokens.position_A, None, tokens.position_BS)
        nll = F.cross_entropy(logits_AV, tokens.target_A, reduction="sum")
        loss = nll * (dist.get_world_size() * len(batch.micro) / batch.answer_tokens)
        penalty = self.exp.dmr.penalty if self.exp.dmr.enabled else 0.0
        loss = loss + self.model.auxiliary_loss(penalty, self.exp.router.aux_loss)
        if self._tail is not None:
            loss = loss + self.exp.lora.prune_penalty * self.model.tail_penalty(self._tail)
        return loss, nll.detach()

    def _tail_of(self, lora_rank: int | None) -> int | None:
        """Return the first LoRA rank of the tail that self-pruning penalises; None: nothing is penalised."""
        lora_rank = lora_rank or self.exp.lora_rank(self.config)
        start = tail_start(self.exp.lora, lora_rank)
        return start if self.exp.lora.prune_penalty and start < lora_rank else None

    @torch.no_grad()
    def calibrate(self, batches: Iterator[StepBatch], count: int) -> None:
        """Sum moments over the rows of `count` steps without training, so that the first round has some."""
        assert self.moments is not None
        self.engine.train()
        self.model.set_active_experts(self.k)
        self.reset_counts()
        self.moments.sample(1)  # all rows: they are few, and this runs only once
        for _ in range(count):
            for tokens in next(batches).micro:
                held = tokens.to(self.device)
                self.model(held.input_ids, held.used, held.position_A, None, held.position_BS)
        self.moments.sample(self.moments.every)

    def reset_counts(self) -> None:
        """Restart the counts of routed tokens, the squares of the experts' gradients and the moments."""
        self.counts.reset()
        if self.gradient_hook.squares is not None:
            self.gradient_hook.squares.sums_LE2.zero_()
        if self.moments is not None:
            self.moments.start()

    def routed_counts(self) -> Tensor:
        """Return the tokens that this rank routed to each expert, last its tokens; [L, E + 1] int64 on the CPU."""
        return self.counts.read()[0]

    def gradient_squares(self) -> Tensor | None:
        """Return this rank's part of the squared norms of all experts' (real, pseudo) gradients; None without PG.

        Returns:
            [L, E, 2] fp64 on the CPU; only the sum over the ranks of a client has a meaning.
        """
        squares, layer = self.gradient_hook.squares, self.model.layers[0]
        if squares is None:
            return None
        local_LE2 = squares.sums_LE2.cpu()
        whole_LE2 = local_LE2.new_zeros(len(local_LE2), layer.num_experts, 2)
        whole_LE2[:, layer.experts.first : layer.experts.first + layer.num_local_experts] = local_LE2
        return whole_LE2

    def recover(self) -> None:
        """Reset the optimiser and non-finite learned scales; for use after NaN or Inf, on the reloaded shared state."""
        self.reset_optimizer()
        for gate in self._gates:
            if gate.scale is not None and not bool(torch.isfinite(gate.scale).all()):
                self.gradient_hook.masters.write(gate.scale, torch.ones_like(gate.scale))

    def reset_optimizer(self) -> None:
        """Give the optimiser the state of a new one."""
        reset_state(self.engine.basic_optimizer)

    @torch.no_grad()
    def logits(self, tokens: Tokens, k: int) -> Tensor:
        """Return evaluation logits, [A, V], with `k` active experts and no dropped tokens."""
        self.engine.eval()
        self.model.set_active_experts(k)
        return self.model(tokens.input_ids, tokens.used, tokens.position_A, tokens.branch_BS)


def tail_start(config: LoraConfig, lora_rank: int) -> int:
    """Return the LoRA rank at which the tail of HetLoRA's self-pruning starts: floor(gamma r), at least 1."""
    return max(1, int(config.prune_gamma * lora_rank))
