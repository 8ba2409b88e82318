"""Answer loss, option log-likelihood and exact match of generated answers of a model at a given K.

Clients with the same K hold the same model after a merge, so they share the rows: every rank takes some, and the sums
are added up by the caller. Shapes: N rows, A answer positions, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.data.batches import PackedRow, Tokens, collate_packed, encode, pack
from ubsmoe_ds.data.sources import Row, word
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM

# summed; loss = nll / tokens, accuracy = correct / rows, length-normalised accuracy = correct_norm / rows
FIELDS = ("nll", "tokens", "correct", "correct_norm", "rows")
ANSWER_HEAD = "the correct answer is"


class Scoring(Protocol):
    """What the evaluation needs of a model; a `Client` is one."""

    device: torch.device

    def logits(self, tokens: Tokens, k: int) -> torch.Tensor:
        """[A, V] at the answer positions with k active experts, nothing dropped."""


class LocalModel:
    """A model that holds all its experts and is no client's, as `Scoring`."""

    def __init__(self, model: UBSMoEForCausalLM, device: torch.device) -> None:
        self.model, self.device = model.eval(), device

    @torch.no_grad()
    def logits(self, tokens: Tokens, k: int) -> torch.Tensor:
        """[A, V]."""
        self.model.set_active_experts(k)
        return self.model(tokens.input_ids, tokens.used, tokens.position_A, tokens.branch_BS)


class Evaluator:
    """The evaluation rows, tokenised once.

    The answer loss is the mean over all answer tokens (the closing end-of-text token included). A row counts as right
    if its right option has the largest summed log-probability of its answer tokens: raw, and length-normalised (over
    their number). End-of-text is no part of that, as in the field's harness, so raw, an option that begins another
    is never the less likely one.

    Args:
        rows: evaluation rows.
        tokenizer: the model's tokenizer.
        max_length: tokens of a row.
        batch_size: rows a rank takes at a time.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, max_length: int, batch_size: int) -> None:
        self.rows, self.batch_size, self.pad = rows, batch_size, tokenizer.pad_token_id
        self.packed = pack(rows, tokenizer, max_length)
        self.cut = sum(row.cut for row in self.packed)  # rows whose prompt lost its beginning
        self.longest = max(row.longest for row in self.packed)  # question with answer, in tokens
        self.tasks = sorted({row["task"] for row in rows})
        # long rows together: less padding
        self._order = sorted(range(len(rows)), key=lambda n: len(self.packed[n]))

    def sums(
        self, client: Scoring, k: int, worker: int, workers: int, stop: Callable[[], bool] | None = None
    ) -> np.ndarray:
        """This rank's part of the rows at K = k (a collective over the client).

        Args:
            client: whose model is evaluated.
            k: active experts.
            worker, workers: this rank's place among all ranks that share the rows.
            stop: whether to leave before the next batch, with sums of no use; the same on all ranks of the client.

        Returns:
            [tasks, 5] float64 in the order of `self.tasks` and `FIELDS`.
        """
        mine = self._order[worker::workers]
        most = -(-len(self._order) // workers)
        total = np.zeros((len(self.tasks), len(FIELDS)))
        for start in range(0, most, self.batch_size):
            if stop is not None and stop():
                break
            # ranks of a client must run equally often: where rows have run out, the first row keeps step
            numbers = mine[start : start + self.batch_size]
            batch = [self.packed[n] for n in numbers or [0]]
            logp = self._log_probabilities(client, k, batch)
            for n, row_logp in zip(numbers, logp, strict=False):
                total[self._task(n)] += score(self.packed[n], row_logp)
        return total

    def _log_probabilities(self, client: Scoring, k: int, batch: Sequence[PackedRow]) -> list[list[torch.Tensor]]:
        """Of each row's predicted tokens: the common ones', then each option's."""
        tokens = collate_packed(batch, self.pad)
        logp_AV = F.log_softmax(client.logits(tokens.to(client.device), k), dim=-1)
        logp_A = logp_AV.gather(1, tokens.target_A.to(client.device).view(-1, 1)).squeeze(1).cpu()
        parts = iter(logp_A.split([length for row in batch for length in row.parts()]))
        return [[next(parts) for _ in row.parts()] for row in batch]

    def _task(self, row: int) -> int:
        return self.tasks.index(self.rows[row]["task"])


def score(row: PackedRow, logp: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """What a row adds to the sums.

    Args:
        row: the row.
        logp: log-probabilities of its common tokens, then of each option's; the end-of-text token is the right
            option's last and no part of the choice.

    Returns:
        In the order of `FIELDS`; of a tie for the best, a right row counts as its chance to be drawn.
    """
    common, *options = logp
    choice = [option[:-1] if n == row.label else option for n, option in enumerate(options)]
    raw = [float(common.sum() + option.sum()) for option in choice]
    normalised = [total / (len(common) + len(option)) for total, option in zip(raw, choice, strict=True)]
    nll = -float(common.sum() + options[row.label].sum())
    tokens = len(common) + len(options[row.label])
    return nll, tokens, _chance(raw, row.label), _chance(normalised, row.label), 1


def _chance(values: Sequence[float], label: int) -> float:
    """That the label is chosen for the largest value: logits in bf16 tie often, and the first must not win for that."""
    best = max(values)
    if not all(math.isfinite(value) for value in values) or values[label] != best:
        return 0.0
    return 1 / values.count(best)


@torch.no_grad()
def generate_answers(
    model: UBSMoEForCausalLM,
    k: int,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of the rows' prompts, decoded in batches of rows of about equal length.

    Args:
        model: holding all its experts.
        k: active experts; nothing is dropped.
        rows: what is asked.
        tokenizer: the model's.
        max_length: tokens of a prompt with its right answer; a longer prompt loses its beginning, as in training.
        batch_size: rows at a time.
        max_new_tokens: of an answer at most; what is said may go beyond `max_length`.

    Returns:
        The text of each row up to the end-of-text token.

    Raises:
        UserError: if the model has no positions for so many tokens.
    """
    model.eval()
    model.set_active_experts(k)
    for layer in model.layers:
        layer.used_token = None  # generation has its own attention mask, and nothing is dropped in evaluation
    prompts = [example.prompt for example in encode(rows, tokenizer, max_length)[0]]
    needed, positions = max(map(len, prompts)) + max_new_tokens, model.hf.config.max_position_embeddings
    if needed > positions:
        raise UserError(
            f"max_new_tokens: {max_new_tokens} after the longest prompt are {needed} tokens, the model has {positions} "
            "positions; lower it, or max_length"
        )
    order = sorted(range(len(rows)), key=lambda n: len(prompts[n]))
    device = next(model.parameters()).device
    texts = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[n]) for n in chosen)
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for b, n in enumerate(chosen):
            ids[b, longest - len(prompts[n]) :] = torch.tensor(prompts[n])
            mask[b, longest - len(prompts[n]) :] = 1
        found = model.hf.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for n, text in zip(chosen, tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True), strict=True):
            texts[n] = text
    return texts


def parse_answer(text: str, labels: Sequence[str]) -> int | None:
    """The label that a generated answer names: the first after "the correct answer is", or the first at all.

    Returns:
        Its index, or None where no label stands in the text as a word.
    """
    if len({label.lower() for label in labels}) == len(labels):  # else CO would be read as Co
        text, labels = text.lower(), [label.lower() for label in labels]
    head = re.search(ANSWER_HEAD, text, re.IGNORECASE)
    names = sorted(labels, key=len, reverse=True)  # so that "C++" is not read as "C"
    match = re.search("|".join(map(word, names)), text[head.end() :] if head else text)
    return None if match is None else list(labels).index(match[0])
