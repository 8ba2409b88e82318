"""Predict the FLOPs of a client's turn and of its own evaluation, which schedules go by. Pure functions."""

from collections.abc import Mapping, Sequence

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.models.cost import ModelShape, flops_per_token, step_flops


def turn_flops(exp: Experiment, shape: ModelShape, client: int, rows: int, tokens: int) -> float:
    """Return the FLOPs of a client's local steps in a round, by the mean length of its rows.

    Args:
        exp: the experiment.
        shape: of the model.
        client: its number.
        rows, tokens: its training rows, and their tokens.
    """
    config = exp.clients[client]
    batch, length = exp.settings(config).train_batch_size, _mean_length(rows, tokens)
    step = step_flops(shape, exp.active_experts(config), batch * length, length, batch, router=exp.router.trainable)
    return step * exp.local_steps(config, rows)


def own_evaluation_flops(exp: Experiment, shape: ModelShape, client: int, rows: int, tokens: int) -> float:
    """Return the FLOPs of an evaluation on a client's own evaluation rows; 0 if it has none.

    Args:
        exp, shape, client: as in `turn_flops`.
        rows, tokens: its own evaluation rows, and their tokens with all options.
    """
    k = exp.active_experts(exp.clients[client])
    return tokens * flops_per_token(shape, k, _mean_length(rows, tokens))


def on_groups(exp: Experiment, flops_C: Sequence[float], clients: Sequence[int]) -> dict[int, Mapping[int, float]]:
    """Return, for each of the clients, FLOPs a rank on each group that may train it."""
    return {
        client: {group: flops_C[client] / exp.trainers[group].ranks for group in exp.allowed_groups(client)}
        for client in clients
    }


def _mean_length(rows: int, tokens: int) -> int:
    return max(1, round(tokens / max(rows, 1)))
