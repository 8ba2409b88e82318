"""Refuse `data.packing` for a model in which the rows of one sequence see each other, by trying it out.

Most models of transformers separate rows by their positions. One that carries a state from token to token, or does not
pass the positions to its attention mask, mixes them without a word.
"""

import torch

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.data.batches import Example, collate, collate_sequences
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM

TOKENS = 12  # of each of two rows
LARGEST = 0.1  # difference of the logits over their spread: rounding in bf16 stays far below, other rows far above


@torch.no_grad()
def check_packing(model: UBSMoEForCausalLM) -> None:
    """Compare the logits of a row that comes second in a sequence with those of the row alone.

    A collective over the ranks of an expert group.

    Raises:
        UserError: if they differ.
    """
    ids = torch.randint(model.hf.config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = (Example(row[:1], row[1:]) for row in ids)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()  # nothing is dropped
    packed = collate_sequences([[first, second]], 0, 2 * TOKENS).to(device)
    alone = collate([second], 0).to(device)
    together = model(packed.input_ids, packed.used, packed.position_A, None, packed.position_BS)[-TOKENS + 1 :]
    apart = model(alone.input_ids, alone.used, alone.position_A)
    model.train(was_training)
    # in the middle token: a token that is near a tie between experts may take another one for a rounding error
    difference = float((together - apart).abs().amax(dim=1).median() / apart.std())
    if not difference <= LARGEST:
        kind = model.hf.config.model_type
        raise UserError(
            f"data.packing: true, but in a model of type {kind} the rows of a sequence see each other; set it to false"
        )
