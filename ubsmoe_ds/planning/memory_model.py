"""Estimate the peak memory of a rank: the bytes alive in each phase of a run. Pure functions on numbers.

The peak is the largest phase, not the sum of all. On the CPU everything is in one memory. An accelerator's memory holds
weights, optimiser and activations; the exchange and checkpoints are then in the host's memory.
The code that allocates what is counted here: models/conversion.py, moe/expert_mlp.py, moe/gate.py, moe/collector.py,
client/gradients.py, aggregation/units.py, aggregation/exchange.py, checkpoint/storage.py, and DeepSpeed's optimisers.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ubsmoe_ds.planning.rank_setup import FP32, RankSetup, expert_rows, model_elements, trained_elements, with_lora_rank

INT64 = 8  # bytes
ALIGNMENT = 8  # elements, see moe/expert_mlp.py
MAPPED = 64 * 2**20  # bytes of a model's files that are mapped at a time, see models/weights.py
# measured: Python, torch, deepspeed, transformers and MPI, resident before rows and model are read
CPU_PROCESS = 445e6
CPU_KERNELS = 60e6  # measured: code and workspaces that the first steps load
# fitted to runs of the built-in model and of SmolLM2, see results/plan: freed tensors leave gaps in glibc's heap, which
# stay resident. Factors on the tensors of a step's tokens and of the experts' rows, and copies of what a rank holds
# around a merge, which are too large for those gaps
CPU_TOKEN_SLACK, CPU_ROW_SLACK, CPU_FLAT_COPIES = 2.1, 1.0, 3
BLOCK, PIECE, GROUP = 64, 2**20, 2**24  # elements, see moe/quantized.py
# measured: bytes that the library takes when loaded, and beside a piece that it quantises
CPU_LIBRARY, CPU_QUANTIZING = 46e6, 16 * PIECE
CPU_ROW_TEXT, CPU_VOCABULARY = 5, 700  # bytes held for a byte of the rows' text, and for a word of the tokenizer
CUDA_PROCESS = 1.0e9  # context, cuBLAS and NCCL: an assumption, not measured
CUDA_SLACK = 1.1  # gaps of torch's allocator: an assumption, not measured


def memory_by_phase(setup: RankSetup) -> dict[str, float]:
    """Return the bytes alive at most in each phase of a run, the process itself included."""
    trained, states = trained_elements(setup), optimizer_bytes(setup)
    process, weights = _process_bytes(setup), frozen_bytes(setup)
    adapters = FP32 * trained.experts * setup.pseudo_gradients  # pseudo-gradients, kept until the next step
    moments = FP32 * 6 * setup.sparse_layers * setup.local_experts * setup.shape.expert_width
    held = process + weights + states.kept + adapters + moments * setup.pooled_moments
    if setup.on_cpu:
        # the shared state of the last merge, SCAFFOLD's c, c_i and their change, and what ranks exchange through
        held += CPU_KERNELS + FP32 * (1 + 3 * setup.controls) * trained.total + _shared_memory_bytes(setup)
        held += FP32 * trained.total * setup.kept_updates
    training, opening = training_bytes(setup), opening_bytes(setup)
    token_slack, row_slack = (CPU_TOKEN_SLACK, CPU_ROW_SLACK) if setup.on_cpu else (CUDA_SLACK, CUDA_SLACK)
    loading = min(MAPPED, weights) + CPU_QUANTIZING * (setup.quantize is not None) if setup.on_cpu else 0
    phases = {
        "load": process + weights + states.weights + loading,
        "train": held + token_slack * training.tokens + row_slack * training.rows + states.first + opening,
        "step": held + states.step + adapters + opening + _down_bytes(setup),
        "evaluate": held + evaluation_bytes(setup) + opening,
    }
    if setup.on_cpu:
        phases["exchange"] = phases["train"] + CPU_FLAT_COPIES * FP32 * trained.total
        phases["merge"] = held + exchange_bytes(setup)
        phases["save"] = held + checkpoint_bytes(setup)
    return phases


def _process_bytes(setup: RankSetup) -> float:
    """Return the size of the process before a model is read; rows and tokenizer are in host memory."""
    if not setup.on_cpu:
        return CUDA_PROCESS
    library = CPU_LIBRARY * (setup.quantize is not None)
    return CPU_PROCESS + library + CPU_ROW_TEXT * setup.text_bytes + CPU_VOCABULARY * setup.shape.vocab


def _shared_memory_bytes(setup: RankSetup) -> float:
    """Return the size of what the rank sends in a merge and reads from others; messages take as much."""
    held = trained_elements(setup).total
    owned, merged = (model_elements(at) / setup.world for at in (setup, with_lora_rank(setup, setup.reply_rank)))
    sent = held if setup.reducible else max(held, merged * setup.receivers)
    return FP32 * (sent + merged + owned * (setup.world - 1))


class FrozenBytes(NamedTuple):
    """Bytes of untrained weights: those that are never quantised, the others as kept, and the buffer of all layers."""

    whole: float
    matrices: float
    buffer: float


def frozen_bytes(setup: RankSetup) -> float:
    """Return the size of untrained weights."""
    return sum(frozen_parts(setup))


def frozen_parts(setup: RankSetup) -> FrozenBytes:
    """Return the same in parts.

    Experts have room for their scaled LoRA factors beside them; quantised ones have it in the buffer of all layers.
    """
    s = setup.shape
    embeddings = s.vocab * s.hidden * (1 if s.tied_embeddings else 2)
    router = 0 if setup.router else setup.sparse_layers * s.num_experts * s.hidden
    linears = sum(_matrix_bytes(setup, p.outputs, p.inputs) for mixer in s.mixers for p in mixer.projections)
    for layers, width in ((s.dense_layers, s.dense_width), (setup.sparse_layers, s.shared_width)):
        linears += layers * (2 * _matrix_bytes(setup, width, s.hidden) + _matrix_bytes(setup, s.hidden, width))
    gate_up = _aligned(2 * s.expert_width + 2 * s.lora_rank) * _aligned(s.hidden + 2 * s.lora_rank)
    down = _aligned(s.hidden + s.lora_rank) * _aligned(s.expert_width + s.lora_rank)
    if setup.quantize is None:
        layer, buffer = float(setup.width * (gate_up + down)), 0.0
    else:
        layer = _matrix_bytes(setup, 2 * s.expert_width, s.hidden) + _matrix_bytes(setup, s.hidden, s.expert_width)
        buffer = setup.width * setup.local_experts * max(gate_up, down)
    experts = setup.sparse_layers * setup.local_experts * layer
    return FrozenBytes(setup.width * (embeddings + router), linears + experts, buffer)


def _matrix_bytes(setup: RankSetup, outputs: int, inputs: int) -> float:
    """Return the size of a frozen matrix, quantised or not."""
    if setup.quantize is None or not outputs:
        return setup.width * outputs * inputs
    if setup.quantize == "nf4":
        return outputs * inputs * (1 / 2 + FP32 / BLOCK)
    return outputs * (inputs + FP32)


def opening_bytes(setup: RankSetup) -> float:
    """Return what dequantising takes beside the buffer: some experts' values, or those of a linear layer."""
    if setup.quantize is None:
        return 0
    s = setup.shape
    expert = 2 * s.expert_width * s.hidden
    linears = [p.outputs * p.inputs for mixer in s.mixers for p in mixer.projections]
    experts = expert * min(setup.local_experts, max(1, GROUP // expert))
    largest = max(*linears, s.hidden * max(s.dense_width, s.shared_width), experts)
    return largest * (setup.width if setup.quantize == "nf4" else 2 * FP32)


def _down_bytes(setup: RankSetup) -> float:
    """Return the size of a layer's down projections, which `linearised` pseudo-gradients dequantise into new memory."""
    elements = setup.local_experts * setup.shape.expert_width * setup.shape.hidden
    return setup.width * elements * (setup.quantize is not None and setup.pooled_moments)


class States(NamedTuple):
    """Bytes around the optimiser of one rank.

    weights: the model's own trainable weights; kept: these, masters and moments.
    first: gradients of earlier micro-batches; step: gradients, and buffers of the optimiser step.
    """

    weights: float
    kept: float
    first: float
    step: float


def optimizer_bytes(setup: RankSetup) -> States:
    """Return optimiser bytes: ZeRO 1 and 2 spread masters and moments over the ranks that hold the same parameters."""
    dense, experts = trained_elements(setup)
    total, width = dense + experts, setup.width
    weights = width * total
    accumulated: float = width * total if setup.micro_batches > 1 else 0
    if setup.zero_stage == 0:
        masters = FP32 * total if setup.bf16 else 0  # in fp32 the weights are the masters
        gradients = width * total + masters + width * max(dense, experts)  # the last: flat, for the sum over ranks
        return States(weights, weights + masters + FP32 * setup.moments * total, accumulated, gradients)
    part = dense / setup.ranks + experts / (setup.ranks / setup.expert_parallel)
    if setup.fp32_gradients:  # of every step; ZeRO 2 keeps its part alone
        accumulated = FP32 * (total if setup.zero_stage == 1 else part)
    bucket = (
        min(setup.reduce_bucket, total) if setup.on_cpu else setup.reduce_bucket
    )  # a CPU's pages count once touched
    step = width * total + FP32 * part + width * bucket
    return States(weights, weights + FP32 * (1 + setup.moments) * part, accumulated + width * bucket, step)


class TrainingBytes(NamedTuple):
    """Bytes alive at the fullest moment of a step: those that grow with tokens, and with the experts' rows."""

    tokens: float
    rows: float


def training_bytes(setup: RankSetup) -> TrainingBytes:
    """Return the bytes of forward and backward of one micro-batch.

    They are what all layers keep, and the fullest moment: the head, or the backward of one layer's experts.
    """
    s, batch = setup.shape, setup.training
    rows = expert_rows(setup, batch.tokens, setup.k, dropping=True)
    leading = 0 if s.lora_attention else s.leading_dense  # before the first adapter nothing is kept
    layers, sparse = s.layers if s.lora_attention else s.layers - leading - 1, setup.sparse_layers
    kept_rows, tokens = sparse * _kept_of_rows(setup, rows), 0.0
    if setup.recomputing:
        # each layer's input, once more its block's for pseudo-gradients, what its experts give; one layer's rest
        inputs = s.layers - leading + sparse * (setup.pseudo_gradients + (setup.expert_parallel == 1))
        attention = (s.layers - leading) * s.heads * s.head_dim * s.fused_attention
        tokens += (inputs * s.hidden + attention) * setup.width * batch.tokens
        tokens += sparse * _routing_tables(setup) * batch.tokens
        kept_rows = _kept_of_rows(setup, rows) + (sparse - 1) * 2 * INT64 * rows
        layers, sparse = 1, 1
    else:
        tokens += (s.dense_layers - leading) * 3 * s.dense_width * setup.width * batch.tokens
    tokens += layers * _kept_by_attention(setup) + sparse * _kept_of_tokens(setup)
    tokens += FP32 * 5 * s.hidden * batch.tokens  # the last norm, and gradients on their way through a layer
    backward = rows * setup.width * (2 * s.hidden + 4 * s.expert_width + 6 * s.lora_rank)
    backward += rows * setup.width * s.hidden * (setup.expert_parallel > 1)
    fullest = max(_head_bytes(setup, batch.answers, training=True), backward)
    return TrainingBytes(tokens + _drawn_bytes(setup), kept_rows + fullest)


def _kept_by_attention(setup: RankSetup) -> float:
    """Return what a layer keeps for backward: inputs of two norms in fp32, of q and k norms, q k v, the output."""
    s = setup.shape
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    token = FP32 * 2 * s.hidden + setup.width * (2 * q + 2 * kv) + FP32 * s.heads
    if s.normed_queries:
        token += FP32 * (q + kv)
    if s.lora_attention:
        token += setup.width * (s.hidden + q) + FP32 * 4 * s.lora_rank
    mask = setup.width * setup.training.rows * setup.training.length**2 if setup.packed else 0  # as the kernel takes it
    return token * setup.training.tokens + mask


def _kept_of_tokens(setup: RankSetup) -> float:
    """Return what an MoE block keeps for backward: its input, the router's tables, the shared expert's hidden units."""
    s = setup.shape
    token: float = setup.width * s.hidden + FP32 * s.hidden * (setup.bf16 and setup.router)
    token += _routing_tables(setup)
    token += setup.width * (3 * s.shared_width + s.hidden) * (s.shared_width > 0)
    return token * setup.training.tokens


def _routing_tables(setup: RankSetup) -> float:
    """Return what a gate keeps of a token: values for each expert and for each route."""
    return setup.shape.num_experts * (3 * FP32 + 2) + setup.k * (5 * INT64 + 5 * FP32)


def _kept_of_rows(setup: RankSetup, rows: int) -> float:
    """Return what an MoE block keeps of its experts' rows for backward, with the rows moved between ranks."""
    s = setup.shape
    kept = (setup.width * (2 * s.expert_width + 3 * s.lora_rank) + 2 * INT64) * rows
    if setup.expert_parallel > 1:
        kept += setup.width * s.hidden * (rows + setup.k * setup.training.tokens)
    return kept


def _forward_rows_bytes(setup: RankSetup, rows: int) -> float:
    """Return the size of one layer's experts at work, nothing kept."""
    s = setup.shape
    row = _aligned(s.hidden + 2 * s.lora_rank) + 2 * s.expert_width + _aligned(s.expert_width + s.lora_rank)
    row += s.expert_width + s.hidden + s.hidden * 2 * (setup.expert_parallel > 1)
    return setup.width * row * rows + INT64 * 3 * rows


def _head_bytes(setup: RankSetup, answers: int, training: bool) -> float:
    """Return the size of logits and log-probabilities; in training, of log-probabilities and two gradients."""
    logits = FP32 * setup.shape.vocab * answers
    cast = setup.width * setup.shape.vocab * answers * setup.bf16
    return (3 if training else 2) * logits + cast


def _drawn_bytes(setup: RankSetup) -> float:
    """Return the size of the tokens drawn for pseudo-gradients in a step.

    They are inputs and gradients, and hidden units where the estimator needs them.
    """
    s = setup.shape
    token = 2 * s.hidden + 3 * s.expert_width * setup.mixture
    return setup.sparse_layers * setup.micro_batches * s.num_experts * setup.drawn_tokens * token * setup.width


def evaluation_bytes(setup: RankSetup) -> float:
    """Return the bytes of one batch of evaluation rows without gradients; nothing is dropped."""
    s, batch = setup.shape, setup.evaluation
    rows = expert_rows(setup, batch.tokens, setup.k, dropping=False)
    layer = _forward_rows_bytes(setup, rows) + setup.width * 4 * s.hidden * batch.tokens
    shared = setup.width * 3 * max(s.shared_width, s.dense_width) * batch.tokens
    mask = batch.rows * batch.length**2 * (setup.width * 2 + 4)
    return max(layer, shared, _head_bytes(setup, batch.answers, training=False)) + mask


def exchange_bytes(setup: RankSetup) -> float:
    """Return host memory around a merge beside what is sent: the update, and all clients' updates of owned units."""
    reply = with_lora_rank(setup, setup.reply_rank)
    held, got = trained_elements(setup).total, trained_elements(reply).total
    owned, merged = (model_elements(at) / setup.world for at in (setup, reply))
    if setup.reducible:
        return FP32 * (4 * held + owned)
    replies = 1 if setup.kept_updates else setup.clients  # groups hold one shared state
    return FP32 * (2 * held + got + setup.clients * 2 * owned + replies * merged)


def checkpoint_bytes(setup: RankSetup) -> float:
    """Return host memory while a checkpoint or an adapter is written: copies of what is saved, then bytes of a file."""
    total = trained_elements(setup).total
    states = (1 + setup.moments) * (total if setup.zero_stage == 0 else total / setup.ranks) + total
    return FP32 * max(2 * states, 4 * model_elements(setup))


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def largest_phase(phases: Mapping[str, float]) -> tuple[str, float]:
    """Return the phase that needs most, and its bytes."""
    return max(phases.items(), key=lambda item: item[1])
