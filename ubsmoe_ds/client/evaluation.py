"""Score a model at a given K: answer loss, log-likelihood of options, exact match of generated answers.

Clients with the same K hold the same model after a merge, so they share the rows: every rank takes some, and the caller
adds the sums up. Shapes: A answer positions, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client.generation import check_positions, ends_of, generate
from ubsmoe_ds.data.batches import Tokens, encode, last_reply
from ubsmoe_ds.data.chat import ChatTemplate
from ubsmoe_ds.data.evaluation_rows import PackedRow, collate_packed, pack
from ubsmoe_ds.data.lengths import CUT_PROMPT, Lengths, nothing_fits
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.words import first_named, nfc
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM

# sums over rows, see `scores`; those of rows with choices are correct: raw, and normalised by tokens and by characters
FIELDS = ("nll", "tokens", "correct", "correct_norm", "correct_chars", "choices", "rows")
ANSWER_HEAD = "the correct answer is"
LARGEST_EXPONENT = 700.0  # of e, in double precision: a loss beyond it has a perplexity of this power


class Scoring(Protocol):
    """The interface of a model that can be evaluated; `Client` and `LocalModel` have it."""

    device: torch.device

    def logits(self, tokens: Tokens, k: int) -> torch.Tensor:
        """Return logits at the answer positions, [A, V], with `k` active experts and no dropped tokens."""


class LocalModel:
    """A `Scoring` of a model that holds all its experts and belongs to no client."""

    def __init__(self, model: UBSMoEForCausalLM, device: torch.device) -> None:
        self.model, self.device = model.eval(), device

    @torch.no_grad()
    def logits(self, tokens: Tokens, k: int) -> torch.Tensor:
        """Return logits at the answer positions, [A, V]."""
        self.model.set_active_experts(k)
        return self.model(tokens.input_ids, tokens.used, tokens.position_A, tokens.branch_BS)


class Evaluator:
    """Scores models on the evaluation rows, which it tokenises once.

    The answer loss is the mean over all answer tokens, the closing end-of-text token included. A row with choices is
    right if the right option has the largest summed log-probability of its answer tokens: raw, and length-normalised
    (divided by the number of tokens, or of characters). As in the field's harness (lm-eval), end-of-text does not count
    there, so in raw scoring an option that begins another is never the less likely one.

    A row of which some option does not fit is not scored: a cut option would decide nothing. `rows` are those that are
    scored, `dropped` the ids of the others, `lengths` their numbers.

    Args:
        rows: evaluation rows.
        tokenizer: the model's tokenizer.
        max_length: most tokens of a prompt with any of its options.
        batch_size: rows of a batch on a rank.
        chat: how conversations are written; None: the rows are none.
        overlong: as `data.overlong`.

    Raises:
        UserError: if no row fits.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        max_length: int,
        batch_size: int,
        chat: ChatTemplate | None = None,
        overlong: str = CUT_PROMPT,
    ) -> None:
        self.batch_size, self.pad = batch_size, tokenizer.pad_token_id
        pairs = list(zip(rows, pack(rows, tokenizer, max_length, chat, overlong), strict=True))
        self.rows = [row for row, packed in pairs if packed is not None]
        self.packed = [packed for _, packed in pairs if packed is not None]
        self.dropped = [str(row["id"]) for row, packed in pairs if packed is None]
        if not self.rows:
            raise nothing_fits("max_length", max_length, f"{len(rows)} evaluation rows")
        self.lengths = Lengths(len(self.rows), sum(row.cut for row in self.packed), len(self.dropped))
        self.longest = max(row.longest for row in self.packed)  # tokens of a question with its answer
        self.tasks = sorted({row["task"] for row in self.rows})
        # rows of about equal length share a batch: less padding
        self._order = sorted(range(len(self.rows)), key=lambda n: len(self.packed[n]))

    def sums(
        self, client: Scoring, k: int, worker: int, workers: int, stop: Callable[[], bool] | None = None
    ) -> np.ndarray:
        """Score this rank's part of the rows at K = `k` (a collective over the client).

        Args:
            client: the model.
            k: active experts.
            worker, workers: this rank's place among all ranks that share the rows.
            stop: whether to stop before the next batch, the same on all ranks of the client; the sums are then partial.

        Returns:
            [tasks, fields] float64 in the order of `self.tasks` and `FIELDS`.
        """
        assigned = self._order[worker::workers]
        most = -(-len(self._order) // workers)
        total = np.zeros((len(self.tasks), len(FIELDS)))
        for start in range(0, most, self.batch_size):
            if stop is not None and stop():
                break
            # ranks of a client must run equally often: a rank whose rows have run out repeats the first row
            numbers = assigned[start : start + self.batch_size]
            batch = [self.packed[n] for n in numbers or [0]]
            logp = self._log_probabilities(client, k, batch)
            for n, row_logp in zip(numbers, logp, strict=False):
                total[self._task(n)] += score(self.packed[n], row_logp)
        return total

    def _log_probabilities(self, client: Scoring, k: int, batch: Sequence[PackedRow]) -> list[list[torch.Tensor]]:
        """Return for each row the log-probabilities of its common tokens, then those of each option."""
        tokens = collate_packed(batch, self.pad).to(client.device)
        logp_AV = F.log_softmax(client.logits(tokens, k), dim=-1)
        logp_A = logp_AV.gather(1, tokens.target_A.view(-1, 1)).squeeze(1).cpu()
        parts = iter(logp_A.split([length for row in batch for length in row.parts()]))
        return [[next(parts) for _ in row.parts()] for row in batch]

    def _task(self, row: int) -> int:
        return self.tasks.index(self.rows[row]["task"])


def score(row: PackedRow, logp: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Return what a row adds to the sums, in the order of `FIELDS`.

    Where several options tie for the best, a right row counts as its chance to be drawn.

    Args:
        row: the row.
        logp: log-probabilities of its common tokens, then of each option. The end-of-text token ends the right option;
            it counts for the loss but not for the choice.
    """
    common, *options = logp
    if len(options) == 1:
        bears = options[0] if row.learned is None else options[0][torch.tensor(row.learned)]
        return -float(bears.sum()), len(bears), 0, 0, 0, 0, 1
    # the choice is among options without end-of-text
    choice = [option[:-1] if n == row.label else option for n, option in enumerate(options)]
    # log p(option | prompt), and the same per answer token and per character
    raw = [float(common.sum() + option.sum()) for option in choice]
    by_tokens = [total / (len(common) + len(option)) for total, option in zip(raw, choice, strict=True)]
    by_characters = [total / characters for total, characters in zip(raw, row.characters, strict=True)]
    # the loss is that of the right answer, end-of-text included
    nll = -float(common.sum() + options[row.label].sum())
    tokens = len(common) + len(options[row.label])
    return nll, tokens, *(_chance(values, row.label) for values in (raw, by_tokens, by_characters)), 1, 1


def scores(sums: np.ndarray) -> dict[str, float]:
    """Return the scores of some rows; none if there are no rows, no accuracy if none of them has choices.

    Args:
        sums: over the rows, in the order of `FIELDS`.
    """
    nll, tokens, correct, correct_norm, correct_chars, choices, _ = sums
    if not tokens:
        return {}
    found = {"loss": nll / tokens, "perplexity": float(np.exp(np.minimum(nll / tokens, LARGEST_EXPONENT)))}
    if choices:
        found |= {"accuracy": correct / choices, "accuracy_norm": correct_norm / choices}
        found["accuracy_chars"] = correct_chars / choices
    return found


def _chance(values: Sequence[float], label: int) -> float:
    """Return the chance to draw the label among the largest values: bf16 often ties, and order must not decide."""
    best = max(values)
    if not all(math.isfinite(value) for value in values) or values[label] != best:
        return 0.0
    return 1 / values.count(best)


def generate_answers(
    model: UBSMoEForCausalLM,
    k: int,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    max_new_tokens: int,
    chat: ChatTemplate | None = None,
) -> list[str]:
    """Generate greedy continuations of the rows' prompts, in batches of rows of about equal length.

    Args:
        model: a model that holds all its experts.
        k: active experts; no token is dropped.
        rows: the questions.
        tokenizer: the model's tokenizer.
        max_length: most tokens of a prompt with its right answer; a longer prompt loses its beginning, as in training.
        batch_size: rows of a batch.
        max_new_tokens: most tokens of an answer; prompt and answer together may exceed `max_length`.
        chat: how conversations are written; None: the rows are none. Asked for is their last answer.

    Returns:
        The generated text of each row, up to the token that ends it.

    Raises:
        UserError: if the model has too few positions, or a row's right answer does not fit in `max_length`.
    """
    examples, lengths = encode(rows, tokenizer, max_length, chat)
    if lengths.dropped:
        raise UserError(f"max_length: {max_length} is too short for {lengths.dropped} of {len(rows)} rows; raise it")
    prompts, replies = zip(*map(last_reply, examples), strict=True)
    setting = f"max_new_tokens: {max_new_tokens}"
    check_positions(model, prompts, max_new_tokens, setting, "lower max_new_tokens or max_length")
    ends = ends_of(replies, tokenizer)
    return generate(model, k, prompts, tokenizer, ends=ends, batch_size=batch_size, max_new_tokens=max_new_tokens)


def parse_answer(text: str, labels: Sequence[str]) -> int | None:
    """Return the index of the label that a generated answer names; None where the text has no label as a word.

    That is the first label after "the correct answer is", or without this phrase the first in the text; see
    `first_named` for case and scripts.
    """
    text = nfc(text)
    head = re.search(ANSWER_HEAD, text, re.IGNORECASE)
    return first_named([nfc(label) for label in labels], text[head.end() :] if head else text)
