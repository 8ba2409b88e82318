"""What quantised frozen weights cost the built-in model: error of the logits, and loss before and after training.

    python results/quantized/study.py logits
    python results/quantized/study.py run
    python results/quantized/study.py table

All but `fp32` compute in bf16, the precision in which the model is stored. `run` trains one client of one rank: K = 4
of 16 experts, `ub_smoe` of ds_configs/compare_tiny.yaml with 14 steps of 8 rows. Each seed has rows and adapters of its
own. Runs that `runs.jsonl` holds are not repeated.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment

CONFIG = "ds_configs/compare_tiny.yaml"
OUT = Path(__file__).parent
VARIANTS = {
    "fp32": [],
    "bf16": ["deepspeed.bf16.enabled=true"],
    "int8": ["deepspeed.bf16.enabled=true", "model.quantize=int8"],
    "nf4": ["deepspeed.bf16.enabled=true", "model.quantize=nf4"],
}
SETTINGS = [
    "clients=[{name: k4, budget: 0.5}]",
    "data.rows=600",
    "data.eval_rows=64",
    "lora.attention=true",
    "deepspeed.train_batch_size=8",
    "train.rounds=2",
    "train.local_steps=7",
    "evaluation.every=2",
    "checkpoint.every=0",
]


def experiment(variant: str, seed: int, folder: Path, *more: str) -> Experiment:
    """Return one run."""
    place = [f"seed={seed}", f"name={variant}-{seed}", f"output={folder}"]
    return load_experiment(CONFIG, [*SETTINGS, *VARIANTS[variant], *place, *more])


def run(seeds: Sequence[int], variants: Sequence[str]) -> None:
    """Carry out all runs that are missing."""
    folder, world = Path(tempfile.mkdtemp()), None
    made = {(record["seed"], record["variant"]) for record in records()}
    for seed, variant in ((seed, variant) for seed in seeds for variant in variants):
        if (seed, variant) in made:
            continue
        exp = experiment(variant, seed, folder)
        if world is None:
            from ubsmoe_ds.mpi.join import join

            world = join(exp, "train.py", [])
            os.environ["DS_ACCELERATOR"] = "cpu"
        one_run(exp, world)
        lines = (exp.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        first, last = (json.loads(lines[n])["metrics"] for n in (0, -1))
        record = {"seed": seed, "variant": variant}
        record |= {"before": round(first["eval/loss"], 5), "after": round(last["eval/loss"], 5)}
        with (OUT / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def one_run(exp: Experiment, world: Any) -> None:
    """Run the federation, of this process alone."""
    from ubsmoe_ds.federation.build import build
    from ubsmoe_ds.launching.hang_watch import HangWatch
    from ubsmoe_ds.mpi.preemption import StopRequests

    stop, unwatched = StopRequests(world.comm, None), HangWatch("", None, survives=False)
    federation = build(exp, world, stop, unwatched, on_accelerator=False, verbose=False, resume=None)
    federation.run()
    federation.client.engine.destroy()


def logits() -> None:
    """Print the error of the logits at the answers of the evaluation rows, before training."""
    from ubsmoe_ds.client.engine import client_spec
    from ubsmoe_ds.data.batches import collate
    from ubsmoe_ds.data.encoding import read_encoder
    from ubsmoe_ds.data.sources import load_rows
    from ubsmoe_ds.models.conversion import load

    values: dict[tuple[str, int], torch.Tensor] = {}
    for variant in VARIANTS:
        exp = experiment(variant, 0, OUT, "data.rows=1500", "data.eval_rows=200")
        encoder = read_encoder(exp)
        examples, _ = encoder.encode(load_rows(exp.data, 0).evaluation, "all")
        tokens = collate(examples, encoder.tokenizer.pad_token_id)
        dtype = torch.bfloat16 if exp.deepspeed.use_bf16 else torch.float32
        model = load(exp.weights_dir, client_spec(exp, exp.clients[0], 0), dtype).eval()
        for k in (4, 8):
            model.set_active_experts(k)
            with torch.no_grad():
                values[variant, k] = model(tokens.input_ids, tokens.used, tokens.position_A)
    for variant, k in values:
        ours, exact = values[variant, k], values["fp32", k]
        record = {"variant": variant, "k": k, "positions": len(exact), "std_of_logits": float(exact.std())}
        record["rms_error"] = float((ours - exact).square().mean().sqrt())
        record["kl"] = float(
            F.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
        )
        record["same_first"] = float((ours.argmax(-1) == exact.argmax(-1)).float().mean())
        record["loss"] = float(F.cross_entropy(ours, tokens.target_A))
        print(json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in record.items()}))


def records() -> list[dict[str, Any]]:
    """Return the runs that were made so far."""
    path = OUT / "runs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table() -> None:
    """Print mean losses with their spread over the seeds, and differences to bf16, paired by seed."""
    import pandas as pd

    losses = pd.DataFrame(records()).pivot(index="seed", columns="variant", values=["before", "after"])
    for when in ("before", "after"):
        for variant in losses[when]:
            of_variant = losses[when, variant]
            minus = of_variant - losses[when, "bf16"]
            mean, difference = (f"{v.mean():.4f} ± {v.std():.4f}" for v in (of_variant, minus))
            print(f"{when:<7}{variant:<5} n {of_variant.count()}  {mean}  minus bf16 {difference}")


def main() -> None:
    """Read the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("logits", "run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(300, 310))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    options = parser.parse_args()
    if options.command == "run":
        run(options.seeds, options.variants)
    elif options.command == "logits":
        logits()
    else:
        table()


if __name__ == "__main__":
    main()
