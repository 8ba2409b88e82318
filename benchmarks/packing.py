"""Time a client's training step on rows packed into sequences against the same rows padded: useful tokens a second.

    python benchmarks/packing.py                                # OLMoE-1B-7B scaled to 4 layers of width 512
    python benchmarks/packing.py --layers 16 --hidden 2048 --dtype bf16 --rows 64    # its full shape, on a GPU

Rows have log-normal lengths of median 90 and sigma 0.6, cut at --max-length tokens: our assumption for instruction rows
such as Alpaca's, most of which are short and a few long. The last half of a row is its answer. Both implementations
take the same steps of the same client in turn; `ratio` is the time over that of packed steps, so it is how many times
more useful tokens packing trains on in the same time. `useful` is the share of tokens that are no padding.

    packed      `data.packing: true`: sequences of at most --max-length tokens, with a mask between rows
    padded      each row padded to the longest of its step, with a plain causal mask
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measuring import add_output_option, in_turn, machine, ratio, say, start_alone
from train_step import experiment, scaled_checkpoint

from ubsmoe_ds.base.malloc import keep_freed_memory

MEDIAN, SIGMA = 90.0, 0.6  # of the rows' lengths


def rows(count: int, longest: int, vocabulary: int) -> list[Any]:
    """Return rows of random tokens."""
    from ubsmoe_ds.data.batches import Example

    generator = torch.Generator().manual_seed(0)
    lengths = (MEDIAN * (SIGMA * torch.randn(count, generator=generator)).exp()).clamp(8, longest).int().tolist()
    texts = [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Example(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]


def batches(client: Any, options: argparse.Namespace, packed: bool) -> list[Any]:
    """Return the first steps of a client, packed or not."""
    from ubsmoe_ds.data.batches import steps

    examples = rows(options.rows * options.steps, options.max_length, client.hf_config.vocab_size)
    length = options.max_length if packed else None
    endless = steps(
        examples, batch_size=options.rows, micro_batches=1, rank=0, ranks=1, pad=0, seed=(0,), packed_length=length
    )
    return list(islice(endless, options.steps))


def all_steps(client: Any, of: list[Any]) -> Callable[[], object]:
    """Return a function that takes all these steps."""
    return lambda: [client.step(batch) for batch in of]


def useful(of: list[Any]) -> float:
    """Return the share of tokens that are no padding."""
    micro: Iterator[Any] = (tokens for batch in of for tokens in batch.micro)
    return sum(batch.used_tokens for batch in of) / sum(tokens.input_ids.numel() for tokens in micro)


def measure(path: str, options: argparse.Namespace) -> None:
    """Time both in turn and print a line for each."""
    from ubsmoe_ds.client.engine import Client

    torch.set_num_threads(options.threads)
    exp = experiment(path, 8, options)
    client = Client(exp, exp.clients[0], 0)
    of = {name: batches(client, options, packed=name == "packed") for name in ("packed", "padded")}
    if client.moments is not None:
        client.calibrate(iter(of["padded"]), 1)
        client.moments.update(client.moments.sums())
    client.reset_counts()
    client.engine.train()
    seconds = in_turn({name: all_steps(client, part) for name, part in of.items()}, options.repeats)
    for name, part in of.items():
        record = {"bench": "packing", "impl": name, "dtype": options.dtype, "rows": options.rows}
        tokens = sum(batch.used_tokens for batch in part)
        record |= {"tokens_per_second": round(tokens / statistics.median(seconds[name]))}
        record |= {"useful": round(useful(part), 3), "ms": 1e3 * statistics.median(seconds[name]) / options.steps}
        say(record | {"ratio": ratio(seconds[name], seconds["packed"])}, options.json)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed together")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    add_output_option(parser)
    options = parser.parse_args()
    options.k = [8]  # `experiment` reads the largest
    keep_freed_memory()
    start_alone(experiment("builtin:tiny_olmoe", 8, options))
    if not options.json:
        print(machine())
    with tempfile.TemporaryDirectory() as folder:
        measure(scaled_checkpoint(options, Path(folder)), options)


if __name__ == "__main__":
    main()
