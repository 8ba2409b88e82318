"""Test the merge of whole models under every rule, for clients that spread the same experts over 1, 2 and 4 ranks."""

import numpy as np
import pytest

from tests.support import reference, tiny
from tests.support.ranks import run_ranks

CLIENTS = [
    {"budget": 0.25, "share": 1.0},
    {"budget": 0.5, "share": 2.0, "ranks": 2, "expert_parallel": 2},
    {"budget": 1.0, "share": 5.0, "ranks": 4, "expert_parallel": 4},
]
DMR = {"dmr": {"enabled": True}}
VARIANTS = {
    "zero0": {"sections": DMR},
    "zero1": {"deepspeed": {"zero": 1}, "sections": DMR},
    "zero2": {"deepspeed": {"zero": 2}, "attention": True, "sections": DMR},
    "bf16": {"deepspeed": {"bf16": True}, "sections": DMR},
    "bf16_zero2": {"deepspeed": {"bf16": True, "zero": 2}, "sections": DMR},
    "activation": {"sections": {"merge": {"rule": "activation", "temperature": 2.0}}},
    "median": {"sections": {"merge": {"rule": "median"}}},
    "payload": {"sections": {"merge": {"payload": "bf16"}}},
    "broken": {"broken": [1, "hf.model.layers.0.mlp.deepspeed_moe.experts.up_lora_B"]},
}
FACTORS = {
    rule: {"ranks": [1, 2, 3], "attention": rule == "flora", "sections": {"merge": {"rule": rule}}}
    for rule in ("zero_pad", "hetlora", "flexlora", "florist", "flora")
} | {"flora_bf16": {"ranks": [1, 2, 3], "deepspeed": {"bf16": True}, "sections": {"merge": {"rule": "flora"}}}}
WEIGHTS = np.array([1, 2, 5]) / 8
PLACES = [  # of each rank: client, place in the client's group, size of the group
    (0, 0, 1),
    (1, 0, 2),
    (1, 1, 2),
    (2, 0, 4),
    (2, 1, 4),
    (2, 2, 4),
    (2, 3, 4),
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "olmoe")


@pytest.fixture(scope="module")
def merged(model_path, tmp_path_factory):
    arguments = {"model_path": model_path, "clients": CLIENTS, "variants": VARIANTS | FACTORS}
    return run_ranks(tmp_path_factory.mktemp("federate"), 7, "tests.support.scenarios:federate", arguments)


def values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([tiny.federated_value(key, client, shape).astype(np.float64) for client in range(3)])


def start(model_path: str) -> dict[str, np.ndarray]:
    """Return every parameter of a client of full LoRA rank before training."""
    model = reference.whole_model(tiny.experiment(model_path, [{"budget": 0.5}]))
    parameters = {name: p.detach() for name, p in model.named_parameters()} | reference.base_weights(model)
    return {name: value.numpy() for name, value in parameters.items()}


def expected_elements(name: str, key: str, shape: tuple[int, ...], at_start: np.ndarray) -> np.ndarray:
    """Return what an elementwise rule merges a parameter to, all experts stacked."""
    of_client = values(key, shape)
    weight = WEIGHTS.reshape(-1, *[1] * len(shape))
    layer = int(key.split("layers.")[1].split(".")[0])
    if name == "median" and not key.endswith("phi"):
        return np.median(of_client, axis=0)
    if name == "activation" and ".experts." in key:
        used = np.stack([tiny.usage(client)[layer].numpy() for client in range(3)])
        weight = (WEIGHTS[:, None] * used**2)[..., None, None]
        nobody = weight.sum(0) == 0
        return np.where(nobody, at_start, (weight * of_client).sum(0) / np.where(nobody, 1, weight.sum(0)))
    mean = np.average(of_client, axis=0, weights=WEIGHTS)
    if name == "broken" and "layers.0" in key and ".experts.up" in key:  # the first expert on each rank of client 1
        mean[[0, 4]] = np.average(of_client[[0, 2]][:, [0, 4]], axis=0, weights=[1, 5])
    if key.endswith("phi"):  # zeta 0.7, u* 0.4, eps 1e-6
        utilisation = np.average([tiny.usage(client)[layer] for client in range(3)], axis=0, weights=WEIGHTS)
        return 0.7 * mean + 0.3 * np.tanh(0.4 / (utilisation + 1e-6) - 1)
    return mean


@pytest.mark.parametrize("name", VARIANTS)
def test_merge_of_one_two_and_four_ranks_equals_numpy(name, merged, model_path):
    checked, at_start = 0, start(model_path)
    for result, (_, place, size) in zip(merged, PLACES, strict=True):
        for key, value in result.items():
            if not key.startswith(f"{name}/value/"):
                continue
            parameter = key.removeprefix(f"{name}/value/")
            expert = ".experts." in parameter
            shape = (8, *value.shape[1:]) if expert else value.shape
            expected = expected_elements(name, parameter, shape, at_start.get(parameter))
            if expert:
                expected = expected[place * 8 // size : (place + 1) * 8 // size]
            tolerance = 0.02 if name == "payload" else 2e-6
            np.testing.assert_allclose(value, expected, atol=tolerance, err_msg=f"{parameter}")
            checked += 1
    assert checked >= 7 * 14


def test_non_finite_units_are_named(merged):
    """The owner of a unit names it; the other owners refuse nothing."""
    refused = [list(result["broken/refused"]) for result in merged]
    assert sorted(sum(refused, [])) == ["1 layers.0.experts.0.up", "1 layers.0.experts.4.up"]
    assert all(not len(result["zero0/refused"]) for result in merged)


def projections(rule: str, result: dict, rank: int) -> dict[str, tuple[np.ndarray, list]]:
    """Return module -> (s B A that the client holds, the clients' factors [(A, s B), ...])."""
    modules = {}
    prefix = f"{rule}/value/"
    for key, A in result.items():
        if not (key.startswith(prefix) and key.endswith("lora_A") and ".experts." in key):
            continue
        B = result[key.removesuffix("A") + "B"]
        name = key.removeprefix(prefix)
        factors = []
        for client, r in enumerate((1, 2, 3)):
            shape_A, shape_B = (8, r, A.shape[2]), (8, B.shape[1], r)
            pair = [
                tiny.federated_value(n, client, s).astype(np.float64)
                for n, s in ((name, shape_A), (name.removesuffix("A") + "B", shape_B))
            ]
            factors.append((pair[0], pair[1] * 6.0 / r))
        modules[name] = 6.0 / rank * B.astype(np.float64) @ A, factors
    return modules


def direct(rule: str, factors: list, rank: int) -> np.ndarray:
    """Return Delta W that a rule gives a client of LoRA rank `rank`, [8, m, n], computed on whole m x n matrices."""
    deltas = np.stack([b @ a for a, b in factors])
    if rule in ("zero_pad", "hetlora"):
        weight_CE = WEIGHTS[:, None] * np.ones(8) if rule == "zero_pad" else np.linalg.norm(deltas, axis=(2, 3))
        A = np.stack([np.pad(a, ((0, 0), (0, 3 - a.shape[1]), (0, 0))) for a, _ in factors])
        B = np.stack([np.pad(b, ((0, 0), (0, 0), (0, 3 - b.shape[2]))) for _, b in factors])
        A, B = (np.einsum("ce,cexy->exy", weight_CE / weight_CE.sum(0), part) for part in (A, B))
        return B[..., :rank] @ A[:, :rank]
    U, S, Vh = np.linalg.svd(np.einsum("c,cexy->exy", WEIGHTS, deltas), full_matrices=False)
    square = S**2
    kept = np.cumsum(square, axis=1) - square < (0.9 if rule == "florist" else 1.0) * square.sum(axis=1, keepdims=True)
    S = np.where(kept & (np.arange(S.shape[1]) < rank), S, 0)
    return (U * S[:, None]) @ Vh


@pytest.mark.parametrize("rule", ["zero_pad", "hetlora", "flexlora", "florist"])
def test_factor_rules_equal_the_direct_computation(rule, merged):
    """Clients of LoRA rank 1, 2, 3 on 1, 2, 4 ranks: what each holds afterwards, against numpy with m x n matrices."""
    checked = 0
    for result, (client, place, size) in zip(merged, PLACES, strict=True):
        rank = client + 1
        for name, (held, factors) in projections(rule, result, rank).items():
            here = slice(place * 8 // size, (place + 1) * 8 // size)
            np.testing.assert_allclose(held, direct(rule, factors, rank)[here], atol=1e-4, err_msg=name)
            assert (np.linalg.matrix_rank(held, tol=1e-4) <= rank).all()
            checked += 1
    assert checked == 7 * 6


@pytest.mark.parametrize("rule", ["flora", "flora_bf16"])
def test_flora_merges_into_the_frozen_weights_of_every_rank(rule, merged, model_path):
    """W + sum w s B A, equal to the bit on every rank that holds the expert; the new adapters have B = 0."""
    at_start = start(model_path)
    seen: dict[tuple, np.ndarray] = {}
    for result, (client, place, size) in zip(merged, PLACES, strict=True):
        for name, (held, factors) in projections(rule, result, client + 1).items():
            weight = name.replace("_lora_A", "_weight")
            first = place * 8 // size
            base = result[f"{rule}/value/{weight}"]
            expected = at_start[weight] + sum(w * b @ a for w, (a, b) in zip(WEIGHTS, factors, strict=True))
            atol = 2e-5 if rule == "flora" else 0.02
            np.testing.assert_allclose(
                base, expected[first : first + len(base)], atol=atol, rtol=4e-3 if atol > 1e-3 else 0
            )
            assert (held == 0).all()
            A = result[f"{rule}/value/{name}"]
            assert (
                np.abs(A).max() > 0.01 and np.abs(A - at_start[name][first : first + len(A), : client + 1]).max() > 0.01
            )
            for expert in range(len(base)):
                for kind, value in (("weight", base[expert]), ("A", A[expert, :1])):
                    twin = seen.setdefault((name, kind, first + expert), value)
                    np.testing.assert_array_equal(value, twin)


@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_full_state_is_the_same_on_every_rank(name, merged):
    keys = [key for key in merged[0] if key.startswith(f"{name}/full/")]
    assert any(key.endswith("experts.down.lora_A") for key in keys)
    assert any("attention" in key for key in keys) == (name == "zero2")
    for key in keys:
        if "experts" in key:
            assert len(merged[0][key]) == 8
        for other in merged[1:]:
            np.testing.assert_array_equal(other[key], merged[0][key])


@pytest.mark.parametrize("zero", [0, 2])
def test_optimizer_state_is_reset_or_kept(zero, model_path, tmp_path):
    """If kept, the third round ends at step 9, if reset at step 3; first rounds are equal, third rounds differ."""
    (result,) = run_ranks(
        tmp_path, 1, "tests.support.scenarios:optimizer_state", {"model_path": model_path, "zero": zero}
    )
    assert set(result["keep/steps"]) == {9.0} and set(result["reset/steps"]) == {3.0}
    assert result["keep/nll"][0] == result["reset/nll"][0]
    assert result["keep/nll"][2] != result["reset/nll"][2]
    assert (result["keep/largest"] == 0).all()
    # Adam's first step is the learning rate, 0.01: of 4 rounds the third has half of it
    np.testing.assert_allclose(result["reset/moved"], [0.01, 0.005], rtol=0.02)
