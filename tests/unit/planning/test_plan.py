"""Check planned memory and bytes against runs that were measured, and the plans that are refused."""

import csv
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from launch.plan import parse, read_inputs, read_slots
from tests.support.ranks import REPO
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client.engine import client_spec
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.models.conversion import load
from ubsmoe_ds.models.cost import ModelShape
from ubsmoe_ds.models.hub import BUILTIN_MODELS, INDEX
from ubsmoe_ds.moe.frozen import QuantizedExperts, Sizes, Workspace
from ubsmoe_ds.moe.quantized import QuantizedWeight
from ubsmoe_ds.planning.fitting import Fit, bytes_needed, check_fits, fit, parse_bytes
from ubsmoe_ds.planning.inputs import PlanInput, RowLengths, rank_setup
from ubsmoe_ds.planning.memory_model import frozen_bytes, memory_by_phase, optimizer_bytes, training_bytes
from ubsmoe_ds.planning.plan import plan, step_bytes, straggler
from ubsmoe_ds.planning.rank_setup import trained_elements
from ubsmoe_ds.planning.row_lengths import read_row_lengths

CONFIGS = REPO / "ds_configs"


TINY = CONFIGS / "tiny.yaml"


SMOLLM2_FIGURES = REPO / "results" / "plan" / "smollm2.csv"


SMOLLM2_SHAPE = ModelShape(  # launch/prepare.py split of SmolLM2-135M-Instruct
    layers=30,
    hidden=576,
    expert_width=84,
    num_experts=16,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    shared_width=192,
    tied_embeddings=True,
    lora_rank=8,
)


WITHIN = 0.15


@pytest.fixture(scope="module")
def inputs():
    """Return the demo's inputs, on the CPU."""
    return read_inputs(load_experiment(TINY, ["accelerator=cpu", "train.rounds=1"]))


def smollm2() -> list[tuple[PlanInput, int, float]]:
    """Return (inputs, client, measured bytes) of each client of the measured runs."""
    measured_clients = []
    with SMOLLM2_FIGURES.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in dict.fromkeys(row["run"] for row in rows):
        of_run = [row for row in rows if row["run"] == name]
        clients = ", ".join(f"{{name: {row['client']}, budget: {row['budget']}}}" for row in of_run)
        # config files only: the model's folder is not at hand, its sizes stand above
        exp = load_experiment(
            CONFIGS / "compare_smollm2.yaml",
            ["model.path=builtin:tiny_olmoe", "model.k_max=16", f"clients=[{clients}]", "deepspeed.train_batch_size=8"],
        )
        known = [field for field in RowLengths._fields if field in rows[0]]
        lengths = [RowLengths(**{field: json.loads(row[field]) for field in known}) for row in of_run]
        inputs = PlanInput(exp, SMOLLM2_SHAPE, lengths, on_cpu=True)
        measured_clients += [(inputs, number, 1e9 * float(row["measured_gb"])) for number, row in enumerate(of_run)]
    return measured_clients


def test_memory_of_smollm2_is_as_measured():
    measured_clients = smollm2()
    assert {rank_setup(inputs, number).k for inputs, number, _ in measured_clients} == {4, 8, 12, 16}
    for inputs, number, measured in measured_clients:
        client = inputs.exp.clients[number]
        assert bytes_needed(rank_setup(inputs, number)) == pytest.approx(measured, rel=WITHIN), client


def test_more_experts_ranks_and_zero_change_memory_as_they_should(inputs):
    setup = rank_setup(inputs, 3)
    assert bytes_needed(replace(setup, k=2)) < bytes_needed(setup)
    assert bytes_needed(replace(setup, capacity=0.5)) < bytes_needed(setup)
    big = replace(setup, shape=replace(setup.shape, hidden=2048, expert_width=1024, num_experts=64), on_cpu=False)
    alone, shared = replace(big, ranks=4, expert_parallel=1), replace(big, ranks=4, expert_parallel=4)
    experts = 3 * 3 * 64 * 2048 * 1024 * 4  # layers, projections, fp32
    assert bytes_needed(alone) - bytes_needed(shared) == pytest.approx(experts * 3 / 4, rel=0.25)
    trained = 3 * 64 * 3 * 8 * (2048 + 1024)
    kept = {stage: bytes_needed(replace(alone, zero_stage=stage, bf16=True, reduce_bucket=0)) for stage in (0, 1)}
    assert kept[0] - kept[1] == pytest.approx(12 * trained * 3 / 4, rel=0.3)


def test_memory_is_kept_for_what_has_a_backward_and_for_the_optimisers_own_values(inputs):
    """Of three layers with a dense one first, attention keeps for one; with LoRA on attention for all three."""
    setup = replace(rank_setup(inputs, 0), on_cpu=False)
    dense = replace(setup.shape, dense_layers=1, dense_width=64)
    kept = [training_bytes(replace(setup, shape=replace(dense, leading_dense=n))).tokens for n in (0, 1)]
    s = setup.shape
    attention = 4 * (2 * s.hidden + 4 * s.heads * s.head_dim + s.heads + 2 * s.heads * s.head_dim)  # with q and k norms
    assert kept[0] - kept[1] == (attention + 4 * 3 * 64) * setup.training.tokens
    adagrad = load_experiment(TINY, ["deepspeed.optimizer={type: Adagrad}"])
    assert rank_setup(replace(inputs, exp=adagrad), 0).moments == 1


def test_pseudo_gradients_dequantise_a_layers_down_projections(inputs):
    """In the preset's steps, 16 experts of 128 x 128 in fp32; other estimators need no frozen weights."""
    setup = replace(rank_setup(inputs, 3), quantize="nf4")
    assert setup.pooled_moments and setup.local_experts == 16
    one, other = (memory_by_phase(replace(setup, pooled_moments=moments)) for moments in (True, False))
    shape = setup.shape
    assert one["step"] - one["evaluate"] - other["step"] + other["evaluate"] == pytest.approx(
        4 * 16 * shape.hidden * shape.expert_width
    )


def test_gradients_that_are_added_up_in_fp32_are_counted(inputs):
    """Four bytes for each trained value under ZeRO 1, for half of them under ZeRO 2 with two ranks; bf16 keeps none."""
    for stage, share in ((1, 1), (2, 1 / 2)):
        keys = ["deepspeed.bf16.enabled=true", f"deepspeed.zero_optimization.stage={stage}"]
        in_bf16, in_fp32 = (
            rank_setup(replace(inputs, exp=load_experiment(TINY, [*keys, *more])), 3)
            for more in ([], ["deepspeed.data_types={grad_accum_dtype: fp32}"])
        )
        assert in_fp32.ranks == 2 and in_fp32.micro_batches == 1
        more = optimizer_bytes(in_fp32).first - optimizer_bytes(in_bf16).first
        assert more == 4 * share * trained_elements(in_fp32).total


def test_packed_batches_cost_their_tokens_and_a_mask(inputs):
    """The demo's rows are of about equal length, so few tokens are padding: never more than without packing."""
    exp = load_experiment(TINY, ["accelerator=cpu", "train.rounds=1", "data.packing=true"])
    packed = replace(inputs, exp=exp, row_lengths=read_row_lengths(exp))
    for number, (rows, sequences) in enumerate(zip(inputs.row_lengths, packed.row_lengths, strict=True)):
        assert rows.sequences == 1 and rows.mean_context == rows.mean_length
        assert sequences.mean_length < rows.mean_length < sequences.mean_context
        assert sequences.mean_answers == rows.mean_answers
        before, after = rank_setup(inputs, number), rank_setup(packed, number)
        assert after.training.tokens <= before.training.tokens and plan(packed)[number].step_flops > 0
        batch, kept = after.training, training_bytes(after).tokens - training_bytes(replace(after, packed=False)).tokens
        assert kept == (after.shape.layers - 1) * 4 * batch.rows * batch.length**2


def test_layers_computed_again_keep_their_inputs_alone(inputs):
    """Of the built-in model's three layers one is alive at a time: less than half with 24 such layers; FLOPs grow."""
    setup = replace(rank_setup(inputs, 0), on_cpu=False, drawn_tokens=0)
    deep = replace(setup, shape=replace(setup.shape, layers=24, vocab=2))
    kept, again = (training_bytes(replace(deep, recomputing=value)) for value in (False, True))
    assert sum(again) < sum(kept) / 2 and again.tokens > 24 * 4 * setup.shape.hidden * setup.training.tokens
    exp = inputs.exp.model_copy(
        update={"train": inputs.exp.train.model_copy(update={"activation_checkpointing": True})}
    )
    more, less = (plan(replace(inputs, exp=of))[0].step_flops for of in (exp, inputs.exp))
    # of frozen products a forward pass beside one forward and one backward, without a third of the experts'
    assert 1.2 < more / less < 1.4


@pytest.mark.parametrize("stored", ["weights", "index", "index without a head", "neither"])
def test_a_head_stored_beside_a_tied_embedding_is_counted(stored, inputs, tmp_path):
    """A run keeps both if they differ, whatever config.json says; the names tell that there are two."""
    folder = shutil.copytree(BUILTIN_MODELS["builtin:tiny_olmoe"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if stored != "weights":
        (folder / "model.safetensors").unlink()
    if "index" in stored:
        names = ["model.embed_tokens.weight", *(["lm_head.weight"] if stored == "index" else [])]
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "not_fetched.safetensors")}))
    few = ["accelerator=cpu", "train.rounds=1", "data.rows=40", "data.eval_rows=4"]
    tied = read_inputs(load_experiment(TINY, [*few, f"model.path={folder}"]))
    apart = stored in ("weights", "index")
    one = 4 * config["vocab_size"] * config["hidden_size"]
    missing = frozen_bytes(rank_setup(inputs, 0)) - frozen_bytes(rank_setup(tied, 0))
    assert missing == (0 if apart else one)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_frozen_weights_take_what_is_planned(quantize, bf16, inputs):
    """Bytes of the storages of the built-in model; the plan leaves norms out."""
    keys = [f"model.quantize={quantize or 'null'}", f"deepspeed.bf16.enabled={str(bf16).lower()}"]
    exp = load_experiment(TINY, keys)
    model = load(exp.weights_dir, client_spec(exp, exp.clients[3], 0), torch.bfloat16 if bf16 else torch.float32)
    planned = frozen_bytes(rank_setup(replace(inputs, exp=exp), 3))
    assert frozen_storage(model) == pytest.approx(planned, rel=0.005)
    # nothing of what was read is kept beside it
    assert quantize is None or not any(p.shape[-2:] == (128, 128) for p in model.parameters() if p.ndim > 1)


def frozen_storage(*modules: torch.nn.Module) -> int:
    """Return the bytes of all distinct storages but those of trained parameters, the workspace included."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers()) if not t.requires_grad]
    spaces = {m.workspace for top in modules for m in top.modules() if isinstance(m, QuantizedExperts)}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + sum(space.nbytes for space in spaces)


def test_quantised_a_rank_of_olmoes_layout_keeps_a_third(inputs):
    """OLMoE-1B-7B in nf4, all experts on a rank: storages of modules of its shapes, on a device without memory."""
    olmoe = {"layers": 16, "hidden": 2048, "expert_width": 1024, "num_experts": 64, "heads": 16, "kv_heads": 16}
    shape = ModelShape(**olmoe, head_dim=128, vocab=50304, lora_rank=8)
    with torch.device("meta"):
        sizes, workspace = Sizes(64, 1024, 2048, 8), Workspace()
        factors = {n: (torch.empty(64, 8, i), torch.empty(64, o, 8)) for n, (_, o, i) in sizes.projections.items()}
        layers = [QuantizedExperts(sizes, torch.bfloat16, "nf4", workspace) for _ in range(16)]
        for layer in layers:
            for opener in layer.openers(factors, 2.0):
                opener()
        linears = [QuantizedWeight("nf4", (2048, 2048), torch.bfloat16) for _ in range(16 * 4)]
        embeddings = torch.nn.Linear(2048, 2 * 50304, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        kept = frozen_storage(*layers, *linears, embeddings)
    setup = replace(rank_setup(inputs, 0), shape=shape, bf16=True)
    assert kept == pytest.approx(frozen_bytes(replace(setup, quantize="nf4")), rel=1e-3)
    assert kept < 0.35 * 2 * (16 * (64 * 3 * 2048 * 1024 + 4 * 2048**2) + 2 * 50304 * 2048)


def test_what_fits_is_the_most_that_fits(inputs):
    for number in range(4):
        memory = bytes_needed(replace(rank_setup(inputs, number), k=5)) * 1.0001
        result = fit(inputs, number, memory)
        assert result.k == 5 and result.fits_now == (inputs.exp.active_experts(inputs.exp.clients[number]) <= 5)
        assert bytes_needed(replace(rank_setup(inputs, number), k=6)) > memory


def test_remedies_really_fit(inputs):
    for number, memory in ((3, 0.567e9), (1, 0.577e9)):
        fits = [fit(inputs, n, memory) for n in range(4)]
        assert not fits[number].fits_now
        layout = fits[number].layout
        changed = inputs.changed(number, ranks=layout.ranks, expert_parallel=layout.expert_parallel)
        assert bytes_needed(rank_setup(changed, number)) <= memory and layout.accumulation == 1
        with pytest.raises(UserError, match=r"clients\.\d: '\w+' needs 0\.\d+ GB a rank .*there are 0\.5\d+ GB; \w+"):
            check_fits(inputs, fits, memory)


def test_a_capacity_that_keeps_all_tokens_is_called_null(inputs):
    """Under expert parallelism a large factor can take more memory than dropping nothing; YAML has no inf."""
    with pytest.raises(UserError, match=r"clients\.0\.capacity_factor=null fits, which keeps all tokens"):
        check_fits(inputs, [Fit(fits_now=False, k=2, capacity=math.inf, layout=None)], memory=0.3e9)


def test_remedies_use_only_the_hosts_that_a_client_names(inputs):
    """The laptop's host has one slot: it has no room for more ranks, though other hosts have."""
    pinned = inputs.changed(1, hosts=["small"])
    memory = 0.577e9
    assert fit(pinned, 1, memory, {"large": 8, "small": 2}).has_room
    assert not fit(pinned, 1, memory, {"large": 8, "small": 1}).has_room
    assert fit(inputs, 1, memory, {"large": 8, "small": 1}).has_room


def remedy(inputs, memory, slots=None):
    """Return the line that refuses a plan, without what is wrong."""
    with pytest.raises(UserError) as refused:
        check_fits(inputs, [fit(inputs, n, memory, slots) for n in range(len(inputs.exp.clients))], memory)
    return str(refused.value).partition(" GB; ")[2]


def large(inputs, clients, batch, accumulation, **lengths):
    """Return the demo's inputs on accelerators with other clients, and experts that outweigh all else."""
    exp = load_experiment(
        TINY,
        [
            "method=topk",
            f"clients=[{', '.join(clients)}]",
            f"deepspeed.train_batch_size={batch}",
            f"deepspeed.gradient_accumulation_steps={accumulation}",
            "deepspeed.zero_optimization={}",
        ],
    )
    shape = replace(inputs.shape, hidden=2048, expert_width=1024)
    return PlanInput(exp, shape, [inputs.row_lengths[0]._replace(**lengths)] * len(clients), on_cpu=False)


def test_more_ranks_than_the_accumulation_steps_allow_are_tried_with_fewer_steps(inputs):
    """8 rows in 8 steps are for one rank; two ranks, each with half of the experts, need 4 steps or fewer."""
    alone = large(inputs, ["{name: a, budget: 1}"], batch=8, accumulation=8)
    halves = alone.changed(0, ranks=2, expert_parallel=2).accumulating(4)
    memory = bytes_needed(rank_setup(halves, 0)) * 1.001
    assert bytes_needed(rank_setup(alone, 0)) > 1.1 * memory
    assert remedy(alone, memory).startswith(
        "clients.0.ranks=2 clients.0.expert_parallel=2 deepspeed.gradient_accumulation_steps=4 needs "
    )


def test_fewer_accumulation_steps_must_not_push_out_another_client(inputs):
    """The steps are those of all clients: with fewer, the other's larger micro-batches would no longer fit."""
    clients = ["{name: a, budget: 1}", "{name: b, budget: 0.125, ranks: 2, expert_parallel: 2}"]
    both = large(inputs, clients, batch=128, accumulation=64, length=100, eval_rows=1)
    changed = both.changed(0, ranks=4, expert_parallel=4).accumulating(32)
    memory = bytes_needed(rank_setup(both, 1)) * 1.001
    assert bytes_needed(rank_setup(changed, 0)) < memory < bytes_needed(rank_setup(changed, 1))
    assert fit(both, 0, memory).layout is None
    assert fit(both, 0, bytes_needed(rank_setup(changed, 1))).layout == (4, 4, 32)


def test_where_evaluation_is_fullest_a_smaller_batch_of_it_is_named(inputs):
    setting = large(inputs, ["{name: a, budget: 1}"], batch=8, accumulation=1, eval_answers=40_000.0)
    phases = memory_by_phase(rank_setup(setting, 0))
    memory = max(size for phase, size in phases.items() if phase != "evaluate") * 1.01
    assert phases["evaluate"] > 1.5 * memory
    text = remedy(setting, memory)
    assert text.startswith("evaluation.batch_size=")
    size = int(text.partition("=")[2].split()[0])
    needed = [bytes_needed(rank_setup(setting.evaluating(rows), 0)) for rows in (size, 2 * size)]
    assert needed[0] <= memory < needed[1]


def test_where_nothing_helps_alone_no_remedy_is_made_up(inputs):
    """Training is fullest at any batch, K and layout: a smaller evaluation batch would change nothing."""
    assert remedy(inputs, 0.3e9).startswith(
        "none of K, capacity, batches and number of ranks makes it fit alone; use larger devices"
    )


def test_ranks_that_the_hosts_have_no_room_for_are_no_remedy_but_are_told(inputs):
    alone = large(inputs, ["{name: a, budget: 0.125}"], batch=2, accumulation=1)
    memory = bytes_needed(rank_setup(alone.changed(0, ranks=2, expert_parallel=2), 0)) * 1.001
    assert remedy(alone, memory, {"host": 2}).startswith("clients.0.ranks=2 clients.0.expert_parallel=2 needs ")
    assert remedy(alone, memory, {"host": 1}) == (
        "clients.0.ranks=2 clients.0.expert_parallel=2 would fit, but the hosts have no room for it; use more"
    )


def test_bytes_inside_a_client_by_hand(inputs):
    """Dense and expert parameters in fp32 on four ranks: rings of four and of two, and the all-to-alls."""
    setup = replace(rank_setup(inputs, 3), ranks=4, expert_parallel=1, drawn_tokens=0, mixture=False)
    dense, experts = trained_elements(setup)
    assert step_bytes(replace(setup, ranks=1)) == 0
    assert step_bytes(setup) == 4 * 2 * 3 / 4 * (dense + experts)
    split = replace(setup, expert_parallel=2, capacity=1.0, micro_batches=2)
    dense, experts = trained_elements(split)
    tokens, hidden = split.training.tokens, split.shape.hidden
    slots = math.ceil(tokens * split.k / 16) * 16  # of each rank, half of them for the other
    moved = 3 * 2 * 4 * slots / 2 * hidden * 4  # layers, micro-batches, two there and two back, half, D, fp32
    assert step_bytes(split) == pytest.approx(4 * (2 * 3 / 4 * dense + 2 * 1 / 2 * experts) + moved)


def test_the_straggler_does_the_most_work_on_a_rank(inputs):
    plans = plan(inputs)
    slowest, over_fastest, over_median = straggler(plans)
    assert inputs.exp.clients[slowest].name == "laptop"  # K 4 on one rank; the server has K 8 on two
    assert over_fastest == pytest.approx(plans[1].round_flops / plans[0].round_flops)
    assert 1 < over_median < over_fastest and min(client.time for client in plans) == 1


@pytest.mark.parametrize(
    ("text", "expected"), [("80G", 80e9), ("80GiB", 80 * 2**30), ("512M", 512e6), ("1.5 gb", 1.5e9), ("2Ti", 2**41)]
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "80", "G", "-1G", "80Q", "0G", "1e3G", "٣G"])
def test_other_texts_are_refused_as_amounts_of_memory(text):
    with pytest.raises(UserError, match="--device-memory: .* is no amount of memory"):
        parse_bytes(text)


def test_hosts_are_called_what_the_config_calls_them():
    options = parse(["--hosts", "3", "--devices", "2"])
    assert read_slots(options, ["clinic", "campus", "clinic"]) == {"clinic": 2, "campus": 2, "host1": 2}
