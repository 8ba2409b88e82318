"""The rows of all clients as tokens: each client's are encoded when its group needs them, and counted before that."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import Example, StepBatch
from ubsmoe_ds.data.chat import PLAINLY
from ubsmoe_ds.data.client_rows import ClientRows
from ubsmoe_ds.data.encoding import read_encoder
from ubsmoe_ds.data.lengths import NO_ROWS, Lengths
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.shares import has_sites
from ubsmoe_ds.models.hf_config import check_window
from ubsmoe_ds.mpi.world import World

KEPT_CLIENTS = 8  # whose tokens stay in memory, where clients take turns
LOOKED_AT = 256  # rows of a client, for the mean length that schedules go by


class Evaluators(NamedTuple):
    """Hold the evaluation rows: those common to all clients, and each client's own; None where there are none.

    own: takes the number of a client that this rank's group may train. Its rows are read when they are asked for, and
        kept as tokens, of the last few clients where these take turns.
    """

    common: Evaluator | None
    own: Callable[[int], Evaluator | None]

    @property
    def tasks(self) -> list[str]:
        """Return the tasks of the common rows."""
        return [] if self.common is None else self.common.tasks


class Texts:
    """Tokens of one rank's rows, and numbers of the rows of all clients (making one is a collective).

    evaluators: hold the evaluation rows. lengths, own_lengths: numbers of training rows, and of own evaluation rows, of
    each client by what length did to them. answer_tokens: of each client's training rows; 0 where weights do not go by
    them. tokens: of its training rows, by the mean of the first ones; 0 where no schedule needs them. own_tokens: of
    its own evaluation rows with all their options.

    Raises:
        UserError: for a client of whose rows none fits.
    """

    def __init__(self, exp: Experiment, world: World, rows: ClientRows) -> None:
        self.exp, self.rows, self.encoder = exp, rows, read_encoder(exp)
        kept = KEPT_CLIENTS if exp.takes_turns else None
        own = lru_cache(maxsize=kept)(lambda client: self._evaluator(rows.own_evaluation(client)))
        self.evaluators = Evaluators(self._evaluator(rows.evaluation), own)
        first = exp.clients_for(world.group)[0]
        self._plainly = self.encoder.writes_plainly(
            rows.of_client(first), rows.evaluation, rows.own_evaluation(first)
        )  # here, where all ranks of a group are: they may read a client's rows together
        self._encoded = lru_cache(maxsize=kept)(self._encode)
        counts_C = self._count(world)
        self.lengths, self.own_lengths = ([Lengths(*c[part]) for c in counts_C] for part in (slice(3), slice(3, 6)))
        self.answer_tokens, self.tokens, self.own_tokens = ([counts[n] for counts in counts_C] for n in (-3, -2, -1))

    def _evaluator(self, rows: Sequence[Row]) -> Evaluator | None:
        if not rows:
            return None
        data, size, chat = self.exp.data, self.exp.evaluation.batch_size, self.encoder.chat(rows)
        found = Evaluator(rows, self.encoder.tokenizer, data.max_length, size, chat, data.overlong)
        check_window(self.encoder.model, found.longest)
        return found

    def examples(self, client: int) -> Sequence[Example]:
        """Return a client's rows as tokens."""
        return self._encoded(client)[0]

    def steps(self, client: int, group: int, rank: int, first: int) -> Iterator[StepBatch]:
        """Yield a client's batches from a step on, as a rank of a group sees them."""
        config = self.exp.trained_by(client, group)
        yield from self.encoder.steps(self.examples(client), client, config, rank, first)

    def notes(self) -> list[str]:
        """Return what the user should know of how the rows were dealt and are written."""
        return [*self.rows.notes, *([PLAINLY] if self._plainly else [])]

    def report(self) -> RowReport:
        """Return the numbers of rows by client."""
        names, common = [client.name for client in self.exp.clients], self.evaluators.common
        own = {name: lengths for name, lengths in zip(names, self.own_lengths, strict=True) if lengths.rows}
        return RowReport(
            dict(zip(names, self.lengths, strict=True)),
            common.lengths if common else NO_ROWS,
            common.dropped if common else [],
            self.rows.unused,
            self.rows.left_out,
            own,
        )

    def _encode(self, client: int) -> tuple[Sequence[Example], Lengths]:
        return self.encoder.encode(self.rows.of_client(client), self.exp.clients[client].name)

    def _count(self, world: World) -> list[list[int]]:
        """Return the numbers of each client; every group counts those of some clients (a collective)."""
        table = np.zeros((len(self.exp.clients), 2 * len(Lengths._fields) + 3))
        mine, own_rows = self.exp.clients_of(world.group), self.exp.takes_turns and has_sites(self.exp.clients)
        # rows of its own are read by all ranks of a group together
        ranks = self.exp.trainers[world.group].ranks if self.exp.takes_turns and not own_rows else 1
        for client in mine[world.group_rank % ranks :: ranks]:
            examples, lengths = self._encoded(client)
            # not kept where clients take turns: another group may evaluate this one
            own = self._evaluator(self.rows.own_evaluation(client)) if own_rows else self.evaluators.own(client)
            if ranks > 1 or world.group_rank == 0:
                own_lengths, own_tokens = (own.lengths, own.tokens) if own else (NO_ROWS, 0)
                table[client] = [*lengths, *own_lengths, *self._tokens(examples), own_tokens]
        return world.sum(table).astype(int).tolist()

    def _tokens(self, examples: Sequence[Example]) -> tuple[int, int]:
        """Return (answer tokens, all tokens), 0 where not needed: rows in a file are not tokenised for nothing."""
        answers = sum(len(e.places) for e in examples) if self.exp.train.weights == "tokens" else 0
        if not self.exp.takes_turns:
            return answers, 0
        first = [len(examples[number]) for number in range(min(LOOKED_AT, len(examples)))]
        return answers, round(sum(first) / len(first) * len(examples))
