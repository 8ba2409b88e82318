"""Turn an experiment's rows into the token batches of its model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import ClientConfig
from ubsmoe_ds.data import batches
from ubsmoe_ds.data.batches import Example, StepBatch
from ubsmoe_ds.data.chat import ChatTemplate, template_of
from ubsmoe_ds.data.evaluation_rows import PackedRow, pack
from ubsmoe_ds.data.lengths import Lengths, nothing_fits
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.stored import StoredRows
from ubsmoe_ds.data.stored_examples import StoredExamples
from ubsmoe_ds.models.hf_config import check_length, check_window, read_config
from ubsmoe_ds.models.tokenizer import read_tokenizer


@dataclass(frozen=True)
class Encoder:
    """Tokenises rows and batches them as the experiment says; see `read_encoder`.

    model: the model's config; tokenizer: with a padding token.
    """

    exp: Experiment
    model: PreTrainedConfig
    tokenizer: Any

    @cached_property
    def _template(self) -> tuple[str, bool]:
        return template_of(self.exp.data.chat_template, self.tokenizer)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._template[0])

    def chat(self, rows: Sequence[Row]) -> ChatTemplate | None:
        """Return how rows are written as conversations, if they are some.

        Raises:
            UserError: for a template or a tokenizer that cannot be used.
        """
        return self._chat if rows and "messages" in rows[0] else None

    def writes_plainly(self, *parts: Sequence[Row]) -> bool:
        """Return whether some rows are conversations, and the model has no template for them."""
        return any(self.chat(rows) is not None for rows in parts) and self._template[1]

    def encode(self, rows: Sequence[Row], client: str) -> tuple[Sequence[Example], Lengths]:
        """Return (examples to train on, numbers of rows of the client with this name).

        Rows in a file are tokenised when a step needs them, and their numbers are estimated.

        Raises:
            UserError: if none of its rows fits in `data.max_length`.
        """
        data = self.exp.data
        settings = (self.tokenizer, data.max_length, self.chat(rows), data.train_on, data.overlong)
        examples: Sequence[Example]
        if isinstance(rows, StoredRows):
            examples = StoredExamples(rows, lambda part: batches.encode_each(part, *settings))
            lengths = examples.lengths()
        else:
            examples, lengths = batches.encode(rows, *settings)
        if not lengths.kept:
            raise nothing_fits(
                "data.max_length", self.exp.data.max_length, f"{len(rows)} training rows of client {client!r}"
            )
        return examples, lengths

    def pack(self, rows: Sequence[Row]) -> list[PackedRow]:
        """Return those evaluation rows that fit, with all their options.

        Raises:
            UserError: if a row is longer than the model's sliding window, or none fits in `data.max_length`.
        """
        data = self.exp.data
        found = pack(rows, self.tokenizer, data.max_length, self.chat(rows), data.overlong)
        packed = [row for row in found if row is not None]
        if not packed:
            raise nothing_fits("data.max_length", self.exp.data.max_length, f"{len(rows)} evaluation rows")
        check_window(self.model, max(row.longest for row in packed))
        return packed

    def steps(
        self, examples: Sequence[Example], client: int, config: ClientConfig, rank: int = 0, first: int = 0
    ) -> Iterator[StepBatch]:
        """Yield a client's endless sequence of steps, as one of the ranks that train it sees it.

        Args:
            examples: the client's rows.
            client: its number.
            config: its section, with the ranks of its group.
            rank: of the group's ranks.
            first: number of the first step wanted.
        """
        settings = self.exp.settings(config)
        return batches.steps(
            examples,
            batch_size=settings.train_batch_size,
            micro_batches=settings.gradient_accumulation_steps,
            rank=rank,
            ranks=config.ranks,
            pad=self.tokenizer.pad_token_id,
            seed=(self.exp.seed, client),
            first=first,
            packed_length=self.exp.data.max_length if self.exp.data.packing else None,
        )


def read_encoder(exp: Experiment) -> Encoder:
    """Read the model's config and tokenizer; no weights.

    Raises:
        UserError: for a config or tokenizer that cannot be used, or a `data.max_length` beyond the model's positions.
    """
    model = read_config(exp.model_dir)
    tokenizer = read_tokenizer(exp.model_dir, model.vocab_size)
    check_length(model, exp.data.max_length, "data.max_length")
    return Encoder(exp, model, tokenizer)
