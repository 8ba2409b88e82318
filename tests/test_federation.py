"""Model-level merge of clients that hold the same experts on different numbers of ranks."""

import numpy as np
import pytest

from tests import tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
CLIENTS = [
    {"budget": 0.25, "share": 1.0},
    {"budget": 0.5, "share": 2.0, "ranks": 2, "expert_parallel": 2},
    {"budget": 1.0, "share": 5.0, "ranks": 4, "expert_parallel": 4},
]
VARIANTS = {
    "zero0": {},
    "zero1": {"deepspeed": {"zero": 1}},
    "zero2": {"deepspeed": {"zero": 2}, "attention": True},
    "bf16": {"deepspeed": {"bf16": True}},
    "bf16_zero2": {"deepspeed": {"bf16": True, "zero": 2}},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "olmoe")


@pytest.fixture(scope="module")
def merged(model_path, tmp_path_factory):
    arguments = {"model_path": model_path, "clients": CLIENTS, "variants": VARIANTS}
    return run_ranks(tmp_path_factory.mktemp("federate"), 7, "tests.scenarios:federate", arguments)


def mean(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights 1 : 2 : 5."""
    values = [tiny.federated_value(key, client, shape).astype(np.float64) for client in range(3)]
    return np.average(values, axis=0, weights=[1, 2, 5])


@pytest.mark.parametrize("name", VARIANTS)
def test_merge_of_one_two_and_four_ranks_equals_numpy(name, merged):
    utilisation = np.average(
        [np.abs(tiny.federated_value("utilisation", c, (2, 8))) for c in range(3)], axis=0, weights=[1, 2, 5]
    )
    places = [(0, 1), (0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4)]  # (place in the expert group, its size)
    checked = 0
    for result, (place, size) in zip(merged, places, strict=True):
        np.testing.assert_allclose(result[f"{name}/utilisation"], utilisation, atol=1e-6)
        for key, value in result.items():
            if not key.startswith(f"{name}/value/"):
                continue
            parameter = key.removeprefix(f"{name}/value/")
            if ".experts." in parameter:
                expected = mean(parameter, (8, *value.shape[1:]))[place * 8 // size : (place + 1) * 8 // size]
            else:
                expected = mean(parameter, value.shape)
            if parameter.endswith("phi"):  # zeta 0.7, u* 0.4, eps 1e-6
                layer = int(parameter.split("layers.")[1].split(".")[0])
                expected = 0.7 * expected + 0.3 * np.tanh(0.4 / (utilisation[layer] + 1e-6) - 1)
            np.testing.assert_allclose(value, expected, atol=2e-6, err_msg=f"{parameter}")
            checked += 1
    assert checked >= 7 * 16


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
    """Kept, the third round ends at step 9; reset, at step 3; both start alike and then part."""
    (result,) = run_ranks(tmp_path, 1, "tests.scenarios:optimizer_state", {"model_path": model_path, "zero": zero})
    assert set(result["keep/steps"]) == {9.0} and set(result["reset/steps"]) == {3.0}
    assert result["keep/nll"][0] == result["reset/nll"][0]
    assert result["keep/nll"][2] != result["reset/nll"][2]
    assert (result["keep/largest"] == 0).all()
