"""Scalars of a round against values computed by hand: clients a and b, two views of the model, two tasks."""

import math

import numpy as np
import pytest
import torch

from ubsmoe_ds.client.engine import LocalStats
from ubsmoe_ds.client.evaluation import scores
from ubsmoe_ds.federation.metrics import (
    RoundSeconds,
    complete_seconds,
    evaluation_scalars,
    expert_scalars,
    merge_scalars,
    seconds_scalars,
    training_scalars,
    training_speed,
    turn_seconds,
)

STATS = [
    LocalStats(6.0, 3, 40, 5, 20, 8.0, 4, 0),
    LocalStats(1.0, 2, 10, 0, 30, 3.0, 2, 1),
]
SECONDS = [RoundSeconds(4.0, 1.0, 0.5, 0.25), RoundSeconds(2.0, 3.0, 0.75, 0.5)]


def test_evaluation_is_of_each_view_task_and_client():
    """Three clients in two views: loss is a mean over tokens, overall over clients, plain and by w_c."""
    sums = np.zeros((2, 2, 7))  # nll, tokens, correct, correct by tokens and by characters, choices, rows
    sums[0] = [[6.0, 3, 1, 2, 3, 4, 4], [2.0, 1, 1, 0, 0, 1, 1]]
    sums[1] = [[3.0, 3, 4, 4, 4, 4, 4], [1.0, 1, 0, 1, 1, 1, 1]]
    scalars = evaluation_scalars(
        ["a", "b", "c"], ["k2", "k8", "k2"], [0.5, 0.3, 0.2], ["x", "y"], sums, weighted_cv=0.3
    )
    assert scalars["eval_k2/loss_x"] == 2.0 and scalars["eval_k2/loss_y"] == 2.0 and scalars["eval_k2/loss_all"] == 2.0
    assert scalars["eval_k8/loss_all"] == 1.0 and scalars["eval_k8/accuracy_x"] == 1.0
    assert scalars["eval_k2/accuracy_all"] == pytest.approx(2 / 5)
    assert scalars["eval_k2/accuracy_norm_x"] == 0.5 and scalars["eval_k8/accuracy_norm_all"] == 1.0
    assert scalars["eval_k2/accuracy_chars_x"] == 0.75 and scalars["eval_k8/perplexity_all"] == math.e
    assert [scalars[f"eval_loss/{name}"] for name in "abc"] == [2.0, 1.0, 2.0]
    assert scalars["eval/loss"] == pytest.approx(5 / 3)
    assert scalars["eval/accuracy"] == pytest.approx((0.4 + 0.8 + 0.4) / 3)
    assert scalars["eval/loss_weighted"] == pytest.approx(0.5 * 2 + 0.3 * 1 + 0.2 * 2)
    assert scalars["eval/accuracy_weighted"] == pytest.approx(0.5 * 0.4 + 0.3 * 0.8 + 0.2 * 0.4)
    assert scalars["eval/utilisation_cv"] == 0.3


def test_rows_without_choices_have_no_accuracy():
    """A client's own rows replace the common ones: b has choices there, so only b has an accuracy, and no mean has."""
    sums = np.array([[[6.0, 3, 0, 0, 0, 0, 4]]])
    own_CF = np.array([[0.0] * 7, [2.0, 4, 1, 1, 2, 2, 2]])
    scalars = evaluation_scalars(["a", "b"], ["k2", "k2"], [0.5, 0.5], ["text"], sums, 0.0, own_CF)
    assert (scalars["eval_loss/a"], scalars["eval_loss/b"], scalars["eval/loss"]) == (2.0, 0.5, 1.25)
    assert scalars["eval_perplexity/a"] == pytest.approx(math.exp(2)) and scalars["eval_accuracy/b"] == 0.5
    assert [name for name in scalars if "accuracy" in name] == ["eval_accuracy/b"]
    assert scores(np.zeros(7)) == {} and scores(np.array([1e9, 1, 0, 0, 0, 0, 1]))["perplexity"] < math.inf


def test_training_scalars_sum_over_clients_and_divide_by_the_work_done():
    utilisation_LE = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    scalars = training_scalars(["a", "b"], STATS, np.array([3e6, 1e6]), utilisation_LE, [8, 2], [0, 7])
    assert (scalars["train_loss/a"], scalars["train_loss/b"], scalars["train/loss"]) == (2.0, 0.5, 7 / 5)
    assert (scalars["dropped_share/a"], scalars["dropped_share/b"], scalars["train/dropped_share"]) == (0.25, 0.0, 0.1)
    assert (scalars["gradient_norm/a"], scalars["gradient_norm/b"]) == (2.0, 1.5)
    assert (scalars["tokens/a"], scalars["steps/b"], scalars["bad_steps/b"], scalars["lora_rank/b"]) == (40, 2, 1, 2)
    assert (scalars["refused_units/a"], scalars["refused_units/b"]) == (0, 7)
    assert (scalars["megabytes_sent/a"], scalars["megabytes_sent/b"], scalars["exchange/megabytes"]) == (3.0, 1.0, 4.0)
    # CV of (0.5, 0.5) is 0, of (0.75, 0.25) it is 0.25 / 0.5, with the population's deviation
    assert scalars["utilisation/cv"] == pytest.approx(0.25)


def test_ratio_of_norms_and_starved_experts_by_hand():
    """Two layers of two experts. Client a starves the expert with 7 tokens; its others have 3 / 4, 12 / 6 and 0 / 5.

    Their median is 0.75; of b's 2 and 4 / 1 it is 3. Client c starves all of its experts: it has no ratio.
    """
    routed_CLE = torch.tensor([[[8, 7], [90, 20]], [[0, 3], [9, 8]], [[0, 0], [7, 7]]])
    real_CLE = torch.tensor([[[4.0, 0.1], [6.0, 5.0]], [[0.0, 0.1], [2.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]])
    pseudo_CLE = torch.tensor([[[3.0, 9.0], [12.0, 0.0]], [[9.0, 9.0], [4.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]])
    squares_CLE2 = torch.stack([real_CLE, pseudo_CLE], dim=-1).double().square()
    scalars = expert_scalars(["a", "b", "c"], routed_CLE, squares_CLE2)
    assert [scalars[f"starved_experts/{name}"] for name in "abc"] == [1, 2, 4]
    assert scalars["pseudo_over_real_norm/a"] == 0.75 and scalars["pseudo_over_real_norm/b"] == 3.0
    assert "pseudo_over_real_norm/c" not in scalars and scalars["train/pseudo_over_real_norm"] == 3.0
    without = expert_scalars(["a", "b", "c"], routed_CLE, None)
    assert without["starved_experts/b"] == 2 and without["train/pseudo_over_real_norm"] == 0.0


def test_the_merge_weighs_clients_otherwise_than_tokens_do():
    """Losses 2 (of 3 tokens) and 0.5 (of 2): 7 / 5 by tokens, 1.25 by clients, 2 / 4 + 0.5 * 3 / 4 as merged."""
    scalars = merge_scalars(["a", "b"], STATS, {"a": 10, "b": 30}, [0.25, 0.75], [6.0, 7.0], [1e-3, 5e-4])
    assert scalars["train/loss_weighted"] == pytest.approx(0.5 + 0.375)
    assert (scalars["rows/a"], scalars["rows/b"]) == (10, 30)
    assert (scalars["merge_weight/a"], scalars["merge_weight/b"]) == (0.25, 0.75)
    assert (scalars["update_norm/a"], scalars["update_norm/b"]) == (6.0, 7.0)
    assert (scalars["learning_rate/a"], scalars["learning_rate/b"]) == (1e-3, 5e-4)
    idle = LocalStats(*[0.0] * len(LocalStats._fields))
    alone = merge_scalars(["a", "b"], [STATS[0], idle], {"a": 10, "b": 30}, [1.0, 0.0], [6.0, 0.0], [1e-3, 1e-3])
    assert alone["train/loss_weighted"] == 2.0
    nobody = merge_scalars(["a", "b"], [idle, idle], {"a": 10, "b": 30}, [0.0, 0.0], [0.0, 0.0], [1e-3, 1e-3])
    assert "train/loss_weighted" not in nobody


def test_a_client_that_did_nothing_has_no_loss():
    idle = LocalStats(*[0.0] * len(LocalStats._fields))
    scalars = training_scalars(["a", "b"], [STATS[0], idle], np.zeros(2), torch.ones(1, 2), [8, 8], [0, 0])
    assert "train_loss/b" not in scalars and scalars["train/loss"] == scalars["train_loss/a"]
    assert all(map(math.isfinite, scalars.values()))
    assert "train/loss" not in training_scalars(["b"], [idle], np.zeros(1), torch.ones(1, 2), [8], [0])


def test_seconds_are_those_of_the_slowest_client():
    scalars = seconds_scalars(["a", "b"], STATS, SECONDS)
    assert (scalars["seconds/local"], scalars["seconds/wait"]) == (4.0, 3.0)
    assert (scalars["seconds/exchange"], scalars["seconds/merge"]) == (0.75, 0.5)
    assert (scalars["seconds_local/b"], scalars["seconds_merge/a"]) == (2.0, 0.25)
    assert scalars["seconds/round"] == 6.25  # b: 2 + 3 + 0.75 + 0.5, a: 5.75
    assert (scalars["tokens_per_second/a"], scalars["tokens_per_second/b"]) == (10.0, 5.0)
    assert scalars["train/tokens_per_second"] == 12.5  # all tokens in the time of the slowest
    complete_seconds(scalars, ["a", "b", "new"], np.array([0.5, 0.0, 0.125]), np.array([1.0, 2.0, 1.5]))
    assert [scalars[f"seconds_exchange/{name}"] for name in ("a", "b", "new")] == [1.0, 0.75, 0.125]
    assert scalars["seconds/exchange"] == 1.0 and scalars["seconds/evaluation"] == 2.0
    assert scalars["seconds_evaluation/a"] == 1.0 and scalars["seconds/round"] == 6.25 + 2.0 + 0.5


def test_speed_is_averaged_over_the_rounds_with_the_client():
    """Rounds of 40 tokens in 4 s and 20 tokens in 1 s are 12 tokens/s, not the mean of 10 and 20."""

    def record(number: int, steps: int, bad_steps: int, tokens: float, seconds: float) -> dict:
        metrics = {"steps/a": steps, "bad_steps/a": bad_steps, "tokens/a": tokens}
        return {"round": number, "metrics": metrics, "seconds": {"seconds_local/a": seconds}}

    before = {"round": 0, "metrics": {"eval/loss": 3.0}, "seconds": {}}
    away = {"round": 2, "metrics": {"tokens/b": 5.0}, "seconds": {"seconds_local/b": 1.0}}
    records = [before, record(1, 7, 1, 40.0, 4.0), away, record(3, 2, 0, 20.0, 1.0)]
    assert training_speed(records, "a") == {"tokens_per_second": 12.0, "seconds_per_step": 0.5}
    of_its_group = {"metrics": {}, "seconds": {"seconds_local/a": 3.0}}  # a round without a; its group has its name
    assert training_speed([*records, of_its_group], "a") == training_speed(records, "a")
    assert all(map(math.isnan, training_speed([before, record(1, 0, 0, 0.0, 0.5)], "a").values()))


def test_seconds_of_turns():
    """Group g0 gave both turns, 4 s and 2 s; g1 none, and waited. A round lasts as long as its longest group."""
    groups = [RoundSeconds(6.0, 0.5, 0.5, 0.25), RoundSeconds(0.0, 6.5, 0.5, 0.25)]
    scalars = turn_seconds(["a", "b"], STATS, [4.0, 2.0], ["g0", "g1"], groups)
    assert scalars["seconds_local/a"] == 4.0 and scalars["seconds_local/b"] == 2.0
    assert scalars["seconds_local/g0"] == scalars["seconds/local"] == 6.0
    assert scalars["seconds_wait/g1"] == scalars["seconds/wait"] == 6.5
    assert scalars["tokens_per_second/a"] == 10.0 and scalars["tokens_per_second/b"] == 5.0
    assert scalars["train/tokens_per_second"] == pytest.approx(50 / 6)
    assert scalars["seconds/round"] == 7.25
    complete_seconds(scalars, ["g0", "g1"], np.array([0.1, 0.2]), np.array([1.0, 2.0]))
    assert scalars["seconds_exchange/g1"] == pytest.approx(0.7) and scalars["seconds/round"] == pytest.approx(9.45)
