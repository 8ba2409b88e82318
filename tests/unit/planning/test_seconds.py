"""Seconds of a step and a round by hand, and the options that ask for them."""

from dataclasses import replace

import pytest
import torch

from launch.plan import parse, read_inputs
from tests.support.ranks import REPO
from tests.unit.planning.test_groups import LENGTHS, population
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.planning import device_rates, seconds
from ubsmoe_ds.planning.inputs import rank_setup
from ubsmoe_ds.planning.memory_model import FrozenBytes, States, TrainingBytes
from ubsmoe_ds.planning.plan import ClientPlan, group_exchange_bytes, plan
from ubsmoe_ds.planning.rank_setup import model_elements

TINY = REPO / "ds_configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def inputs():
    """Return the demo's inputs, of whose clients the last has two ranks; 5 steps a round, an evaluation every round."""
    return read_inputs(load_experiment(TINY, ["accelerator=cpu", "train.rounds=1", "train.local_steps=5"]))


FROZEN = {None: FrozenBytes(20.0, 80.0, 0.0), "nf4": FrozenBytes(20.0, 25.0, 9.0)}


@pytest.fixture
def by_hand(monkeypatch):
    """A rank has 100 bytes of weights, activations of 10 + 20, and 7 of optimiser state: 2 * (100 + 30 + 7) a step."""
    monkeypatch.setattr(seconds, "frozen_parts", lambda setup: FROZEN[setup.quantize])
    monkeypatch.setattr(seconds, "training_bytes", lambda _: TrainingBytes(10.0, 20.0))
    monkeypatch.setattr(seconds, "optimizer_bytes", lambda _: States(0.0, 7.0, 0.0, 0.0))


# a client of two ranks: 1,200 FLOPs and 50 bytes sent by each rank in a step; 80 bytes to other clients in a round
COST = ClientPlan({}, 1200.0, 6000.0, 50.0, sent_bytes=80.0, got_bytes=60.0, time=1.0)


@pytest.mark.parametrize(
    ("device", "step", "exchange"),
    [
        (seconds.Device(flops=100.0, bandwidth=1e9), 6.0, 0.0),  # 600 FLOPs a rank
        (seconds.Device(flops=1e9, bandwidth=100.0), 2.74, 0.0),  # 274 bytes
        (seconds.Device(flops=100.0, bandwidth=100.0), 6.0, 0.0),  # both at once
        (seconds.Device(flops=100.0, bandwidth=1e9, network=10.0), 6.0 + 5.0, 4.0),  # 50 bytes, then 40 of a rank
    ],
)
def test_a_step_and_a_round_by_hand(device, step, exchange, inputs, by_hand):
    """A round has 5 steps; its evaluation is no FLOPs here, but reads the weights once a batch."""
    found = seconds.seconds(inputs, [COST] * 4, device)[3]
    lengths, exp = inputs.row_lengths[3], inputs.exp
    batches = -(-lengths.eval_rows // (2 * exp.evaluation.batch_size))  # ranks of this view: its own two
    assert found.step == pytest.approx(step)
    assert found.round == pytest.approx(5 * step + batches * 100 / device.bandwidth + exchange)


def test_what_is_computed_again_or_accumulated_is_read_again(inputs, by_hand):
    setup = seconds.rank_setup(inputs, 0)
    assert seconds.step_traffic(setup) == 2 * (100 + 30 + 7)
    assert seconds.step_traffic(replace(setup, recomputing=True)) == 3 * 100 + 2 * (30 + 7)
    assert seconds.step_traffic(replace(setup, micro_batches=3)) == 3 * 2 * (100 + 30) + 2 * 7


def test_quantised_weights_are_written_and_read_as_whole_values(inputs, by_hand):
    """20 of embeddings, 25 of codes, and the 80 that these stand for twice; the buffer is no traffic of its own."""
    setup = seconds.rank_setup(inputs, 0)
    assert seconds.step_traffic(replace(setup, quantize="nf4")) == 2 * (20 + 25 + 2 * 80 + 30 + 7)


def test_faster_devices_make_shorter_rounds_and_lines_say_what_bounds(inputs):
    plans = plan(inputs)
    slow, fast = (seconds.seconds(inputs, plans, seconds.Device(flops, 1e12)) for flops in (1e10, 1e12))
    assert all(a.round > b.round > 0 for a, b in zip(slow, fast, strict=True))
    text = [*seconds.lines(inputs, plans, seconds.Device(1e10, 1e12, 1e9))]
    assert len(text) == 6 and "1e+09 bytes/s sent" in text[0] and all("arithmetic" in line for line in text[1:5])
    assert text[-1].endswith("that of laptop")
    assert "memory" in [*seconds.lines(inputs, plans, seconds.Device(1e15, 1e9))][1]


def test_a_device_is_measured(inputs, monkeypatch):
    """Only that the rates are possible ones: a shared machine has no others to promise."""
    monkeypatch.setattr(device_rates, "COPIED", 2**20)
    device = device_rates.device_of(parse(["--measure", "--network", "5e9"]), inputs)
    assert 1e6 < device.flops < 1e16 and 1e6 < device.bandwidth < 1e14 and device.network == 5e9
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"--measure: .* none is found here"):
            device_rates.measured(replace(inputs, on_cpu=False))


def test_stated_rates_are_taken(inputs):
    options = parse(["--device-flops", "2e14", "--device-bandwidth", "3e12"])
    assert device_rates.device_of(options, inputs) == seconds.Device(2e14, 3e12)
    assert device_rates.device_of(parse([]), inputs) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-flops", "1e12"], "--device-flops: goes with --device-bandwidth"),
        (["--measure", "--device-flops", "1e12"], "--measure: measures what"),
        (["--network", "1e9"], "--network: goes with"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        device_rates.check_options(parse(arguments))


def test_a_rate_is_a_number_above_0():
    with pytest.raises(UserError, match=r"--device-flops: '0' must be a number above 0"):
        parse(["--device-flops", "0", "--device-bandwidth", "1e12"])


def test_a_round_of_a_population_by_hand(monkeypatch):
    """Group g0 of one rank, g1 of two; 100 FLOP/s, 10 bytes/s, 10 steps a turn, two rounds.

    Turns on g0: client 0 takes 10 (100 / 100 + 10 / 10) = 20 s, 1: 30 s, 2: 50 s; on g1 0: 15 s, 2: 30 s.
    Round 1: g0 trains 0 and 1, 50 s, g1 trains 2, 30 s, so groups wait 1 - 40 / 50. Round 2: g0 50 s, g1 15 s.
    12 common evaluation rows on three ranks at 30 FLOPs: 1.2 s; g1 has 4 of client 1 for its two ranks, 0.6 s.
    """
    inputs = population([{"budget": 0.5}] * 3, [{}, {"ranks": 2}])
    lengths = [LENGTHS._replace(eval_rows=12 + own, own_rows=own) for own in (0, 4, 0)]
    inputs = replace(inputs, row_lengths=lengths)
    monkeypatch.setattr(seconds, "client_step_flops", lambda _, client, setup: [100.0, 200.0, 400.0][client])
    monkeypatch.setattr(seconds, "step_bytes", lambda setup: 10.0)
    monkeypatch.setattr(seconds, "evaluation_flops", lambda _, client, setup, rows: 30.0 * rows)
    monkeypatch.setattr(seconds, "group_exchange_bytes", lambda _, turns, group: {2: 5.0, 1: 20.0}[len(turns[group])])
    rounds = [[[0, 1], [2]], [[2], [0]]]
    found = seconds.round_seconds(inputs, rounds, [[], [1]], seconds.Device(100.0, 1e12, 10.0))
    assert found[:3] == pytest.approx((50.0, 1.2 + 0.6, 2.0)) and found.round == pytest.approx(53.8)
    assert found.waiting == pytest.approx((0.2 + 0.35) / 2) and found.longest == [2, 0]
    line = seconds.round_line(inputs, found, seconds.Device(100.0, 1e12))
    assert "a round takes 53.8 s" in line and "g0 is busy longest in 2 of 2 rounds" in line and "not counted" in line


@pytest.mark.parametrize(("rule", "sent"), [("fedavg", 1.0), ("median", 1.5)])
def test_bytes_of_a_group_in_the_exchange_by_hand(rule, sent):
    """Two groups of one rank, whose adapters of U elements each owns half. g0 has two turns, g1 one.

    Linear: each sends half of U of its sum and half of U merged, 4 U bytes. Else g0 sends half of its 2 U.
    """
    inputs = population([{"budget": 0.5}] * 3, [{"count": 2}], merge={"rule": rule})
    elements = model_elements(rank_setup(inputs, 0, 0))
    assert group_exchange_bytes(inputs, [[0, 1], [2]], 0) == 4 * sent * elements
