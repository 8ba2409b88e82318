"""Every family trains on two ranks that share its experts as a plain loop does in one process, with PG."""

import numpy as np
import pytest

from tests.support import reference, tiny
from tests.support.families import MODELS, saved_family
from tests.support.ranks import run_ranks

STEPS, RANKS = 3, 2
KINDS = ["deepseek_v3", "gpt_oss", "qwen3_next", "granitemoe"]  # one of each kind of router, experts and attention
OTHERS = [name for name in MODELS if name not in KINDS]
QUANTIZED = [f"{name} in {how}" for name, how in zip(KINDS, ["nf4", "int8", "int8", "nf4"], strict=True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains a group of models in one job; it gives each one's variant, and all results."""
    jobs = {}

    def train(names):
        if names[0] not in jobs:
            folder = tmp_path_factory.mktemp("families")
            variants = {}
            for number, name in enumerate(names):
                family, _, quantize = name.partition(" in ")
                saved_family(family, folder / str(number))
                model = {"path": str(folder / str(number)), "quantize": quantize or None}
                variants[name] = {"pg": "token_weighted", "attention": True, "sections": {"model": model}}
            arguments = {"model_path": str(folder / "0"), "ranks": RANKS, "expert_parallel": RANKS, "count": STEPS}
            arguments["variants"] = variants
            jobs[names[0]] = variants, run_ranks(folder, RANKS, "tests.support.scenarios:train", arguments)
        return jobs[names[0]]

    return train


@pytest.mark.parametrize(
    "name", [*KINDS, *(pytest.param(name, marks=pytest.mark.extended) for name in [*OTHERS, *QUANTIZED])]
)
def test_a_family_trains_like_a_plain_loop(name, trained):
    """Losses, gradient norms, and every trained value, at K = 2 of 4 and DMR with 8 candidates."""
    variants, results = trained(next(names for names in (KINDS, OTHERS, QUANTIZED) if name in names))
    base = tiny.experiment(variants[name]["sections"]["model"]["path"], [{"budget": 0.5}])
    exp = tiny.variant(base, variants[name])
    losses, norms, model, _ = reference.train(exp, STEPS)
    first = dict(reference.whole_model(exp).named_parameters())
    for result in results:
        np.testing.assert_allclose(result[f"{name}/losses"], losses, rtol=0, atol=1e-4)
        np.testing.assert_allclose(result[f"{name}/norms"], norms, rtol=1e-3)
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        held = [result[f"{name}/value/{key}"] for result in results]
        whole = np.concatenate(held) if ".experts." in key else held[0]
        assert np.abs(whole - first[key].detach().numpy()).max() > 1e-4, f"{key} has not moved"
        np.testing.assert_allclose(whole, parameter.detach().numpy(), atol=2e-3, err_msg=key)
