"""Declare every key of an experiment once: type, default, bounds, and its meaning (`description`).

One class is one section. Checks that need a single section are here; those that span sections are in experiment.py.
The sections of a run's course are in training.py. `reference.py` makes docs/configuration.md of these declarations.
Imports no torch.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from ubsmoe_ds.config.formats import AUTO, CLOZE, FORMATS
from ubsmoe_ds.config.merge_rules import RULES, MergeRule
from ubsmoe_ds.config.messages import one_of
from ubsmoe_ds.config.paths import check_source, expand
from ubsmoe_ds.moe.estimators import ESTIMATORS

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]  # a folder's name
Folder = Annotated[str, AfterValidator(expand)]
RowSource = Annotated[str, AfterValidator(partial(check_source, synthetic=False))]
AnySource = Annotated[str, AfterValidator(partial(check_source, synthetic=True))]
RowSources = RowSource | Annotated[list[RowSource], Field(min_length=1)]  # one, or several that are read as one


class Section(BaseModel):
    """Base of every section: refuse unknown keys, NaN and silent type changes; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ClientConfig(Section):
    """One federated client, and the DeepSpeed world of `ranks` processes (its group) that trains it."""

    name: Name = Field(description="name in messages, metrics and folders")
    budget: Fraction = Field(description="beta, the share of K_max (or of the LoRA rank, see `budget_scales`)")
    ranks: PositiveInt = Field(1, description="processes of its group, each with one device")
    expert_parallel: PositiveInt = Field(1, description="ranks that share the experts; divides `ranks`")
    capacity_factor: Positive | None = Field(
        None, description="slots per expert over the mean load; further tokens are dropped; null: drop none"
    )
    share: Positive = Field(1.0, description="part of the common training rows, relative to other clients")
    source: RowSources | None = Field(
        None, description="its own training rows, read by its ranks alone; as `data.source`, but not `synthetic`"
    )
    eval_source: RowSources | None = Field(
        None, description="its own evaluation rows, read by its ranks alone, for its `eval_loss`; null: the common ones"
    )
    max_rows: PositiveInt | None = Field(None, description="most of its training rows that are used; null: all")
    lora_rank: PositiveInt | None = Field(
        None, description="LoRA rank; null: from the budget where it scales ranks, else `lora.rank`"
    )
    local_steps: PositiveInt | None = Field(None, description="its steps in a round; null: as `train` says")
    lr: Positive | None = Field(None, description="its learning rate; null: as `deepspeed` says")
    train_batch_size: PositiveInt | None = Field(None, description="rows of its steps; null: as `deepspeed` says")
    gradient_accumulation_steps: PositiveInt | None = Field(
        None, description="micro-batches of its steps; null: as `deepspeed` says"
    )
    hosts: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="hosts that its ranks must be on; null: any"
    )
    groups: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="names of the groups that may train it; null: any"
    )

    @model_validator(mode="after")
    def _whole_expert_groups(self) -> ClientConfig:
        if self.ranks % self.expert_parallel:
            raise ValueError(
                f"client {self.name!r} has ranks {self.ranks}, not a multiple of its expert_parallel "
                f"{self.expert_parallel}; every expert group needs all its ranks"
            )
        return self


class ModelConfig(Section):
    """Which model, and how many experts the richest client activates."""

    path: str = Field(
        "builtin:tiny_olmoe", description="folder (config, safetensors, tokenizer), `hub:NAME[@REVISION]`, or built in"
    )

    k_max: PositiveInt | None = Field(None, description="K_max; null: the model's `num_experts_per_tok`")
    quantize: Literal["nf4", "int8"] | None = Field(
        None, description="keep the frozen experts and linear layers in 4 or 8 bits; null: in fp32, or bf16 with `bf16`"
    )
    min_capacity: PositiveInt = Field(4, description="least slots of an expert when tokens are dropped (DeepSpeed's)")

    @field_validator("path")
    @classmethod
    def _expanded(cls, value: str) -> str:
        return value if value.startswith(("hub:", "builtin:")) else expand(value)


class _LoraKeys(Section):
    """LoRA on the experts' gate, up and down projections, and on attention if asked; HetLoRA's self-pruning."""

    rank: PositiveInt = Field(8, description="LoRA rank of the whole; a client's own is at most this")
    alpha: Positive = Field(16.0, description="updates are scaled by alpha / LoRA rank")
    rslora: bool = Field(False, description="scale by alpha / sqrt(LoRA rank) instead (arXiv 2312.03732)")
    attention: bool = Field(False, description="also on the q, k, v and o projections of attention")
    prune_penalty: NotNegative = Field(
        0.0, description="HetLoRA's lambda, of the penalty sum ||B[:, tail]|| ||A[tail, :]||; 0: no self-pruning"
    )
    prune_gamma: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.99, description="HetLoRA's gamma: the tail is all ranks beyond floor(gamma r)"
    )

    @property
    def start(self) -> str:
        """Return the folder of the adapter to start from; empty: a new one."""
        return getattr(self, "from") or ""


if TYPE_CHECKING:

    class LoraConfig(_LoraKeys):
        """The section `lora`."""

else:  # Python has no other way to name a field with one of its keywords
    LoraConfig = create_model(
        "LoraConfig",
        __base__=_LoraKeys,
        __doc__=_LoraKeys.__doc__,
        **{"from": (Folder | None, Field(None, description="folder of the adapter to start from; null: a new one"))},
    )


class RouterConfig(Section):
    """The gate's own weights, its load-balancing loss, and the scale of its weights."""

    trainable: bool = Field(True, description="train the gate's weights")
    aux_loss: NotNegative = Field(0.0, description="coefficient of DeepSpeed's load-balancing loss")
    gate_rescale: Literal["none", "learned"] = Field(
        "none", description="learned: a trainable scale of each layer and client, never sent (FLAME)"
    )


class DmrConfig(Section):
    """Dynamic Modulated Routing (paper); moe/gate.py has the equations and our readings."""

    enabled: bool = Field(False, description="modulate the routing logits by phi")
    modulate: Literal["weights", "selection"] = Field(
        "weights", description="selection: phi chooses experts, softmax of the raw logits weighs them [ours]"
    )
    candidates: PositiveInt | None = Field(
        None, description="N_p, experts per token whose logits phi moves; null: 2 K_max, at most all experts [ours]"
    )
    phi_min: float = Field(-1.0, description="lower end of the range without penalty")
    phi_max: float = Field(1.0, description="upper end of the range without penalty")
    penalty: NotNegative = Field(0.1, description="lambda of the range penalty on phi")
    zeta: Annotated[float, Field(ge=0, le=1)] = Field(0.7, description="server momentum of phi")
    eps: Positive = Field(1e-6, description="added to the utilisation in u* / (u + eps)")

    @model_validator(mode="after")
    def _range(self) -> DmrConfig:
        if self.phi_min >= self.phi_max:
            raise ValueError(f"phi_min {self.phi_min} must be below phi_max {self.phi_max}")
        return self


class PseudoGradientConfig(Section):
    """Universal Pseudo-Gradient (paper, in words); moe/pseudo_gradient.py has the estimators."""

    estimator: str = Field(
        "none",
        description="how gradients of experts that were not activated are estimated; dense_oracle: for studies",
    )
    rho: Literal["sparsity"] | Positive = Field("sparsity", description="its weight; sparsity: 1 - K_c / experts")
    scale: Positive = Field(1.0, description="factor on `rho` [ours]; below 1 the real gradient keeps the lead")
    tokens_per_expert: PositiveInt | None = Field(
        None, description="tokens that each expert draws from a micro-batch of a rank; null: all of them"
    )
    moment_share: Fraction = Field(1.0, description="share of the experts' rows that `linearised` takes moments from")

    @field_validator("estimator")
    @classmethod
    def _known_estimator(cls, value: str) -> str:
        if value != "none" and value not in ESTIMATORS:
            raise ValueError(f"{value!r} is no estimator; {one_of(value, ['none', *ESTIMATORS])}")
        return value


class MergeConfig(Section):
    """How owners merge the clients' updates; aggregation/rules.py has the rules."""

    rule: str = Field("fedavg", description="merge rule, a name of config/merge_rules.py")
    temperature: NotNegative = Field(1.0, description="t of `activation`: weight ~ n_c f^t")
    trim: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.25, description="share that `trimmed_mean` cuts off at either end"
    )
    energy: Fraction = Field(0.9, description="tau of `florist`: share of the squared singular values to keep")
    clip_norm: Positive | None = Field(
        None, description="largest L2 norm of a client's update of a unit (elementwise rules); null: no clipping"
    )
    screen_factor: Annotated[float, Field(gt=1)] | None = Field(
        30.0,
        description="a client whose update is longer than this many times the others' median sits the round out; "
        "null: nobody does",
    )
    payload: Literal["fp32", "bf16"] = Field("fp32", description="dtype on the wire; bf16 halves the traffic")
    server_optimizer: Literal["none", "momentum", "adam"] = Field(
        "none", description="FedOpt, arXiv 2003.00295 (elementwise rules)"
    )
    server_lr: Positive = Field(1.0, description="learning rate of the server optimiser")
    server_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.99), description="its decay rates"
    )
    server_eps: Positive = Field(1e-3, description="added to its denominator (tau in the paper)")

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        if value not in RULES:
            raise ValueError(f"{value!r} is not a merge rule; {one_of(value, RULES)}")
        return value

    @property
    def row(self) -> MergeRule:
        """Return the rule's row in the table."""
        return RULES[self.rule]

    @property
    def is_linear(self) -> bool:
        """Return whether the merge is a weighted sum with weights that every rank knows, if nothing is refused."""
        return self.row.linear and self.clip_norm is None

    @field_validator("server_betas", mode="before")
    @classmethod
    def _betas_from_yaml(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class DataConfig(Section):
    """Where rows come from, and how they are dealt to the clients."""

    source: AnySource | Annotated[list[RowSource], Field(min_length=1)] = Field(
        "synthetic",
        description="training rows: `synthetic`, a PATH (file, folder, pattern, or a list of them), `jsonl:PATH`, or "
        "`hub:OWNER/NAME[/SUBSET][@SPLIT]`",
    )
    eval_source: RowSources | None = Field(None, description="evaluation rows; null: held-out questions of `source`")
    format: str = Field(
        AUTO,
        description="how rows are read (docs/data.md); auto: by their fields; cloze: questions with choices asked "
        "without them, answered by a choice's text",
    )
    columns: dict[str, str] = Field(
        {}, description="a format's name of a field: its name in your rows, such as `{prompt: question}`"
    )
    chat_template: Folder | None = Field(
        None, description="file of a chat template (jinja); null: the tokenizer's, or a plain one"
    )
    train_on: Literal["answers", "all"] = Field(
        "answers", description="tokens that bear loss: answers, completions and assistant turns, or all"
    )
    partition: Literal["iid", "dirichlet", "by_task", "by_client"] = Field(
        "dirichlet", description="how rows are dealt to clients; by_client: by the values of `client_column`"
    )
    label_column: str | None = Field(
        None, description="field whose values are dealt; null: the rows' `task`, or their length where they have none"
    )
    client_column: str | None = Field(
        None, description="field that says whose a row is: a client's name, or a value that is dealt as a whole"
    )
    min_rows: PositiveInt = Field(
        1, description="fewest training rows of a client; dirichlet is drawn again until all have them"
    )
    alpha: Positive = Field(
        0.5, description="concentration of the Dirichlet distribution; small values deal rows unequally"
    )
    rows: PositiveInt | None = Field(None, description="largest number of rows; null: all (4,000 of `synthetic`)")
    eval_rows: PositiveInt = Field(400, description="largest number of evaluation rows")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the questions held out where `eval_source` is null"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        256, description="tokens of a row; longer rows are treated as `overlong` says"
    )
    overlong: Literal["cut_prompt", "cut_end", "drop"] = Field(
        "cut_prompt", description="a longer row loses the beginning of its prompt, its end, or is dropped"
    )
    packing: bool = Field(
        False, description="train on several rows in one sequence of at most `max_length` tokens, each on its own"
    )

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        names = (AUTO, CLOZE, *FORMATS)
        if value not in names:
            raise ValueError(f"{value!r} is not a format; {one_of(value, names)}")
        return value

    @model_validator(mode="after")
    def _whose(self) -> DataConfig:
        if (self.partition == "by_client") != (self.client_column is not None):
            raise ValueError(
                f"partition {self.partition!r} with client_column {self.client_column!r}: by_client and client_column "
                "go together; set both, or neither"
            )
        if self.source == "synthetic" and (self.label_column or self.client_column):
            raise ValueError("label_column and client_column are of rows of your own; leave them out for synthetic")
        return self

    @property
    def files(self) -> list[str]:
        """Return the training sources, one or several."""
        return [self.source] if isinstance(self.source, str) else self.source
