"""One client, many layouts: every layout, ZeRO stage and precision trains like a plain loop in one process."""

import numpy as np
import pytest

from tests.support import reference, tiny
from tests.support.jobs import records
from tests.support.ranks import REPO, run_ranks

STEPS = 5
DRIFT = {"train": {"prox_mu": 0.1, "scaffold": True}}  # FedProx's and SCAFFOLD's corrections
VARIANTS = {
    "plain": {},
    "clip": {"deepspeed": {"clip": 0.2}},
    "clip_zero1": {"deepspeed": {"clip": 0.2, "zero": 1}},
    "clip_zero2": {"deepspeed": {"clip": 0.2, "zero": 2}},
    "accumulate": {"deepspeed": {"clip": 0.2, "accumulation": 2}},
    "accumulate_zero2": {"deepspeed": {"clip": 0.2, "accumulation": 2, "zero": 2}},
    "attention": {"attention": True},
    "few_candidates": {"candidates": 5, "pg": "token_weighted"},
    "token": {"pg": "token_weighted"},
    "token_clip": {"pg": "token_weighted", "deepspeed": {"clip": 0.2}},
    "token_zero1": {"pg": "token_weighted", "deepspeed": {"clip": 0.2, "zero": 1}},
    "token_zero2_accumulate": {"pg": "token_weighted", "deepspeed": {"clip": 0.2, "zero": 2, "accumulation": 2}},
    "mean": {"pg": "expert_mean"},
    "mean_zero2_accumulate": {"pg": "expert_mean", "deepspeed": {"clip": 0.2, "zero": 2, "accumulation": 2}},
    "oracle": {"pg": "dense_oracle"},
    "linearised": {"pg": "linearised"},
    "linearised_clip": {"pg": "linearised", "deepspeed": {"clip": 0.2}},
    "linearised_zero2_accumulate": {"pg": "linearised", "deepspeed": {"clip": 0.2, "zero": 2, "accumulation": 2}},
    "packed": {"packing": 24, "deepspeed": {"clip": 0.2}},
    "packed_token_zero1": {"packing": 24, "pg": "token_weighted", "deepspeed": {"clip": 0.2, "zero": 1}},
    "packed_mean_accumulate": {"packing": 24, "pg": "expert_mean", "deepspeed": {"clip": 0.2, "accumulation": 2}},
    "packed_linearised_zero2_accumulate": {
        "packing": 24,
        "pg": "linearised",
        "deepspeed": {"clip": 0.2, "zero": 2, "accumulation": 2},
    },
    "selection": {"pg": "token_weighted", "sections": {"dmr": {"modulate": "selection"}}},
    "learned_scale_zero1": {"rescale": "learned", "deepspeed": {"zero": 1}},
    "pruning": {"sections": {"lora": {"prune_penalty": 0.5}, "merge": {"rule": "hetlora"}}},
    "pruning_zero2": {
        "deepspeed": {"zero": 2},
        "sections": {"lora": {"prune_penalty": 0.5}, "merge": {"rule": "hetlora"}},
    },
    "drift": {"deepspeed": {"clip": 0.2}, "sections": DRIFT},
    "drift_learned_scale_zero1": {"rescale": "learned", "deepspeed": {"zero": 1}, "sections": DRIFT},
    "drift_token_zero2_accumulate": {
        "pg": "token_weighted",
        "deepspeed": {"clip": 0.2, "zero": 2, "accumulation": 2},
        "sections": DRIFT,
    },
    "bf16_drift": {"deepspeed": {"clip": 0.2, "bf16": True}, "sections": DRIFT},
    "bf16_drift_zero2": {"deepspeed": {"clip": 0.2, "bf16": True, "zero": 2}, "sections": DRIFT},
    "bf16": {"pg": "token_weighted", "deepspeed": {"clip": 0.2, "bf16": True}},
    "bf16_zero1": {"pg": "token_weighted", "deepspeed": {"clip": 0.2, "bf16": True, "zero": 1}},
    "bf16_linearised_zero2": {"pg": "linearised", "deepspeed": {"clip": 0.2, "bf16": True, "zero": 2}},
    "bf16_zero1_fp32_gradients": {
        "pg": "token_weighted",
        "deepspeed": {"clip": 0.2, "bf16": True, "zero": 1, "gradients": "fp32", "accumulation": 2},
    },
    "bf16_zero2": {"pg": "token_weighted", "deepspeed": {"clip": 0.2, "bf16": True, "zero": 2}},
    "nf4_clip": {"deepspeed": {"clip": 0.2}, "sections": {"model": {"quantize": "nf4"}}},
    "nf4_linearised": {"pg": "linearised", "sections": {"model": {"quantize": "nf4"}}},
    "int8_token_zero2_accumulate": {
        "pg": "token_weighted",
        "attention": True,
        "deepspeed": {"clip": 0.2, "zero": 2, "accumulation": 2},
        "sections": {"model": {"quantize": "int8"}},
    },
    "bf16_nf4_zero1_fp32_gradients": {
        "pg": "token_weighted",
        "deepspeed": {"clip": 0.2, "bf16": True, "zero": 1, "gradients": "fp32", "accumulation": 2},
        "sections": {"model": {"quantize": "nf4"}},
    },
}
DROPPING = {"pg": "token_weighted", "capacity_factor": 0.75, "deepspeed": {"clip": 0.2}}
DRAWING = {
    "pg": "linearised",
    "deepspeed": {"clip": 0.2, "accumulation": 2},
    "sections": {"pseudo_gradient": {"tokens_per_expert": 3}},
}
LOAD_BALANCING = {"aux": 1.0}
OF_LAYOUT = {"dropping": DROPPING, "drawing": DRAWING, "load_balancing": LOAD_BALANCING}
AGAIN = {"train": {"activation_checkpointing": True}}
COMPUTED_AGAIN = ["drawing", "attention", "token_zero1", "linearised_zero2_accumulate", "bf16_zero2"]
OF_LAYOUT |= {
    f"again {name}": change | {"sections": change.get("sections", {}) | AGAIN}
    for name, change in (VARIANTS | OF_LAYOUT).items()
    if name in COMPUTED_AGAIN
}
# accumulation of 2 needs 8 rows to split over ranks x 2 micro-batches, so all layouts have at most 4 ranks
LAYOUTS = [(1, 1), (2, 1), (4, 2)]  # ranks, expert parallelism
EXTENDED = [(1, 1), (2, 1)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "olmoe")


@pytest.fixture(scope="module")
def expected(model_path):
    """Return a function from a variant to the plain loop's losses, norms, final and first weights, squares; cached."""
    cache = {}

    def get(name):
        change = (VARIANTS | OF_LAYOUT)[name]
        # layout, ZeRO stage, accumulation, packing and precision must not matter: the reference has none
        plain = {key: value for key, value in change.items() if key != "packing"}
        plain |= {"deepspeed": {"clip": change.get("deepspeed", {}).get("clip", 0.0)}}
        key = repr(plain)
        if key not in cache:
            base = tiny.experiment(model_path, [{"budget": 0.5}])
            losses, norms, model, squares_LE2 = reference.train(tiny.variant(base, plain), STEPS)
            start = reference.whole_model(tiny.variant(base, plain))
            values = {n: p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
            first = {n: p.detach().numpy() for n, p in start.named_parameters() if p.requires_grad}
            cache[key] = np.array(losses), np.array(norms), values, first, squares_LE2.numpy()
        return cache[key]

    return get


@pytest.fixture(
    scope="module",
    params=[pytest.param(p, marks=[pytest.mark.extended] if p in EXTENDED else []) for p in LAYOUTS],
    ids=lambda p: f"ranks{p[0]}_ep{p[1]}",
)
def trained(request, model_path, tmp_path_factory):
    ranks, ep = request.param
    arguments = {
        "model_path": model_path,
        "ranks": ranks,
        "expert_parallel": ep,
        "variants": VARIANTS | OF_LAYOUT,
        "count": STEPS,
    }
    return ranks, ep, run_ranks(tmp_path_factory.mktemp("train"), ranks, "tests.support.scenarios:train", arguments)


@pytest.mark.parametrize("name", VARIANTS)
def test_layout_trains_like_a_plain_loop(name, trained, expected):
    ranks, ep, results = trained
    losses, norms, values, first, _ = expected(name)
    bf16 = name.startswith("bf16")
    for result in results:
        np.testing.assert_allclose(result[f"{name}/losses"], losses, rtol=0, atol=0.15 if bf16 else 1e-4)
        np.testing.assert_allclose(result[f"{name}/norms"], norms, rtol=0.2 if bf16 else 1e-3)
    experts, distance, without_pg = 8 // ep, 0.0, 0.0
    plain = expected("nf4_clip" if "nf4" in name else "clip")[2] if bf16 else values
    for key, value in values.items():
        held = [result[f"{name}/value/{key}"] for result in results]
        whole = np.concatenate(held[:ep]) if ".experts." in key else held[0]
        still = name == "selection" and key.endswith("phi")  # phi only chooses there: the server alone moves it
        assert (np.abs(whole - first[key]).max() > 1e-4) != still, f"{key} has not moved, or should not have"
        if not bf16:
            np.testing.assert_allclose(whole, value, atol=2e-3, err_msg=key)
        distance += np.square(whole - value).sum()
        without_pg += np.square(whole - plain[key]).sum()
        for rank in range(ranks):  # replicas stay equal to the bit
            twin = rank % ep if ".experts." in key else 0
            np.testing.assert_array_equal(held[rank], held[twin], err_msg=f"{key} on rank {rank}")
            assert ".experts." not in key or len(held[rank]) == experts
    learned = np.concatenate([v.ravel() for k, v in result.items() if k.startswith(f"{name}/value/")])
    fine = (learned.astype(np.float32).view(np.uint32) & 0xFFFF != 0).mean()  # bits that bf16 does not have
    assert fine > 0.5, "masters keep what bf16 weights cannot hold"
    # bf16 is too coarse to compare weights one by one; they must be clearly nearer to those with PG or corrections
    assert not bf16 or distance < 0.5 * without_pg, (distance, without_pg)


@pytest.mark.parametrize("name", [name for name, change in VARIANTS.items() if "pg" in change])
def test_squares_of_real_and_pseudo_gradients_are_those_of_the_plain_loop(name, trained, expected):
    """Summed over the ranks, each element of an expert's adapter counts once: in replicas and under ZeRO too."""
    ranks, _, results = trained
    squares_LE2, truth_LE2 = sum(result[f"{name}/squares"] for result in results), expected(name)[4]
    assert (truth_LE2 > 0).all()
    if name.startswith("bf16"):  # it sends some tokens to other experts: only the sums over experts are near
        squares_LE2, truth_LE2 = squares_LE2.sum((0, 1)), truth_LE2.sum((0, 1))
    np.testing.assert_allclose(squares_LE2, truth_LE2, rtol=0.3 if name.startswith("bf16") else 0.02)


@pytest.mark.parametrize("name, like", [("dropping", "token_clip"), ("drawing", "linearised_clip")])
def test_what_depends_on_the_layout_stays_near_the_loop(name, like, trained, expected):
    """Each rank drops and draws among its own tokens; replicas must agree nevertheless."""
    ranks, ep, results = trained
    losses = [result[f"{name}/losses"] for result in results]
    assert np.isfinite(losses).all() and all((other == losses[0]).all() for other in losses)
    difference = np.abs(losses[0] - expected(like)[0]).max()
    assert 1e-6 < difference < (0.6 if name == "dropping" else 0.05), "nothing was dropped or drawn"
    for key in (k for k in results[0] if k.startswith(f"{name}/value/")):
        for rank in range(ranks):
            twin = rank % ep if ".experts." in key else 0
            np.testing.assert_array_equal(results[rank][key], results[twin][key])


@pytest.mark.parametrize("name", COMPUTED_AGAIN)
def test_layers_computed_again_train_to_the_same_bits(name, trained):
    """Also where computing a layer again repeats its all-to-alls, and ZeRO reduces gradients meanwhile."""
    for result in trained[2]:
        keys = [key for key in result if key.startswith(f"{name}/")]
        assert len(keys) > 10
        for key in keys:
            np.testing.assert_array_equal(result[f"again {key}"], result[key], err_msg=key)


def test_load_balancing_loss(trained, expected):
    """The loss is a product of means over a rank's tokens: one rank trains like the loop, several stay near it."""
    ranks, _, results = trained
    losses = expected("load_balancing")[0]
    assert np.abs(losses - expected("plain")[0]).max() > 2e-3, "the coefficient does nothing"
    for result in results:
        tolerance = 1e-4 if ranks == 1 else 0.1
        np.testing.assert_allclose(result["load_balancing/losses"], losses, rtol=0, atol=tolerance)


def test_checkpoints_of_deepspeed_itself_are_refused(model_path, tmp_path):
    """Its own format has a module for each expert. Nothing is written, and a model's state can still be asked for."""
    arguments = {"model_path": model_path, "folder": str(tmp_path / "saved")}
    (answer,) = run_ranks(tmp_path, 1, "tests.support.scenarios:deepspeed_checkpoint", arguments)
    assert str(answer["answer"]).startswith("save_checkpoint: ") and "checkpoint.every" in str(answer["answer"])
    assert answer["files"] == 0 and answer["keys"] > 20


@pytest.mark.extended
def test_gradients_summed_in_fp32_are_not_those_summed_in_bf16(tmp_path):
    """Over 16 micro-batches: the sum of two is the same, rounded once. One step, so that nothing else differs."""
    common = ["train.rounds=1", "train.local_steps=1", "data.rows=200", "data.eval_rows=4", "evaluation.every=2"]
    common += ["clients=[{name: a, budget: 0.5, gradient_accumulation_steps: 16}]", "deepspeed.bf16.enabled=true"]
    common += ["method=topk", "checkpoint.every=0", "deepspeed.train_batch_size=16"]
    variants = {
        f"{dtype}{stage}": [
            f"deepspeed.zero_optimization.stage={stage}",
            *(["deepspeed.data_types.grad_accum_dtype=fp32"] if dtype == "fp32" else []),
        ]
        for stage in (1, 2)
        for dtype in ("bf16", "fp32")
    }
    config = str(REPO / "ds_configs" / "tiny.yaml")
    arguments = {"config": config, "overrides": common, "variants": variants, "folder": str(tmp_path)}
    run_ranks(tmp_path, 1, "tests.support.scenarios:layouts", arguments)
    norms = {name: records(tmp_path / name)[1]["metrics"]["gradient_norm/a"] for name in variants}
    for stage in (1, 2):
        assert norms[f"fp32{stage}"] != norms[f"bf16{stage}"]
        assert norms[f"fp32{stage}"] == pytest.approx(norms[f"bf16{stage}"], rel=0.01)
