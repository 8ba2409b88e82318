"""Frozen weights in few bits: against bitsandbytes' own modules, plain arithmetic, and our code on whole weights."""

import sys

import bitsandbytes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from launch import train
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.moe import quantized
from ubsmoe_ds.moe.activations import SWIGLU, ClampedSwish
from ubsmoe_ds.moe.expert_mlp import Rows
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.frozen import QuantizedExperts, Sizes, WholeExperts, Workspace
from ubsmoe_ds.moe.quantized import QuantizedLinear, QuantizedWeight

E, HIDDEN, WIDTH, RANK = 3, 8, 16, 2  # F and D; a matrix has 128 values, two blocks
# QLoRA's table (arXiv 2305.14314, appendix E)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_nf4_takes_the_nearest_value_of_qloras_table_in_each_block():
    """Two blocks of 64, with largest magnitudes of their own: each value becomes the table's nearest, times that."""
    value = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    value[4:] *= 10
    weight = QuantizedWeight("nf4", (8, 16), torch.float32)
    weight.quantize_(0, value)
    scaled = value.view(2, 64) / value.view(2, 64).abs().amax(1, keepdim=True)
    nearest = torch.tensor(NF4)[(scaled.unsqueeze(2) - torch.tensor(NF4)).abs().argmin(2)]
    expected = nearest * value.view(2, 64).abs().amax(1, keepdim=True)
    torch.testing.assert_close(weight.dequantized(), expected.view(8, 16), atol=1e-6, rtol=1e-6)


def test_int8_rounds_each_row_to_127_steps():
    """A row [1, -0.5, 0.25, 0] has steps of 1/127: 127, -63.5 (to the even -64), 31.75, 0; a row of zeros stays one."""
    weight = QuantizedWeight("int8", (2, 4), torch.float32)
    weight.quantize_(0, torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(weight.dequantized() * 127, torch.tensor([[127.0, -64.0, 32.0, 0.0], [0.0] * 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_equals_the_librarys(dtype):
    """bitsandbytes' own Linear4bit, as transformers and PEFT use it: values, and the gradient of the input."""
    linear = nn.Linear(64, 32, bias=False, dtype=dtype)
    theirs = bitsandbytes.nn.Linear4bit(
        64, 32, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    theirs.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    theirs, ours = theirs.to("cpu"), QuantizedLinear(linear, "nf4")
    outputs = []
    for layer in (ours, theirs):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x)
        outputs.append((y, dx))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(outputs[0], outputs[1], **tolerance)
    assert (outputs[0][0] - F.linear(x, linear.weight)).abs().max() > 1e-3  # it is not the whole weight that is used


def test_pieces_change_nothing(monkeypatch):
    """Quantised and dequantised 128 and 256 values at a time, and at once: the same bits."""
    value = torch.randn(5, 24, 16, generator=torch.Generator().manual_seed(0))
    for scheme in ("nf4", "int8"):
        whole, pieces = (QuantizedWeight(scheme, (5, 24, 16), torch.float32) for _ in range(2))
        target = torch.zeros(5, 30, 20)[:, :24, :16]
        for number in range(5):
            whole.quantize_(number, value[number])
        with monkeypatch.context() as patched:
            patched.setattr(quantized, "PIECE", 128)
            patched.setattr(quantized, "GROUP", 2 * 24 * 16)
            for number in range(5):
                pieces.quantize_(number, value[number])
            pieces.dequantize_into(target)
        assert torch.equal(target, whole.dequantized()) and torch.equal(whole.codes, pieces.codes)
        assert torch.equal(whole.dequantized(3, 5), whole.dequantized()[3:])


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([1e-3, 1.0, 1e3]))
def test_errors_are_bounded(seed, rows, magnitude):
    """nf4: half of the widest gap of the table, 0.152 of a block's largest magnitude; int8: half a step of a row's."""
    value = magnitude * torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    largest = value.abs().amax(1, keepdim=True)
    for scheme, bound in (("nf4", 0.1520), ("int8", 0.5 / 127)):
        weight = QuantizedWeight(scheme, (rows, 64), torch.float32)
        weight.quantize_(0, value)
        assert bool(((weight.dequantized() - value).abs() <= 1.0001 * bound * largest).all())


def test_scales_survive_a_change_of_precision():
    """DeepSpeed's bf16 rounds every floating buffer of a model."""
    weight = QuantizedWeight("nf4", (8, 16), torch.float32)
    weight.quantize_(0, torch.randn(8, 16))
    before = weight.dequantized()
    assert torch.equal(weight.bfloat16().dequantized(), before)


def test_a_weight_without_whole_blocks_is_refused():
    with pytest.raises(UserError, match="'nf4' needs .* a multiple of 64, the model has one of 5 x 7; use int8"):
        QuantizedWeight("nf4", (2, 5, 7), torch.float32)
    QuantizedWeight("int8", (2, 5, 7), torch.float32)


def test_a_missing_library_is_named_before_and_in_the_ranks(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized.library.cache_clear()
    with pytest.raises(UserError, match=r"model\.quantize: bitsandbytes is missing; pip install '\.\[quantize\]'"):
        quantized.library()
    exp = load_experiment(train.DEFAULT_CONFIG, ["model.quantize=nf4"])
    with pytest.raises(UserError, match="model.quantize: 'nf4' needs bitsandbytes, which is missing; pip install"):
        train.start(exp, [], train.parse([]))


def experts(frozen, biased):
    """Return experts with adapters that do something."""
    generator = torch.Generator().manual_seed(2)
    built = StackedExperts(
        frozen,
        full_rank=RANK,
        alpha=4.0,
        group_name="ep_size_1",
        generator=generator,
        num_experts=E,
        first=0,
        activation=ClampedSwish(1.7, 0.8) if biased else SWIGLU,
    )
    for _, B in built.factors().values():
        B.data.normal_(generator=generator)
    return built


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_experts_compute_what_whole_weights_of_these_values_compute(scheme, biased):
    """Output, gradients of input and adapters to the bit, two layers in one buffer; other adapters in between."""
    sizes, generator = Sizes(E, HIDDEN, WIDTH, RANK, biased), torch.Generator().manual_seed(3)
    values = {name: torch.randn(shape, generator=generator) for name, shape in sizes.projections.items()}
    offsets = {name: torch.randn(shape[:2], generator=generator) for name, shape in sizes.projections.items()}

    def read(base, bias):
        for name, place in base.items():
            place.copy_(values[name])
        for name, place in bias.items():
            place.copy_(offsets[name])

    workspace = Workspace()
    frozen = [QuantizedExperts(sizes, torch.float32, scheme, workspace) for _ in range(2)]
    for part in frozen:
        part.fill(read)
    whole = WholeExperts(sizes, torch.float32)
    whole.fill(lambda base, bias: [place.copy_(frozen[0].base()[n]) for n, place in base.items()] and read({}, bias))
    assert all(torch.equal(whole.base()[name], frozen[1].base()[name]) for name in values)
    assert not torch.equal(whole.base()["up"], values["up"])
    x = torch.randn(9, WIDTH, generator=generator)
    results = []
    for parts in (frozen, [whole, whole]):
        layers, leaf = [experts(part, biased) for part in parts], x.clone().requires_grad_()
        rows = Rows(torch.tensor([4, 4, 9], dtype=torch.int32))
        y = layers[1].run(layers[0].run(leaf, None, rows), None, rows)
        frozen[0].openers(experts(frozen[0], biased).factors(), 1.0)[1]()  # the buffer holds something else now
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for layer in layers for p in layer.parameters() if p.requires_grad)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected) and expected.abs().max() > 0
