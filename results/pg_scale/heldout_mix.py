"""Fit the weight that pseudo-gradients (PG) deserve: the best mix of one step's real gradient and PG, on held-out rows.

    python results/pg_scale/heldout_mix.py --seeds 200 201 202 203 204

For each K the gradient of the K-sparse loss on 96 held-out training rows of all clients is fitted, by least squares
over all experts' LoRA factors, with a * real + b * PG of a step of 8 rows of one client, at rho = 1 - K / M. b / a is
the scale that would serve best. Printed are means over seeds and their standard errors: a, b, b / a, and the gain, by
how much PG lowers the squared error. The model is the built-in one before training. One process, no DeepSpeed engine.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from federated import experiment, write_rows
from torch import Tensor
from torch.nn import functional as F

from ubsmoe_ds.client.engine import client_spec
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import Example, collate
from ubsmoe_ds.data.encoding import read_encoder
from ubsmoe_ds.data.shares import rows_by_client
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM
from ubsmoe_ds.models.conversion import load
from ubsmoe_ds.moe.collector import PseudoGradientCollector
from ubsmoe_ds.moe.moments import ExpertMoments

DRAWN = (4, 16, 64, None)
KS = (1, 2, 4)
FEW = 8  # tokens of the step; an expert with fewer counts as starved


def gradients(model: UBSMoEForCausalLM, examples: list[Example]) -> Tensor:
    """Return the mean answer loss's gradient for each expert's LoRA factors B, [L E, P]; A's is zero at B = 0."""
    model.zero_grad()
    answers = sum(len(example.answer) for example in examples)
    for layer in model.layers:
        layer.gate.reset_counts()
    for first in range(0, len(examples), 16):
        tokens = collate(examples[first : first + 16], 0)
        logits_AV = model(tokens.input_ids, tokens.used, tokens.position_A)
        (F.cross_entropy(logits_AV, tokens.target_A, reduction="sum") / answers).backward()
    parts = [[B.grad.flatten(1) for _, B in layer.experts.factors().values()] for layer in model.layers]
    return torch.cat([torch.cat(layer, 1) for layer in parts])


def pseudo(model: UBSMoEForCausalLM, examples: list[Example], rho: float, count: int | None) -> Tensor:
    """Return PG of these rows in the form of `gradients`."""
    collector = PseudoGradientCollector(model.layers, "linearised", rho, count).attach()
    gradients(model, examples)
    of = {id(parameter): gradient for parameter, gradient in collector.reduce()}
    collector.detach()
    parts = [[of[id(B)].flatten(1) for _, B in layer.experts.factors().values()] for layer in model.layers]
    return torch.cat([torch.cat(layer, 1) for layer in parts])


def fits(exp: Experiment) -> Iterator[dict[str, float]]:
    """Yield the sums of the least-squares problems of one seed, one for each K, client, number of tokens and group."""
    encoder = read_encoder(exp)
    shares, held = rows_by_client(exp)
    examples = [encoder.encode(rows.training, "")[0] for rows in shares]
    target_rows = encoder.encode(held, "")[0][:96]
    torch.manual_seed(exp.seed)
    model = load(exp.weights_dir, client_spec(exp, exp.clients[0], 0)).train()
    moments = ExpertMoments(model.layers)
    for k in KS:
        model.set_active_experts(k)
        moments.start()
        with torch.no_grad():
            for rows in examples:
                model(*collate(rows[:16], 0)[:3])
        moments.update(moments.sums())
        target = gradients(model, target_rows)
        for rows in examples:
            real = gradients(model, rows[16:24])
            fed = torch.cat([layer.gate.routed_E for layer in model.layers]) >= FEW
            for count in DRAWN:
                found = pseudo(model, rows[16:24], 1 - k / exp.num_experts, count)
                for group, chosen in (("all", fed | ~fed), ("starved", ~fed)):
                    if not chosen.any():
                        continue
                    a, b, y = real[chosen], found[chosen], target[chosen]
                    sums = {"aa": a * a, "ab": a * b, "bb": b * b, "ay": a * y, "by": b * y, "yy": y * y}
                    key = {"seed": exp.seed, "k": k, "drawn": str(count), "group": group}
                    yield key | {name: float(value.double().sum()) for name, value in sums.items()}


def solve(sums: pd.Series) -> pd.Series:
    """Return the weights of both gradients, their ratio, and the drop of the squared error that PG brings."""
    matrix = torch.tensor([[sums.aa, sums.ab], [sums.ab, sums.bb]], dtype=torch.float64)
    a, b = torch.linalg.solve(matrix, torch.tensor([sums.ay, sums.by], dtype=torch.float64)).tolist()
    alone = sums.yy - sums.ay**2 / sums.aa
    both = sums.yy - a * sums.ay - b * sums.by
    return pd.Series({"real": a, "PG": b, "scale": b / a, "gain %": 100 * (1 - both / alone)})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(200, 205)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for seed in options.seeds:
            write_rows(Path(folder), seed)
            rows += fits(experiment(Path(folder), (2, 4), seed, "no PG"))
    keys = ["k", "group", "drawn"]
    by_seed = (
        pd.DataFrame(rows).groupby([*keys, "seed"], sort=False).sum().apply(solve, axis=1).groupby(keys, sort=False)
    )
    print(by_seed.mean().join(by_seed.sem().add_suffix(" SE")).round(3).to_string())


if __name__ == "__main__":
    main()
