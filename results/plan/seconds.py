"""Compare the plan's seconds with runs of one client of one rank on this machine's CPUs; prints rows of `seconds.csv`.

    OMP_NUM_THREADS=1 python results/plan/seconds.py --repeats 3

Plan (`launch/plan.py --measure`) and run take turns. Only round 2 is evaluated. `big` is a random OLMoE of 119 M
parameters with the built-in tokenizer.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BUILT_IN = REPO / "ubsmoe_ds" / "models" / "tiny_olmoe"
BIG = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 4}
BIG |= {"num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 8}
HALF, WHOLE = "clients=[{name: a, budget: 0.5}]", "clients=[{name: a, budget: 1.0}]"
CASES = {
    "big": [HALF, "train.local_steps=4", "data.eval_rows=40"],
    "tiny": [HALF],
    "wide": [WHOLE, "deepspeed.train_batch_size=128", "train.local_steps=6"],
}
COLUMNS = "case repeat flops bandwidth planned_step_s planned_round_s step_s_round_1 step_s_round_2 round_2_s"


def save_big(folder: Path) -> None:
    """Write the model of case `big`."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    facts = json.loads((BUILT_IN / "config.json").read_text(encoding="utf-8")) | BIG
    facts.pop("head_dim", None)
    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(**facts)).save_pretrained(folder)
    for path in BUILT_IN.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)


def compare(overrides: list[str], folder: Path) -> list[float | str]:
    """Return what the plan prints, and what a run then takes."""
    plan = [sys.executable, "launch/plan.py", "--measure", *overrides]
    text = subprocess.run(plan, cwd=REPO, check=True, capture_output=True, text=True).stdout
    rates = re.search(r"seconds at (\S+) FLOP/s and (\S+) bytes/s", text)
    planned = re.search(r"a: (\S+) s a step .*, (\S+) s a round", text)
    assert rates and planned, text
    fixed = ["train.rounds=2", "evaluation.every=2", "checkpoint.every=0", f"output={folder}"]
    run = [sys.executable, "launch/train.py", *overrides, *fixed]
    subprocess.run(run, cwd=REPO, check=True, capture_output=True)
    lines = (folder / "tiny" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    _, *rounds = (json.loads(line) for line in lines)
    steps = [round(r["seconds"]["seconds_local/a"] / r["metrics"]["steps/a"], 4) for r in rounds]
    return [*rates.groups(), *planned.groups(), *steps, round(rounds[1]["seconds"]["seconds/round"], 4)]


def main() -> None:
    """Read the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    print(COLUMNS.replace(" ", ","))
    with tempfile.TemporaryDirectory() as scratch:
        if "big" in options.cases:
            save_big(Path(scratch) / "big")
            CASES["big"].append(f"model.path={scratch}/big")
        for case in options.cases:
            for repeat in range(1, options.repeats + 1):
                print(case, repeat, *compare(CASES[case], Path(scratch) / f"{case}{repeat}"), sep=",", flush=True)


if __name__ == "__main__":
    main()
