"""Evaluate a trained adapter, or a base model, at one or several K (active experts): per task and over all rows.

    python launch/evaluate.py --adapter runs/tiny/adapter --data synthetic --k 2 8
    python launch/evaluate.py --adapter runs/x/adapter/clients/phone --data dev.jsonl --exact-match
    python launch/evaluate.py --model FOLDER --data dev.jsonl --k 8

loss            mean over the answer tokens, with the token that ends the answer; perplexity: e to this power
accuracy        rows whose right option has the largest log-probability, of rows with choices, as the next two
accuracy_norm   the same with log-probabilities divided by the option's number of tokens
accuracy_chars  the same with log-probabilities divided by the option's number of characters
exact_match     with --exact-match: rows whose greedily generated answer names the right label, see `parse_answer`, or
                of rows without choices, is the row's
--format cloze asks the question alone and takes the choices' texts as answers

One process; an accelerator is used if there is one. Exit codes: 0 done, 2 a mistake in the arguments or files.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import sys
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.command_line import Parser, add_show_rows, carry_out, quoting_rows, whole
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import json_line
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.config.formats import AUTO, CLOZE, FORMATS
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data.sources import evaluation_rows


def main() -> int:
    """Evaluate and return the exit code."""
    return carry_out(lambda: show(parse(sys.argv[1:])))


def show(options: argparse.Namespace) -> None:
    """Print the table of `evaluate`."""
    with quoting_rows(options.show_rows):
        table = evaluate(options)
    if not options.json:
        say(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    for record in table.to_dict("records") if options.json else []:
        say(json_line(record).rstrip())


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options of the command line.

    Raises:
        UserError: for options that contradict each other.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluated = parser.add_mutually_exclusive_group(required=True)
    evaluated.add_argument("--adapter", type=Path, help="folder of an adapter")
    evaluated.add_argument("--model", help="a model without adapter, as in model.path")
    parser.add_argument("--base", help="model under the adapter, as in model.path; default: the one it was trained on")
    parser.add_argument("--data", required=True, help="as data.source; of a data set with splits: test")
    parser.add_argument("--format", choices=[AUTO, CLOZE, *FORMATS], help="as data.format; default: the adapter's")
    parser.add_argument("--columns", nargs="+", metavar="FIELD=NAME", help="as data.columns; default: the adapter's")
    parser.add_argument("--chat-template", help="as data.chat_template; default: the adapter's, else the tokenizer's")
    parser.add_argument("--k", type=whole(1), nargs="+", help="active experts; default: the adapter's")
    parser.add_argument("--rows", type=whole(1), help="number of rows; default: all")
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of the choice of rows")
    parser.add_argument("--max-length", type=whole(8), help="as data.max_length; default: the adapter's")
    parser.add_argument("--batch-size", type=whole(1), default=16)
    parser.add_argument("--exact-match", action="store_true", help="also generate answers")
    parser.add_argument(
        "--max-new-tokens", type=whole(1), help="of a generated answer; default: 16, or more for longer right answers"
    )
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the frozen weights")
    parser.add_argument("--json", action="store_true", help="one object a line, for machines")
    add_show_rows(parser)
    options = parser.parse_args(arguments)
    if options.base is not None and options.adapter is None:
        raise UserError("--base: is the model under an --adapter; leave it out with --model")
    return options


def evaluate(options: argparse.Namespace) -> Any:
    """Return a data frame with a row for each K and task, "all" first.

    Raises:
        UserError: for rows, a model or an adapter that cannot be used, or a K that it does not have.
    """
    data = read_as(options)
    rows, max_length = (
        evaluation_rows(options.data, options.rows, options.seed, data.format, data.columns),
        data.max_length,
    )
    import pandas as pd
    import torch

    from ubsmoe_ds.client.evaluation import Evaluator, LocalModel
    from ubsmoe_ds.data.chat import PLAINLY, ChatTemplate, template_of
    from ubsmoe_ds.data.lengths import by_name, length_lines
    from ubsmoe_ds.models.hf_config import check_alignment, check_length, check_window
    from ubsmoe_ds.models.tokenizer import read_tokenizer

    model, folder, k_default = load(options)
    ks, most = options.k or [k_default], model.layers[0].gate.candidates
    if max(ks) > most:
        raise UserError(f"--k: {max(ks)} must be 1 to {most}, the experts that the router may choose from")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cpu" and options.dtype == "bf16":
        check_alignment(model.hf.config, "--dtype bf16")
    local = LocalModel(model.to(device), device)
    tokenizer = read_tokenizer(folder, model.hf.config.vocab_size)
    check_length(model.hf.config, max_length, "--max-length")
    chat = None
    if "messages" in rows[0]:
        template, plain = template_of(data.chat_template, tokenizer)
        chat = ChatTemplate(tokenizer, template)
        if plain:
            say(PLAINLY, error=True)
    evaluator = Evaluator(rows, tokenizer, max_length, options.batch_size, chat)
    check_window(model.hf.config, evaluator.longest)
    setting, dropped = f"--max-length {max_length}", by_name(evaluator.dropped)
    for line in length_lines(setting, "evaluation", evaluator.lengths, dropped_of=dropped):
        say(line, error=True)
    records = []
    for k in ks:
        exact = None
        if options.exact_match:
            lengths = {"max_length": max_length, "batch_size": options.batch_size, "chat": chat}
            exact = exact_matches(local.model, k, evaluator.rows, tokenizer, options.max_new_tokens, lengths)
        records += table_of(k, evaluator.tasks, evaluator.sums(local, k, 0, 1), exact)
    return pd.DataFrame(records)


def read_as(options: argparse.Namespace) -> DataConfig:
    """Return how rows are read and written: as the adapter was trained, but for what the options say.

    Raises:
        UserError: for columns that are none, or an adapter that cannot be read.
    """
    data = DataConfig()
    if options.adapter is not None:
        from ubsmoe_ds.adapters.adapter import asked_as

        data = asked_as(options.adapter)
    changes = {key: getattr(options, key) for key in ("format", "max_length", "chat_template")}
    if options.columns is not None:
        pairs = [text.partition("=") for text in options.columns]
        if not all(field and equals and name for field, equals, name in pairs):
            raise UserError(f"--columns: {' '.join(options.columns)!r} must read FIELD=NAME, such as prompt=question")
        changes["columns"] = {field: name for field, _, name in pairs}
    return data.model_copy(update={key: value for key, value in changes.items() if value is not None})


def exact_matches(
    model: Any, k: int, rows: list[Any], tokenizer: Any, new_tokens: int | None, lengths: dict[str, Any]
) -> dict[str, int]:
    """Return how many rows of each task the model answers right in generated text.

    Args:
        model, k: what generates.
        rows: of one form.
        tokenizer: the model's.
        new_tokens: most tokens of an answer; None: as many as the longest right one, at least `LEAST_NEW_TOKENS`.
        lengths: `max_length`, `batch_size` and `chat` of `generate_answers`.
    """
    from ubsmoe_ds.client.evaluation import generate_answers, parse_answer
    from ubsmoe_ds.client.generation import LEAST_NEW_TOKENS
    from ubsmoe_ds.data.batches import encode, last_reply

    examples, _ = encode(rows, tokenizer, lengths["max_length"], lengths["chat"])
    right = [last_reply(example)[1] for example in examples]
    texts = generate_answers(
        model, k, rows, tokenizer, max_new_tokens=new_tokens or max(LEAST_NEW_TOKENS, *map(len, right)), **lengths
    )
    matches = dict.fromkeys([row["task"] for row in rows], 0)
    for text, row, reply in zip(texts, rows, right, strict=True):
        if "choices" in row:
            matches[row["task"]] += parse_answer(text, row["labels"]) == row["label"]
        else:
            matches[row["task"]] += text.strip() == tokenizer.decode(reply, skip_special_tokens=True).strip()
    return matches


def table_of(k: int, tasks: list[str], sums: Any, exact: dict[str, int] | None) -> list[dict[str, Any]]:
    """Return records of all rows together and of each task, from sums in the order of `evaluation.FIELDS`."""
    from ubsmoe_ds.client.evaluation import scores

    records = []
    for task, part in zip(["all", *tasks], [sums.sum(0), *sums], strict=True):
        count = int(part[-1])
        record: dict[str, Any] = {"k": k, "task": task, "rows": count}
        record |= {name: float(value) for name, value in scores(part).items()}
        if exact is not None:
            record["exact_match"] = (sum(exact.values()) if task == "all" else exact[task]) / count
        records.append(record)
    return records


def load(options: argparse.Namespace) -> tuple[Any, Path, int]:
    """Return (model, folder of its tokenizer, its K)."""
    import torch

    from ubsmoe_ds.adapters.adapter import load_trained, read_adapter
    from ubsmoe_ds.models.conversion import UBSMoESpec
    from ubsmoe_ds.models.conversion import load as load_base
    from ubsmoe_ds.models.families import FAMILIES
    from ubsmoe_ds.models.hf_config import read_config
    from ubsmoe_ds.models.hub import model_folder
    from ubsmoe_ds.moe.gate import GateConfig

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    if options.adapter is not None:
        adapter = read_adapter(options.adapter, options.base)
        model = load_trained(adapter, dtype)
        return model, adapter.base, model.layers[0].gate.k
    folder = model_folder(options.model)
    config = read_config(folder)
    k, experts = config.num_experts_per_tok, getattr(config, FAMILIES[config.model_type].num_experts)
    gate = GateConfig(k=k, candidates=experts, phi_range=None)
    return load_base(model_folder(options.model, weights=True), UBSMoESpec(gate), dtype), folder, k


if __name__ == "__main__":
    sys.exit(main())
