"""Answer loss and option log-likelihood accuracy of the model at a given K.

Clients with the same K hold the same model after a merge, so they share the rows: every rank takes some, and the sums
are added up by the caller. Shapes: N rows, A answer positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ubsmoe_ds.client import Client
from ubsmoe_ds.data.batches import Candidate, candidates, collate
from ubsmoe_ds.data.sources import Row

FIELDS = ("nll", "tokens", "correct", "rows")  # summed; loss = nll / tokens, accuracy = correct / rows


class Evaluator:
    """The evaluation rows, tokenised once.

    The answer loss is the mean over all answer tokens (the closing end-of-text token included). A row counts as right
    if its right option has the largest summed log-probability of its answer tokens, raw, not length-normalised.

    Args:
        rows: evaluation rows.
        tokenizer: the model's tokenizer.
        max_length: tokens of a row.
        batch_size: rows a rank takes at a time.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, max_length: int, batch_size: int) -> None:
        self.rows, self.batch_size, self.pad = rows, batch_size, tokenizer.pad_token_id
        self.candidates = candidates(rows, tokenizer, max_length)
        self.cut = sum(options[0].cut for options in self.candidates)  # rows whose prompt lost its beginning
        self.tasks = sorted({row["task"] for row in rows})
        # long rows together: less padding
        self._order = sorted(range(len(rows)), key=lambda n: len(self.candidates[n][0].prompt))

    def sums(self, client: Client, k: int, worker: int, workers: int) -> np.ndarray:
        """This rank's part of the rows at K = k (a collective over the client).

        Args:
            client: whose model is evaluated.
            k: active experts.
            worker, workers: this rank's place among all ranks that share the rows.

        Returns:
            [tasks, 4] float64 in the order of `self.tasks` and `FIELDS`.
        """
        parts = [[c for n in self._order[w::workers] for c in self.candidates[n]] for w in range(workers)]
        mine, most = parts[worker], max(len(part) for part in parts)
        scores: dict[int, dict[int, float]] = {n: {} for n in self._order[worker::workers]}
        total = np.zeros((len(self.tasks), len(FIELDS)))
        for start in range(0, most, self.batch_size):
            # ranks of a client must run equally often: where rows have run out, the first row keeps step
            batch = mine[start : start + self.batch_size] or [self.candidates[0][0]]
            logp_AV, lengths = self._log_probabilities(client, k, batch)
            if start >= len(mine):
                continue
            for candidate, logp in zip(batch, logp_AV.split(lengths), strict=True):
                total[self._task(candidate.row)] += self._score(candidate, logp, scores[candidate.row])
        for number, options in scores.items():
            right = max(sorted(options), key=lambda option: options[option]) == self.rows[number]["label"]
            total[self._task(number)] += (0, 0, right, 1)
        return total

    def _score(self, candidate: Candidate, logp_AV: torch.Tensor, scores: dict[int, float]) -> tuple[float, ...]:
        """Fill in the scores of the candidate's options; (nll, tokens, 0, 0) if it holds the right answer."""
        answer = torch.tensor(candidate.example().answer)
        token_logp = logp_AV.gather(1, answer.view(-1, 1)).squeeze(1)
        shared = token_logp[: len(candidate.shared)].sum()
        last = shared + logp_AV[len(candidate.shared), candidate.last]
        scores.update(zip(candidate.options, last.tolist(), strict=True))
        return (-float(token_logp.sum()), len(answer), 0, 0) if candidate.end else (0, 0, 0, 0)

    def _log_probabilities(self, client: Client, k: int, batch: Sequence[Candidate]) -> tuple[torch.Tensor, list[int]]:
        examples = [candidate.example() for candidate in batch]
        logits_AV = client.logits(collate(examples, self.pad).to(client.device), k)
        return F.log_softmax(logits_AV, dim=-1).cpu(), [len(example.answer) for example in examples]

    def _task(self, row: int) -> int:
        return self.tasks.index(self.rows[row]["task"])
