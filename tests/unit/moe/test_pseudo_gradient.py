"""Pseudo-gradient estimators, moments and draws: by hand, and against loops over tokens."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from ubsmoe_ds.config.sections import PseudoGradientConfig
from ubsmoe_ds.moe import pseudo_gradient
from ubsmoe_ds.moe.estimators import ESTIMATORS
from ubsmoe_ds.moe.pseudo_gradient import (
    PROJECTIONS,
    Experts,
    ExpertTokens,
    GradientSums,
    Moments,
    TokenMixture,
    dense_oracle,
    draw_tokens,
    expert_mean,
    inactive_weight,
    linearised,
    token_weighted,
)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_row_names_a_function_of_its_form(name):
    row = ESTIMATORS[name]
    parameters = list(inspect.signature(getattr(pseudo_gradient, row.function)).parameters)
    assert parameters == (["sums"] if row.from_sums else ["tokens", "experts"])
    assert PseudoGradientConfig(estimator=name).estimator == name


def test_an_estimator_that_the_table_lacks_is_refused():
    with pytest.raises(ValueError, match="'mean' is no estimator; use one of none, expert_mean"):
        PseudoGradientConfig(estimator="mean")


def test_inactive_weight_by_hand():
    """rho 0.5, p = (0.1, 0.2, 0.3, 0.4), experts 2 and 3 active: (0.05, 0.1, 0, 0); p is not renormalised."""
    active = torch.tensor([[False, False, True, True]])
    weight = inactive_weight(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), active, 0.5)
    torch.testing.assert_close(weight, torch.tensor([[0.05, 0.1, 0.0, 0.0]]))


def test_expert_mean_by_hand():
    """Masses (0.2, 0, 0.6) over 0.5, gradients summing to 3: (1.2, 0, 3.6); nothing active gives zero, not NaN."""
    total = {name: (torch.full((1, 1), 3.0), torch.full((1, 1), 3.0)) for name in PROJECTIONS}
    result = expert_mean(GradientSums(torch.tensor([0.2, 0.0, 0.6]), torch.tensor(0.5), total))
    torch.testing.assert_close(result["up"][0].flatten(), torch.tensor([1.2, 0.0, 3.6]))
    nothing = expert_mean(GradientSums(torch.zeros(3), torch.tensor(0.0), total))
    assert all((g == 0).all() for pair in nothing.values() for g in pair)


def test_token_weighted_by_hand():
    """All sizes 1, one token, s = 2, c = 0.5, x = 3, delta = 5; A = 7, B = 11 everywhere; mixture (2, 17, 19).

    down: dB = 2 * 0.5 * 5 * (7 * 2) = 70, dA = 2 * 0.5 * (11 * 5) * 2 = 110
    gate: dB = 2 * 0.5 * 17 * (7 * 3) = 357, dA = 2 * 0.5 * (11 * 17) * 3 = 561; up with 19: 399 and 627.
    """
    ones = torch.ones(1, 1)
    lora = {name: (torch.full((1, 1, 1), 7.0), torch.full((1, 1, 1), 11.0)) for name in PROJECTIONS}
    mixture = TokenMixture(2 * ones, 17 * ones, 19 * ones)
    tokens = draw_tokens(3 * ones, 5 * ones, 0.5 * ones, mixture, None)
    result = token_weighted(tokens, Experts(lora, 2.0, {}))
    values = {name: tuple(g.item() for g in pair) for name, pair in result.items()}
    assert values == {"down": (110.0, 70.0), "gate": (561.0, 357.0), "up": (627.0, 399.0)}


def test_linearised_by_hand():
    """All sizes 1, one token, s = 2, c = 0.5, x = 3, delta = 5; A = 7, B = 11, W_down = 13; moments (2, 17, 19).

    down: dB = 2 * 0.5 * 5 * (7 * 2) = 70, dA = 2 * 0.5 * (11 * 5) * 2 = 110
    gate: dB = 2 * 0.5 * 17 * (13 * 5) * (7 * 3) = 23205, dA = 2 * 0.5 * (13 * 17 * 11) * 5 * 3 = 36465
    up, with 19 for 17: 25935 and 40755.
    """
    ones = torch.ones(1, 1)
    lora = {name: (torch.full((1, 1, 1), 7.0), torch.full((1, 1, 1), 11.0)) for name in PROJECTIONS}
    moments, base = Moments(2 * ones, 17 * ones, 19 * ones), {"down": torch.full((1, 1, 1), 13.0)}
    tokens = draw_tokens(3 * ones, 5 * ones, 0.5 * ones, None, None)
    result = linearised(tokens, Experts(lora, 2.0, base, moments))
    values = {name: tuple(g.item() for g in pair) for name, pair in result.items()}
    assert values == {"down": (110.0, 70.0), "gate": (36465.0, 23205.0), "up": (40755.0, 25935.0)}


def test_an_expert_without_moments_gets_nothing():
    lora = {n: (torch.randn(2, 1, 3), torch.randn(2, 3, 1)) for n in PROJECTIONS}
    zero = Moments(*torch.zeros(3, 2, 3))
    experts = Experts(lora, 1.0, {"down": torch.randn(2, 3, 3)}, zero)
    tokens = ExpertTokens(*torch.randn(2, 2, 4, 3))
    assert all((g == 0).all() for pair in linearised(tokens, experts).values() for g in pair)


def test_draws_by_hand():
    """||delta|| = 0, 3, 4; c = 1, 0.5, 1 for the first expert, 0, 1, 0 for the second, 0 for the third.

    Masses are 0, 1.5, 4 and 0, 3, 0: a drawn gradient is as long as their sum over the draws, 5.5 / 2 and 3 / 2.
    """
    torch.manual_seed(0)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    delta = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    c = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [1.0, 0.0, 0.0]])
    twice = 0
    for _ in range(200):
        tokens = draw_tokens(x, delta, c, None, 2)
        assert tokens.x_END.shape == tokens.delta_END.shape == (3, 2, 2)
        torch.testing.assert_close(tokens.delta_END.norm(dim=2), torch.tensor([[2.75] * 2, [1.5] * 2, [0.0] * 2]))
        assert tokens.x_END[1, :, 0].tolist() == [2.0, 2.0]
        for x_D, delta_D in zip(tokens.x_END[0], tokens.delta_END[0], strict=True):
            assert torch.equal(delta_D != 0, delta[int(x_D[0]) - 1] != 0)  # the gradient is the token's own
        twice += int((tokens.x_END[0, :, 0] == 2).sum())
    assert 80 < twice < 140  # 400 * 1.5 / 5.5 = 109


def test_sums_over_drawn_tokens_are_unbiased():
    """The mean over many draws of 4 of 16 tokens equals the sum over all tokens, for every part."""
    torch.manual_seed(0)
    delta = torch.randn(16, 3) * torch.logspace(-1, 1, 16).unsqueeze(1)
    x, c, mixture = torch.randn(16, 3), torch.rand(16, 2), TokenMixture(*torch.randn(3, 16, 3))

    def products(tokens):
        pairs = [(tokens.x_END, tokens.delta_END), (tokens.hidden_ENF, tokens.delta_END)]
        pairs += [(tokens.x_END, tokens.gate_ENF), (tokens.x_END, tokens.up_ENF)]
        return torch.stack([a.mT @ b for a, b in pairs])

    exact = products(draw_tokens(x, delta, c, mixture, None))
    loops = [torch.einsum("td,tf,te->edf", x, other, c) for other in (delta, mixture.gate_TF)]
    torch.testing.assert_close(exact[[0, 2]], torch.stack(loops))
    draws = torch.stack([products(draw_tokens(x, delta, c, mixture, 4)) for _ in range(4000)])
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5)  # in standard errors
    assert float(error.max()) < 4.5
    assert float(draws.std(0).min()) > 0


def test_a_gradient_that_is_not_finite_does_not_end_the_draw():
    """The real gradient is not finite either, so the step is skipped."""
    delta = torch.tensor([[1.0], [float("nan")]])
    assert draw_tokens(torch.ones(2, 1), delta, torch.ones(2, 1), None, 3).delta_END.isfinite().all()
    assert draw_tokens(torch.ones(2, 1), delta, torch.ones(2, 1), None, None).delta_END.isnan().any()


def test_dense_oracle_completes_the_dense_gradient():
    """K = 1 plus the oracle with rho = 1 is autograd's gradient of running every expert with its softmax weight."""
    torch.manual_seed(0)
    tokens, width, hidden, experts, rank, scaling = 5, 4, 3, 4, 2, 0.5
    sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    base = {name: torch.randn(experts, *size) for name, size in sizes.items()}
    lora = {
        name: (torch.randn(experts, rank, i).requires_grad_(), torch.randn(experts, o, rank).requires_grad_())
        for name, (o, i) in sizes.items()
    }
    x, delta = torch.randn(tokens, width), torch.randn(tokens, width)
    p = torch.randn(tokens, experts).softmax(-1)
    active = F.one_hot(p.argmax(-1), experts).bool()

    def loss(c_TE: torch.Tensor) -> torch.Tensor:
        """sum_t delta_t . sum_e c_te expert_e(x_t), token by token and expert by expert."""
        total = torch.zeros(())
        for t in range(tokens):
            for e in range(experts):
                w = {name: base[name][e] + scaling * B[e] @ A[e] for name, (A, B) in lora.items()}
                h = w["gate"] @ x[t]
                total = total + c_TE[t, e] * (delta[t] @ (w["down"] @ (h * torch.sigmoid(h) * (w["up"] @ x[t]))))
        return total

    factors = [factor for name in PROJECTIONS for factor in lora[name]]
    dense, at_k1 = (torch.autograd.grad(loss(c), factors) for c in (p, p * active))
    drawn = draw_tokens(x, delta, inactive_weight(p, active, 1.0), None, None)
    result = dense_oracle(drawn, Experts(lora, scaling, base))
    rest = [gradient for name in PROJECTIONS for gradient in result[name]]
    for whole, active, inactive in zip(dense, at_k1, rest, strict=True):
        torch.testing.assert_close(active + inactive, whole, atol=1e-4, rtol=1e-4)
