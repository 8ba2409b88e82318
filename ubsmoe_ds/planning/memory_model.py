"""How much memory a rank needs at most, analytic: what is alive in each phase of a run. Pure functions on numbers.

The peak is the largest phase, not the sum of all. Where the model runs on the CPU everything is in one memory; on an
accelerator its own memory holds weights, optimiser and activations, and the exchange and checkpoints are the host's.
The code that allocates what is counted here: models/conversion.py, moe/expert_mlp.py, moe/gate.py, moe/collector.py,
gradients.py, federation/units.py and exchange.py, checkpoint.py, and DeepSpeed's optimisers.

Shapes in names of sizes: tokens T, rows of experts N (routes, or slots under expert parallelism), D, F, E, K, R, V.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ubsmoe_ds.planning.rank_load import FP32, RankLoad, at_rank, expert_rows, model_elements, trained_elements

INT64 = 8  # bytes
ALIGNMENT = 8  # elements, see moe/expert_mlp.py
MAPPED = 64 * 2**20  # bytes of a model's files that are mapped at a time, see models/checkpoint.py
CPU_PROCESS = 445e6  # Python, torch, deepspeed, transformers and MPI, resident before rows and model are read; measured
CPU_KERNELS = 60e6  # code and workspaces that the first steps bring in; measured
CPU_TOKEN_SLACK = 2.1  # freed tensors leave gaps in glibc's heap, which stay resident: of tensors of a step's tokens,
CPU_ROW_SLACK = 1.0  # and of the experts' rows; fitted to runs of the built-in model and of SmolLM2, see results/plan
CPU_FLAT_COPIES = 3  # of what a rank holds, around a merge: too large for those gaps; fitted likewise
CPU_ROW_TEXT, CPU_VOCABULARY = 5, 700  # bytes held for a byte of the rows' text, and for a word of the tokenizer
CUDA_PROCESS = 1.0e9  # context, cuBLAS and NCCL: an assumption, not measured
CUDA_SLACK = 1.1  # gaps of torch's allocator: an assumption, not measured
REDUCE_BUCKET = 5e8  # elements of ZeRO's gradient buffer, DeepSpeed's default


def phases(load: RankLoad) -> dict[str, float]:
    """Bytes alive at most in each phase of a run, the process itself included.

    The timing of steps at K_max, when all is done, takes only what is left (federation/outcome.py) and does not count.
    """
    trained, states = trained_elements(load), optimizer_bytes(load)
    process, weights = _process_bytes(load), frozen_bytes(load)
    adapters = FP32 * trained.experts * (load.estimator != "none")  # pseudo-gradients, kept until the next step
    moments = FP32 * 6 * load.sparse_layers * load.local_experts * load.shape.expert_width
    held = process + weights + states.kept + adapters + moments * (load.estimator == "linearised")
    if load.on_cpu:
        held += CPU_KERNELS + FP32 * trained.total + _shared_memory_bytes(load)  # the shared state, and what is sent
    training = training_bytes(load)
    token_slack, row_slack = (CPU_TOKEN_SLACK, CPU_ROW_SLACK) if load.on_cpu else (CUDA_SLACK, CUDA_SLACK)
    found = {
        "load": process + weights + states.weights + (min(MAPPED, weights) if load.on_cpu else 0),
        "train": held + token_slack * training.tokens + row_slack * training.rows + states.first,
        "step": held + states.step + adapters,
        "evaluate": held + evaluation_bytes(load),
    }
    if load.on_cpu:
        found["exchange"] = found["train"] + CPU_FLAT_COPIES * FP32 * trained.total
        found["merge"] = held + exchange_bytes(load)
        found["save"] = held + checkpoint_bytes(load)
    return found


def _process_bytes(load: RankLoad) -> float:
    """Before a model is read; rows and tokenizer are in host memory."""
    if not load.on_cpu:
        return CUDA_PROCESS
    return CPU_PROCESS + CPU_ROW_TEXT * load.text_bytes + CPU_VOCABULARY * load.shape.vocab


def _shared_memory_bytes(load: RankLoad) -> float:
    """What the rank sends in a merge, and what it reads of others; messages take as much."""
    held = trained_elements(load).total
    owned, merged = (model_elements(one) / load.world for one in (load, at_rank(load, load.reply_rank)))
    sent = held if load.reducible else max(held, merged * load.receivers)
    return FP32 * (sent + owned * (load.world - 1))


def frozen_bytes(load: RankLoad) -> float:
    """Weights that are not trained; experts with the room for their scaled LoRA factors beside them."""
    s = load.shape
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    embeddings = s.vocab * s.hidden * (1 if s.tied_embeddings else 2)
    attention = s.layers * (2 * s.hidden * q + 2 * s.hidden * kv)
    dense = s.dense_layers * 3 * s.hidden * s.dense_width
    shared = load.sparse_layers * 3 * s.hidden * s.shared_width
    router = 0 if load.router else load.sparse_layers * s.num_experts * s.hidden
    gate_up = _aligned(2 * s.expert_width + 2 * s.lora_rank) * _aligned(s.hidden + 2 * s.lora_rank)
    down = _aligned(s.hidden + s.lora_rank) * _aligned(s.expert_width + s.lora_rank)
    experts = load.sparse_layers * load.local_experts * (gate_up + down)
    return load.width * (embeddings + attention + dense + shared + router + experts)


class States(NamedTuple):
    """Bytes around the optimiser of one rank.

    weights: the model's own trainable weights; kept: these, masters and moments
    first: gradients of earlier micro-batches; step: gradients and what the step makes of them
    """

    weights: float
    kept: float
    first: float
    step: float


def optimizer_bytes(load: RankLoad) -> States:
    """As DeepSpeed keeps them: ZeRO 1 and 2 spread masters and moments over the ranks that hold the same parameters."""
    dense, experts = trained_elements(load)
    total, width = dense + experts, load.width
    weights = width * total
    accumulated = width * total if load.micro_batches > 1 else 0
    if load.zero_stage == 0:
        masters = FP32 * total if load.bf16 else 0  # in fp32 the weights are the masters
        gradients = width * total + masters + width * max(dense, experts)  # the last: flat, for the sum over ranks
        return States(weights, weights + masters + FP32 * load.moments * total, accumulated, gradients)
    part = dense / load.ranks + experts / (load.ranks / load.expert_parallel)
    bucket = min(load.reduce_bucket, total) if load.on_cpu else load.reduce_bucket  # a CPU's pages count once touched
    step = width * total + FP32 * part + width * bucket
    return States(weights, weights + FP32 * (1 + load.moments) * part, accumulated + width * bucket, step)


class TrainingBytes(NamedTuple):
    """Alive at the fullest moment of a step, by what they grow with."""

    tokens: float
    rows: float


def training_bytes(load: RankLoad) -> TrainingBytes:
    """Forward and backward of one micro-batch: what all layers keep, and the fullest moment of the last one."""
    s, batch = load.shape, load.training
    rows = expert_rows(load, batch.tokens, load.k, dropping=True)
    layers = s.layers if s.lora_attention else s.layers - 1  # before the first adapter nothing is kept
    tokens = layers * _kept_by_attention(load) + load.sparse_layers * _kept_of_tokens(load)
    tokens += s.dense_layers * 3 * s.dense_width * load.width * batch.tokens
    tokens += FP32 * 5 * s.hidden * batch.tokens  # the last norm, and gradients on their way through a layer
    backward = rows * load.width * (2 * s.hidden + 4 * s.expert_width + 6 * s.lora_rank)
    backward += rows * load.width * s.hidden * (load.expert_parallel > 1)
    fullest = max(_head_bytes(load, batch.answers, training=True), backward)
    return TrainingBytes(tokens + _drawn_bytes(load), load.sparse_layers * _kept_of_rows(load, rows) + fullest)


def _kept_by_attention(load: RankLoad) -> float:
    """Of one layer for backward: inputs of two norms in fp32, of q and k norms, q k v, attention's output."""
    s = load.shape
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    token = FP32 * 2 * s.hidden + load.width * (2 * q + 2 * kv) + FP32 * s.heads
    if s.normed_queries:
        token += FP32 * (q + kv)
    if s.lora_attention:
        token += load.width * (s.hidden + q) + FP32 * 4 * s.lora_rank
    return token * load.training.tokens


def _kept_of_tokens(load: RankLoad) -> float:
    """Of one block for backward: its input, the router's tables, what the shared expert makes."""
    s, k = load.shape, load.k
    token = load.width * s.hidden + FP32 * s.hidden * (load.bf16 and load.router)
    token += s.num_experts * (3 * FP32 + 2) + k * (5 * INT64 + 5 * FP32)
    token += load.width * (3 * s.shared_width + s.hidden) * (s.shared_width > 0)
    return token * load.training.tokens


def _kept_of_rows(load: RankLoad, rows: int) -> float:
    """Of one block for backward: what the experts made of their rows; what came from other ranks and went back."""
    s = load.shape
    kept = (load.width * (3 * s.expert_width + 3 * s.lora_rank) + 2 * INT64) * rows
    if load.expert_parallel > 1:
        kept += load.width * s.hidden * (rows + load.k * load.training.tokens)
    return kept


def _forward_rows_bytes(load: RankLoad, rows: int) -> float:
    """One layer's experts at work, nothing kept."""
    s = load.shape
    row = _aligned(s.hidden + 2 * s.lora_rank) + 2 * s.expert_width + _aligned(s.expert_width + s.lora_rank)
    row += s.expert_width + s.hidden + s.hidden * 2 * (load.expert_parallel > 1)
    return load.width * row * rows + INT64 * 3 * rows


def _head_bytes(load: RankLoad, answers: int, training: bool) -> float:
    """Logits and what is made of them: log-probabilities, and in training their two gradients in place of logits."""
    logits = FP32 * load.shape.vocab * answers
    cast = load.width * load.shape.vocab * answers * load.bf16
    return (3 if training else 2) * logits + cast


def _drawn_bytes(load: RankLoad) -> float:
    """Tokens that pseudo-gradients have drawn in a step: inputs, gradients, and hidden units if the estimator asks."""
    if load.estimator in ("none", "expert_mean"):
        return 0
    s, mixture = load.shape, load.estimator == "token_weighted"
    count = load.training.tokens if load.tokens_per_expert is None else load.tokens_per_expert
    known = 2 * s.hidden + 3 * s.expert_width * mixture
    return load.sparse_layers * load.micro_batches * s.num_experts * count * known * load.width


def evaluation_bytes(load: RankLoad) -> float:
    """One batch of evaluation rows without gradients; nothing is dropped."""
    s, batch = load.shape, load.evaluation
    rows = expert_rows(load, batch.tokens, load.k, dropping=False)
    layer = _forward_rows_bytes(load, rows) + load.width * 4 * s.hidden * batch.tokens
    shared = load.width * 3 * max(s.shared_width, s.dense_width) * batch.tokens
    mask = batch.rows * batch.length**2 * (load.width * 2 + 4)
    return max(layer, shared, _head_bytes(load, batch.answers, training=False)) + mask


def exchange_bytes(load: RankLoad) -> float:
    """Host memory around a merge beside what is sent: the update, and all clients' of the owned units."""
    reply = at_rank(load, load.reply_rank)
    held, got = trained_elements(load).total, trained_elements(reply).total
    owned, merged = (model_elements(one) / load.world for one in (load, reply))
    if load.reducible:
        return FP32 * (4 * held + owned)
    return FP32 * (2 * held + got + load.clients * (2 * owned + merged))


def checkpoint_bytes(load: RankLoad) -> float:
    """Host memory while a checkpoint or an adapter is written: copies of what is saved, then as bytes of a file."""
    total = trained_elements(load).total
    own = (1 + load.moments) * (total if load.zero_stage == 0 else total / load.ranks) + total
    return FP32 * max(2 * own, 4 * model_elements(load))


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def peak(found: Mapping[str, float]) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    return max(found.items(), key=lambda item: item[1])
