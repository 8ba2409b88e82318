"""Generate text greedily at a given K; choose the evaluation prompts that a run answers at each evaluation.

transformers' `generate` does the work, on the converted model. As in all evaluation no token is dropped.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.data.evaluation_rows import PackedRow, asked
from ubsmoe_ds.data.tokenizing import special_ids
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM

LEAST_NEW_TOKENS = 16  # of a generated answer: models say more than the answer needs


def check_positions(
    model: UBSMoEForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int, setting: str, remedy: str
) -> None:
    """Check that the model has positions for prompts with so many new tokens.

    Raises:
        UserError: naming the setting that asks for them; `remedy` is what to change.
    """
    needed, positions = max(map(len, prompts)) + new_tokens, model.hf.config.max_position_embeddings
    if needed > positions:
        raise UserError(
            f"{setting} and the longest prompt need {needed} positions, but the model has {positions}; {remedy}"
        )


@torch.no_grad()
def generate(
    model: UBSMoEForCausalLM,
    k: int,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    ends: Collection[int],
    batch_size: int,
    max_new_tokens: int,
    together: bool = False,
    stop: Callable[[], bool] | None = None,
) -> list[str]:
    """Continue prompts greedily, in batches of prompts of about equal length.

    Args:
        model: the converted model.
        k: active experts.
        prompts: token ids.
        tokenizer: the model's.
        ends: tokens that end a continuation, see `ends_of`.
        batch_size: prompts of a batch.
        max_new_tokens: most tokens of a continuation.
        together: whether other ranks hold some of the experts; then all ranks of the client call this with equally many
            prompts, and go on until the last of them is done.
        stop: whether to stop before the next batch, the same on all these ranks; the rest is then empty.

    Returns:
        The text of each continuation, up to a token that ends it.
    """
    model.eval()
    model.set_active_experts(k)
    for layer in model.layers:
        layer.used_token = None  # generation has its own attention mask
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    device = next(model.parameters()).device
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        if stop is not None and stop():
            break
        chosen = order[start : start + batch_size]
        ids, mask = _padded_on_the_left([prompts[n] for n in chosen], tokenizer.pad_token_id)
        generated = model.hf.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
            synced_gpus=together,
        )
        answers = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
        for n, text in zip(chosen, answers, strict=True):
            texts[n] = text
    return texts


def ends_of(replies: Iterable[Sequence[int]], tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: end-of-text, and special tokens that end these replies."""
    return {tokenizer.eos_token_id} | ({reply[-1] for reply in replies} & special_ids(tokenizer))


def _padded_on_the_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, [rows, longest], so that all answers begin at the same position."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, longest - len(prompt) :] = torch.tensor(prompt)
        mask[b, longest - len(prompt) :] = 1
    return ids, mask


class Prompts:
    """The first evaluation rows as prompts to answer: what a run shows of its models as it goes.

    Args:
        rows: the first rows of the evaluation, as it scores them.
        tokenizer: the model's.
    """

    def __init__(self, rows: Sequence[PackedRow], tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens, right = zip(*map(asked, rows), strict=True)
        self.ends = ends_of(right, tokenizer)
        self.max_new_tokens = max([LEAST_NEW_TOKENS, *map(len, right)])
        self.texts = tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
        self.answers = tokenizer.batch_decode(right, skip_special_tokens=True)

    def answered(
        self,
        model: UBSMoEForCausalLM,
        k: int,
        place: tuple[int, int],
        *,
        batch_size: int,
        together: bool,
        stop: Callable[[], bool],
    ) -> dict[int, str]:
        """Answer this rank's part of the prompts; return the text by the prompt's number (see `generate`).

        Args:
            model: the client's.
            k: active experts.
            place: (this rank's place among the ranks that share the prompts, number of these ranks).
            batch_size, together, stop: as for `generate`.
        """
        worker, workers = place
        mine = list(range(len(self.tokens)))[worker::workers]
        # ranks of a client must run equally often: a rank whose prompts have run out repeats the first one
        padded = mine + [0] * (-(-len(self.tokens) // workers) - len(mine))
        prompts = [self.tokens[n] for n in padded]
        sizes = {"batch_size": batch_size, "max_new_tokens": self.max_new_tokens}
        texts = generate(model, k, prompts, self.tokenizer, ends=self.ends, together=together, stop=stop, **sizes)
        return dict(zip(mine, texts, strict=False))
