"""Make the built-in base model: a 3 M parameter OLMoE and its tokenizer, trained on the procedural tasks.

    python launch/make_tiny_model.py --out ubsmoe_ds/models/tiny_olmoe

It learns the form of a row (loss on every token) and most tasks to some degree; facts are left to fine-tuning. Its
rows come from another seed than any experiment's default, and evaluation questions are held out by their text, whatever
the seed.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.batches import collate, encode
from ubsmoe_ds.data.sources import Row, load_rows

PAD, END = "<|pad|>", "<|end|>"
ROWS_SEED = 20_000
UNSEEN_TASKS = tuple(synthetic.FACTS)


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it encodes any text, and the tasks' words in few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=[PAD, END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def make_model(vocab: int) -> OlmoeForCausalLM:
    """Make a small OLMoE of 16 experts, 8 of them active."""
    config = OlmoeConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
    )
    return OlmoeForCausalLM(config)


def train(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], steps: int, batch: int, lr: float
) -> None:
    """Train by AdamW with a linear decay, on the mean loss of all tokens plus that of the answers' tokens."""
    examples, _ = encode(rows, tokenizer, max_length=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 30) * max(0.05, 1 - s / steps))
    start = time.time()
    for step in range(steps):
        tokens = collate([examples[i] for i in torch.randint(len(examples), (batch,)).tolist()], tokenizer.pad_token_id)
        labels = tokens.input_ids.masked_fill(~tokens.used, -100)
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.used, labels=labels)
        logits_AV = output.logits.reshape(-1, output.logits.shape[-1])[tokens.position_A]
        answer_loss = torch.nn.functional.cross_entropy(logits_AV, tokens.target_A)
        (output.loss + answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            losses = f"loss {output.loss.item():.3f} answer {answer_loss.item():.4f}"
            say(f"step {step} {losses} {time.time() - start:.0f} s")


def main() -> None:
    """Train the model, round it to bf16, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(0)
    rows = load_rows(DataConfig(source="synthetic", rows=8000), ROWS_SEED).training
    texts = [f"{row['instruction']}\n{row['answer']}{END}" for row in rows]
    tokenizer = train_tokenizer(texts, vocab=768)
    model = make_model(len(tokenizer))
    rows = [row for row in rows if row["task"] not in UNSEEN_TASKS]
    train(model, tokenizer, rows, args.steps, args.batch, args.lr)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()
