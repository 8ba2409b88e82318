"""The rows of all clients as tokens: each client's are encoded when its group needs them, and counted before that."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import Example, StepBatch
from ubsmoe_ds.data.chat import PLAINLY
from ubsmoe_ds.data.client_rows import ClientRows
from ubsmoe_ds.data.encoding import read_encoder
from ubsmoe_ds.data.lengths import Lengths
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.models.hf_config import check_window
from ubsmoe_ds.mpi.world import World

KEPT_CLIENTS = 8  # whose tokens stay in memory, where clients take turns


class Texts:
    """Tokens of one rank's rows, and numbers of the rows of all clients (making one is a collective).

    evaluator: holds the evaluation rows. lengths: numbers of training rows of each client by what length did to them.
    answer_tokens, tokens: of each client's training rows, those of answers and all.

    Raises:
        UserError: for a client of whose rows none fits.
    """

    def __init__(self, exp: Experiment, world: World, rows: ClientRows) -> None:
        self.exp, self.rows, self.encoder = exp, rows, read_encoder(exp)
        data, size, chat = exp.data, exp.evaluation.batch_size, self.encoder.chat(rows.evaluation)
        self.evaluator = Evaluator(rows.evaluation, self.encoder.tokenizer, data.max_length, size, chat, data.overlong)
        check_window(self.encoder.model, self.evaluator.longest)
        self._encoded = lru_cache(maxsize=KEPT_CLIENTS if exp.takes_turns else None)(self._encode)
        counts_C = self._count(world)
        self.lengths = [Lengths(*counts[:-2]) for counts in counts_C]
        self.answer_tokens, self.tokens = ([counts[n] for counts in counts_C] for n in (-2, -1))

    def examples(self, client: int) -> Sequence[Example]:
        """Return a client's rows as tokens."""
        return self._encoded(client)[0]

    def steps(self, client: int, group: int, rank: int, first: int) -> Iterator[StepBatch]:
        """Yield a client's batches from a step on, as a rank of a group sees them."""
        config = self.exp.trained_by(client, group)
        return self.encoder.steps(self.examples(client), client, config, rank, first)

    def notes(self, group: int) -> list[str]:
        """Return what the user should know of how the rows are written."""
        training = self.rows.of_client(self.exp.clients_for(group)[0])
        return [PLAINLY] if self.encoder.writes_plainly(training, self.rows.evaluation) else []

    def report(self) -> RowReport:
        """Return the numbers of rows by client."""
        names = [client.name for client in self.exp.clients]
        training = dict(zip(names, self.lengths, strict=True))
        return RowReport(training, self.evaluator.lengths, self.evaluator.dropped, self.rows.unused)

    def _encode(self, client: int) -> tuple[list[Example], Lengths]:
        return self.encoder.encode(self.rows.of_client(client), self.exp.clients[client].name)

    def _count(self, world: World) -> list[list[int]]:
        """Return the numbers of each client; every group counts those of some clients (a collective)."""
        table = np.zeros((len(self.exp.clients), len(Lengths._fields) + 2))
        mine = self.exp.clients_of(world.group)
        ranks = self.exp.trainers[world.group].ranks if self.exp.takes_turns else 1
        for client in mine[world.group_rank % ranks :: ranks]:
            examples, lengths = self._encoded(client)
            if self.exp.takes_turns or world.group_rank == 0:
                table[client] = [*lengths, sum(len(e.places) for e in examples), sum(map(len, examples))]
        return world.sum(table).astype(int).tolist()
