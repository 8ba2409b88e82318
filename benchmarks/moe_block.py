"""Time one MoE block with LoRA, forward and backward: ours, Hugging Face, stock DeepSpeed, and the floor, in turn.

    python benchmarks/moe_block.py                                   # the whole table
    python benchmarks/moe_block.py --tokens 4096 --k 8 --impls ubsmoe hf_eager --routing zipf
    python benchmarks/moe_block.py --tokens 4096 --k 8 --profile     # time by part of our block
    python benchmarks/moe_block.py --hidden 2048 --width 1024 --tokens 8192 --k 8 \
        --dtypes bf16 --impls ubsmoe hf_grouped_mm

Only LoRA is trained; gradients are those of the input and of LoRA. The floor is one plain matrix product of the same
FLOPs (the experts' forward and their gradient for the input, all routes), in the same dtype, timed in turn with the
others. `ratio` is the median over repeats of a time over the floor's, `kept` the share of routes that our capacity
keeps. Before timing, outputs with fresh adapters are compared with transformers'.

    separate        the floor's FLOPs as plain products of each expert's rows and weights, into reused memory: a block
                    without gate, LoRA, silu, gathers and sums
    ubsmoe          this project's block; dropping: capacity factor 1
    hf_eager        transformers' block, LoRA by PEFT, which adds B A to the stacked weights in every step; never drops
    hf_grouped_mm   the same with transformers' grouped_mm experts
    hf_base         hf_grouped_mm without LoRA: only the gradient of the input
    deepspeed       stock deepspeed.moe.layer.MoE, an expert a module of six linear layers
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from measuring import add_output_option, device, in_turn, machine, ratio, say
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from ubsmoe_ds.base.malloc import keep_freed_memory
from ubsmoe_ds.models.block_check import copy_experts
from ubsmoe_ds.models.conversion import UBSMoESpec, convert_block
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.moe.gate import GateConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK, ALPHA = 8, 16.0
IMPLEMENTATIONS = ("ubsmoe", "hf_eager", "hf_grouped_mm", "hf_base", "deepspeed")


class Shape(argparse.Namespace):
    """D, F and E of the block."""

    hidden: int
    width: int
    experts: int


def config(shape: Shape, k: int, implementation: str = "eager") -> OlmoeConfig:
    """Return the config of a model with this block."""
    return OlmoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=k,
        num_attention_heads=1,
        experts_implementation=implementation,
    )


def base_block(shape: Shape, k: int, zipf: bool, implementation: str = "eager") -> OlmoeSparseMoeBlock:
    """Return the block that all implementations share; with `zipf` its router favours expert i as 1 / (i + 1)."""
    torch.manual_seed(0)
    block = OlmoeSparseMoeBlock(config(shape, k, implementation))
    for parameter in block.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    if zipf:  # the input's first feature is constant
        block.gate.weight.data[:, 0] = -torch.arange(1, shape.experts + 1).log()
    return block.requires_grad_(False)


def tokens_of(shape: Shape, count: int) -> Tensor:
    """Return input [1, T, D] whose first feature is constant."""
    x = torch.randn(1, count, shape.hidden, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1
    return x


def ubsmoe(shape: Shape, k: int, dropping: bool, zipf: bool) -> nn.Module:
    """Return this project's block."""
    gate = GateConfig(k, min(2 * k, shape.experts), capacity_factor=1.0 if dropping else None, phi_range=None)
    spec = UBSMoESpec(gate, lora_rank=RANK, lora_alpha=ALPHA, router_trainable=False)
    block = base_block(shape, k, zipf)

    fill = partial(copy_experts, block.experts, FAMILIES["olmoe"])
    return convert_block(block, config(shape, k), spec, torch.Generator().manual_seed(0), fill)


def hugging_face(shape: Shape, k: int, zipf: bool, implementation: str) -> nn.Module:
    """Return transformers' block with PEFT's LoRA on the stacked projections."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
    wrapper = nn.Sequential(base_block(shape, k, zipf, implementation))
    wrapper.config = config(shape, k, implementation)
    return get_peft_model(wrapper, lora)


class LoraExpert(nn.Module):
    """One SwiGLU expert for the stock layer."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        self.base = nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (i, o) in sizes.items()}).requires_grad_(False)
        self.A = nn.ModuleDict({n: nn.Linear(i, RANK, bias=False) for n, (i, _) in sizes.items()})
        self.B = nn.ModuleDict({n: nn.Linear(RANK, o, bias=False) for n, (_, o) in sizes.items()})

    def _project(self, name: str, x: Tensor) -> Tensor:
        return self.base[name](x) + ALPHA / RANK * self.B[name](self.A[name](x))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D] for [..., D]."""
        return self._project("down", F.silu(self._project("gate", x)) * self._project("up", x))


class StockDeepSpeed(nn.Module):
    """`deepspeed.moe.layer.MoE` with the base block's weights; its gate normalises and samples in its own way."""

    def __init__(self, shape: Shape, k: int, dropping: bool, zipf: bool) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        expert = LoraExpert(shape.hidden, shape.width)
        self.moe = MoE(
            shape.hidden, expert, shape.experts, k=k, capacity_factor=1.0, drop_tokens=dropping, use_rts=False
        )
        block = base_block(shape, k, zipf)
        self.moe.deepspeed_moe.gate.wg.weight.data.copy_(block.gate.weight)
        self.moe.deepspeed_moe.gate.requires_grad_(False)
        for expert, gate_up, down in zip(
            self.moe.deepspeed_moe.experts.deepspeed_experts,
            block.experts.gate_up_proj,
            block.experts.down_proj,
            strict=True,
        ):
            for name, weight in zip(("gate", "up", "down"), (*gate_up.chunk(2), down), strict=True):
                expert.base[name].weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return [1, T, D] for [1, T, D]."""
        return self.moe(x)[0]


def build(name: str, shape: Shape, k: int, dropping: bool, zipf: bool) -> nn.Module | None:
    """Return an implementation; None if it has no such mode."""
    if name == "ubsmoe":
        return ubsmoe(shape, k, dropping, zipf)
    if name == "deepspeed":
        return StockDeepSpeed(shape, k, dropping, zipf)
    if name == "hf_base":
        return None if dropping else base_block(shape, k, zipf, "grouped_mm")
    return None if dropping else hugging_face(shape, k, zipf, name.removeprefix("hf_"))


def step(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs forward and backward of one implementation and returns its output."""
    trained = [p for p in module.parameters() if p.requires_grad]

    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        y = y[0] if isinstance(y, tuple) else y
        torch.autograd.grad(y, [leaf, *trained], dy)
        return y

    return run


def floor(shape: Shape, tokens: int, k: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return one product with the FLOPs of all routes' three projections, forward and gradient of the input."""
    rows = torch.randn(tokens * k, shape.hidden, dtype=dtype, device=device())
    weight = torch.randn(6 * shape.width, shape.hidden, dtype=dtype, device=device())
    out = torch.empty(tokens * k, 6 * shape.width, dtype=dtype, device=device())
    return lambda: torch.mm(rows, weight.T, out=out)


def separate(shape: Shape, tokens: int, k: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return the same FLOPs expert by expert: forward and gradient of the input, gate and up together, then down."""
    rows, width, hidden = max(1, tokens * k // shape.experts), shape.width, shape.hidden

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=device())

    products = []
    for outputs, inputs in ((2 * width, hidden), (hidden, width)):
        weight_EOI = tensor(shape.experts, outputs, inputs)
        for weights in (weight_EOI.mT, weight_EOI):  # forward, and the gradient of the input
            given = tensor(shape.experts, rows, weights.shape[1])
            products.append((given, weights, tensor(shape.experts, rows, weights.shape[2])))

    def run() -> Tensor:
        for given, weights, out in products:
            for e in range(shape.experts):
                torch.mm(given[e], weights[e], out=out[e])
        return products[0][2]

    return run


PARTS = (  # part of the step -> operators of the profile
    ("silu and products of elements", ("silu", "silu_backward", "mul", "vecdot", "linalg_vecdot", "sum", "div", "add")),
    ("gathers and weighted sums", ("index_select", "_embedding_bag", "_embedding_bag_forward_only")),
)


def profile(shape: Shape, run: Callable[[], Tensor], floor_ms: float, repeats: int) -> None:
    """Print the milliseconds of each part of our step, and their ratio to the floor."""
    inner = {shape.hidden + 2 * RANK, shape.width + RANK, shape.hidden + RANK, 2 * shape.width + 2 * RANK}
    with torch.profiler.profile(record_shapes=True) as recorded:
        for _ in range(repeats):
            run()
    parts: dict[str, float] = {}
    for event in recorded.key_averages(group_by_input_shape=True):
        name = event.key.removeprefix("aten::").removesuffix("_")
        if name in ("mm", "bmm"):
            (left, _), (rows, columns) = event.input_shapes[:2]
            part = "gate, routing, copies, Python"
            if rows in inner and columns > 2 * RANK:
                part = "products with frozen weights"
            elif min(left, columns) <= 2 * RANK:
                part = "thin products of LoRA"
        else:
            part = next((part for part, names in PARTS if name in names), "gate, routing, copies, Python")
        parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total / 1e3 / repeats
    for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {part:<32} {ms:9.2f} ms {ms / floor_ms:6.2f} x")


def cases(options: argparse.Namespace) -> Iterator[tuple[int, str, int, int, bool, str]]:
    """Yield (threads, dtype, tokens, k, dropping, routing)."""
    dropping = {"yes": [True], "no": [False], "both": [True, False]}[options.dropping]
    return product(options.threads, options.dtypes, options.tokens, options.k, dropping, options.routing)


def check_answers(functions: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Compare our output with transformers', which computes the same (stock DeepSpeed gates differently)."""
    peers = [name for name in functions if name.startswith("hf_")]
    for peer in peers if "ubsmoe" in functions else []:
        ours, theirs = functions["ubsmoe"]().float(), functions[peer]().float()
        if (ours - theirs).norm() > (2e-2 if dtype == torch.bfloat16 else 1e-5) * theirs.norm():
            raise SystemExit(f"error: ubsmoe and {peer} do not agree")


def measure(shape: Shape, case: tuple[int, str, int, int, bool, str], options: argparse.Namespace) -> None:
    """Print a line for every implementation that has the case."""
    threads, dtype, tokens, k, dropping, routing = case
    torch.set_num_threads(threads)
    x = tokens_of(shape, tokens).to(device(), DTYPES[dtype])
    dy = torch.randn_like(x)
    functions: dict[str, Callable[[], Tensor]] = {"floor": floor(shape, tokens, k, DTYPES[dtype])}
    if routing == "uniform":
        functions["separate"] = separate(shape, tokens, k, DTYPES[dtype])
    modules = {name: build(name, shape, k, dropping, routing == "zipf") for name in options.impls}
    for name, module in modules.items():
        if module is not None:
            functions[name] = step(module.to(device(), DTYPES[dtype]).train(), x, dy)
    check_answers(functions, DTYPES[dtype])
    seconds = in_turn(functions, options.repeats)
    for name, values in seconds.items():
        record = {"bench": "moe_block", "impl": name, "dtype": dtype, "tokens": tokens, "k": k, "threads": threads}
        record |= {"dropping": dropping, "routing": routing}
        if name == "ubsmoe":
            gate = modules[name].gate
            record["kept"] = round(float(gate.kept_E.sum() / gate.routed_E.sum()), 3)
        record |= {"ms": 1e3 * statistics.median(values), "ratio": ratio(values, seconds["floor"])}
        say(record, options.json)
    if options.profile and "ubsmoe" in functions:
        profile(shape, functions["ubsmoe"], 1e3 * statistics.median(seconds["floor"]), options.repeats)


def main() -> None:
    """Measure all cases that the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dropping", default="both", choices=["yes", "no", "both"])
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=["uniform", "zipf"])
    parser.add_argument("--impls", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="also print the parts of our step")
    add_output_option(parser)
    options = parser.parse_args()
    keep_freed_memory()
    shape = Shape(hidden=options.hidden, width=options.width, experts=options.experts)
    if not options.json:
        print(f"{machine()}; D {shape.hidden}, F {shape.width}, E {shape.experts}, LoRA rank {RANK}")
    for case in cases(options):
        measure(shape, case, options)


if __name__ == "__main__":
    main()
