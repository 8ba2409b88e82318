"""Check rules that span the sections of an experiment. Imports no torch."""

from __future__ import annotations

from ubsmoe_ds.config.merge_rules import names
from ubsmoe_ds.config.population import group_problems
from ubsmoe_ds.config.settings import Settings


def problems(exp: Settings) -> list[str]:
    """Check rules that span sections; return one line for each problem: key, value, remedy."""
    found = []
    names = [client.name for client in exp.clients]
    if len(set(names)) < len(names):
        repeated = sorted({n for n in names if names.count(n) > 1})
        found.append(f"clients: name {repeated[0]!r} appears more than once; names must differ")
    if exp.k_max > exp.num_experts:
        found.append(
            f"model.k_max: {exp.k_max} exceeds the model's {exp.num_experts} experts; use at most {exp.num_experts}"
        )
    if exp.dmr.candidates is not None and not exp.k_max <= exp.dmr.candidates <= exp.num_experts:
        found.append(
            f"dmr.candidates: {exp.dmr.candidates} (N_p) must lie between K_max {exp.k_max} and the "
            f"{exp.num_experts} experts of the model"
        )
    if exp.min_clients > len(exp.clients):
        found.append(f"min_clients: {exp.min_clients} exceeds the {len(exp.clients)} clients; use at most that")
    without_source = [client.name for client in exp.clients if client.source is None]
    if 0 < len(without_source) < len(exp.clients):
        found.append(
            f"clients: {', '.join(without_source)} have no `source`, but others do; give one to all clients or to none"
        )
    with_evaluation = [client.name for client in exp.clients if client.eval_source is not None]
    if not without_source and len(with_evaluation) < len(exp.clients) and exp.data.eval_source is None:
        found.append(
            "data.eval_source: must be set if each client has its own `source`; give evaluation rows that all clients "
            "may read, or each client an `eval_source`"
        )
    found += group_problems(exp.groups, exp.clients, exp.num_experts)
    found += _merge_problems(exp) + _rate_problems(exp) + _turn_problems(exp)
    found += _scaffold_problems(exp)
    for i, client in enumerate(exp.clients):
        if exp.num_experts % client.expert_parallel:
            found.append(
                f"clients.{i}.expert_parallel: {client.expert_parallel} does not divide the model's {exp.num_experts} "
                f"experts (client {client.name!r})"
            )
        found += _batch_problems(exp, i)
    if exp.sampling is not None and exp.sampling.size(len(exp.clients)) > len(exp.clients):
        found.append(f"sampling.clients: {exp.sampling.clients} exceeds the {len(exp.clients)} clients; use fewer")
    return found


def _turn_problems(exp: Settings) -> list[str]:
    """Check for what cannot be had where clients take turns."""
    if not exp.takes_turns:
        return []
    found, why = [], "does not work with `groups` or `sampling`"
    if exp.deepspeed.scheduler is not None:
        found.append(f"deepspeed.scheduler: {why}, where a client's steps are not in a row; use train.lr_schedule")
    if exp.fault_tolerance == "shrink" and exp.sampling is not None and exp.sampling.over_sample > 1:
        found.append(
            f"sampling.over_sample: {exp.sampling.over_sample} does not work with fault_tolerance 'shrink'; use 1, or "
            "abort"
        )
    steps = {exp.settings(client).gradient_accumulation_steps for client in exp.clients}
    if exp.groups is not None and len(steps) > 1 and exp.deepspeed.zero_stage > 0:
        found.append(
            f"clients: gradient_accumulation_steps {' '.join(map(str, sorted(steps)))} differ, which one engine cannot "
            "have under ZeRO; use one value, or ZeRO stage 0"
        )
    return found


def _scaffold_problems(exp: Settings) -> list[str]:
    """Check that SCAFFOLD's control variates mean the same for all clients, and for the same clients in all rounds."""
    if not exp.train.scaffold:
        return []
    found, row = [], exp.merge.row
    if not row.elementwise:
        why = "whose factors change their basis each round" if row.turns_basis else "for clients of unequal LoRA ranks"
        why = "whose adapters start anew each round" if row.stacking else why
        found.append(
            f"train.scaffold: true does not work with merge.rule {exp.merge.rule!r}, {why}; use one of "
            f"{names(elementwise=True)}"
        )
    if exp.fault_tolerance == "shrink":
        found.append(
            "train.scaffold: true does not work with fault_tolerance: shrink, which changes the clients; use abort"
        )
    return found


def _batch_problems(exp: Settings, number: int) -> list[str]:
    """Check that a client's batch can be shared out over the ranks of every group that may train it."""
    client = exp.clients[number]
    settings = exp.settings(client)
    batch, micro_batches = settings.train_batch_size, settings.gradient_accumulation_steps
    for group in exp.allowed_groups(number):
        ranks = exp.trained_by(number, group).ranks
        if batch % (ranks * micro_batches):
            key = "deepspeed" if client.train_batch_size is None else f"clients.{number}"
            of = f"client {client.name!r}" if exp.groups is None else f"group {exp.groups[group].name!r}"
            return [
                f"{key}.train_batch_size: {batch} is not a multiple of ranks {ranks} x "
                f"gradient_accumulation_steps {micro_batches} of {of}"
            ]
    return []


def _merge_problems(exp: Settings) -> list[str]:
    """Check that the merge rule works with the LoRA ranks and the options."""
    found = []
    rule, elementwise, ranks = exp.merge.rule, exp.merge.row.elementwise, exp.lora_ranks
    if elementwise and (len(set(ranks)) > 1 or exp.lora.prune_penalty):
        ranks_text = " ".join(map(str, ranks)) + (" and pruning" if exp.lora.prune_penalty else "")
        found.append(
            f"merge.rule: {rule!r} needs equal LoRA ranks, the clients have {ranks_text}; use one of "
            f"{names(elementwise=False)}"
        )
    if exp.lora.prune_penalty and exp.merge.row.stacking:
        found.append(
            f"lora.prune_penalty: {exp.lora.prune_penalty} does not work with merge.rule {rule!r}, whose adapters "
            "start anew each round; set it to 0"
        )
    if exp.model.quantize and exp.merge.row.stacking:
        found.append(
            f"model.quantize: {exp.model.quantize!r} does not work with merge.rule {rule!r}, which writes into the "
            "frozen weights each round; leave it out, or use another rule"
        )
    if exp.lora.start and exp.merge.row.stacking:
        found.append(
            f"lora.from: {exp.lora.start!r} does not work with merge.rule {rule!r}, whose adapters start anew each "
            "round; export it with --merge and set model.path"
        )
    if exp.merge.row.turns_basis and exp.train.optimizer_state == "keep":
        found.append(
            f"train.optimizer_state: 'keep' does not work with merge.rule {rule!r}, whose factors change their basis "
            "each round; use reset"
        )
    if not elementwise and exp.merge.clip_norm is not None:
        found.append(
            f"merge.clip_norm: {exp.merge.clip_norm} does not work with merge.rule {rule!r}, which merges factors, not "
            f"updates; leave it out, or use one of {names(elementwise=True)}"
        )
    if not elementwise and exp.merge.server_optimizer != "none":
        found.append(
            f"merge.server_optimizer: {exp.merge.server_optimizer!r} does not work with merge.rule {rule!r}, whose "
            f"factors change their basis each round; use none, or one of {names(elementwise=True)}"
        )
    if max(ranks) > exp.lora.rank:
        found.append(f"clients: lora_rank {max(ranks)} exceeds lora.rank {exp.lora.rank}, the largest allowed")
    return found


def _rate_problems(exp: Settings) -> list[str]:
    """Check that one rule alone sets the learning rate."""
    scheduler, kind = exp.deepspeed.scheduler, exp.deepspeed.optimizer["type"]
    own_rates = [f"clients.{i}.lr: {c.lr}" for i, c in enumerate(exp.clients) if c.lr is not None]
    asked = [f"train.lr_schedule: {exp.train.lr_schedule!r}"] * (exp.train.lr_schedule != "constant")
    asked += [f"train.warmup_rounds: {exp.train.warmup_rounds}"] * (exp.train.warmup_rounds > 0)
    if scheduler is not None and [*asked, *own_rates]:
        return [
            f"{[*asked, *own_rates][0]} does not go with deepspeed.scheduler ({scheduler['type']}), which sets the "
            "learning rate too; leave one of them out"
        ]
    if asked and kind == "Rprop":
        return [f"{asked[0]} does not go with the optimizer Rprop, which chooses its own step sizes; use another one"]
    return []
