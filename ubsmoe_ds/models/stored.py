"""Find each part of a model in its files, as transformers does: nothing of the files or of the model is left over.

A layer's experts are stored one by one (`experts.0.gate_proj.weight`, as models are published) or stacked
(`experts.gate_up_proj`, as transformers writes them with `save_original_format=False`).

Shapes: E experts, D model width, F expert width.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ubsmoe_ds.models.families import predicts_further, read_facts
from ubsmoe_ds.models.family import ExpertsLine, Family
from ubsmoe_ds.models.weights import WeightFiles, known_names

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
GATE_UP, DOWN, BIAS = "gate_up_proj", "down_proj", "_bias"  # stacked: [E, 2 F, D] and [E, D, F], or transposed


def block_name(family: Family, layer: int) -> str:
    """Return how the names of a block's tensors begin in the files."""
    return f"model.layers.{layer}.{family.block}"


def is_tied(hf: PreTrainedModel) -> bool:
    """Return whether a model's head is its embedding."""
    return hf.lm_head.weight is hf.model.embed_tokens.weight


def may_have_own_head(folder: Path, family: Family) -> bool:
    """Return whether a model that its config ties may have a head of its own: one is stored beside the embedding.

    Only their values tell whether they are one; see `read_head`.

    Raises:
        UserError: as `known_names`.
    """
    return {HEAD, EMBEDDING} <= known_names(folder, family.usual_name)


def left_out(folder: Path) -> list[str]:
    """Return the names of a model's tensors that are not used: those that predict tokens after the next one (MTP).

    Raises:
        UserError: as `read_facts` and `known_names`.
    """
    family, facts = read_facts(folder)
    return sorted(name for name in known_names(folder, family.usual_name) if predicts_further(name, facts))


def check_files(
    files: WeightFiles,
    config: PreTrainedConfig,
    family: Family,
    kept: Mapping[str, Tensor],
    routers: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> None:
    """Check that the files hold all that config.json describes, in its shapes, and nothing else.

    Args:
        files: named by `Family.usual_name`.
        config: the model's.
        family: the model's.
        kept: the tensors outside of the blocks; without the head, if it is the embedding.
        routers: for each layer with experts, the shapes of its router's tensors.

    Raises:
        UserError: naming the file and the tensor.
    """
    shapes = {name: tuple(value.shape) for name, value in kept.items()}
    if HEAD not in kept and HEAD in files:  # of a model whose config ties it, transformers is content with either
        shapes[HEAD] = shapes[EMBEDDING] if EMBEDDING in files else shapes.pop(EMBEDDING)
    same: set[str] = set()
    for layer, router in routers.items():
        own, experts = _expert_shapes(files, config, family, layer)
        shapes |= own | {f"{block_name(family, layer)}.{name}": shape for name, shape in router.items()}
        same |= experts
    files.require(sorted(same))
    files.require_shapes(shapes)
    facts = config.to_dict()
    files.refuse_others(shapes.keys() | same, lambda name: predicts_further(name, facts))


def _expert_shapes(
    files: WeightFiles, config: PreTrainedConfig, family: Family, layer: int
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return (shapes of a layer's experts, of single ones only the first's; names of all its single experts')."""
    num_experts, width, hidden = getattr(config, family.num_experts), getattr(config, family.width), config.hidden_size
    inside, parts_of = f"{block_name(family, layer)}.experts", projections(family)
    shapes: dict[str, tuple[int, ...]] = {}
    names: set[str] = set()
    for stacked, shape in stacked_shapes(family, num_experts, width, hidden).items():
        if f"{inside}.{stacked}" in files or not family.gate:
            shapes[f"{inside}.{stacked}"] = shape
            continue
        for part in parts_of[stacked].values():
            shapes[f"{inside}.0.{part}.weight"] = (width, hidden) if stacked == GATE_UP else (hidden, width)
            names |= {f"{inside}.{e}.{part}.weight" for e in range(num_experts)}
    return shapes, names


def read_experts(
    files: WeightFiles,
    family: Family,
    layer: int,
    base: Mapping[str, Tensor],
    bias: Mapping[str, Tensor],
    first: int,
) -> None:
    """Read a layer's experts from a first one on into views of some or all projections, see `FrozenExperts.fill`.

    Raises:
        UserError: as `WeightFiles.read_into`.
    """
    inside, some = f"{block_name(family, layer)}.experts", next(iter(base.values()))
    width, hidden = some.shape[1:] if "gate" in base else reversed(some.shape[1:])
    shapes, parts_of = stacked_shapes(family, 1, width, hidden), projections(family)
    for stacked, shape in shapes.items():
        targets = bias if stacked.endswith(BIAS) else base
        if not parts_of[stacked.removesuffix(BIAS)].keys() <= targets.keys():
            continue
        for local in range(len(some)):
            expert = first + local
            if f"{inside}.{stacked}" in files:
                value = torch.empty(shape, dtype=some.dtype)
                files.read_into(value, f"{inside}.{stacked}", (slice(expert, expert + 1),))
                for ours, view in unstacked(value, stacked, family.experts).items():
                    targets[ours][local].copy_(view[0])
                continue
            for ours, part in parts_of[stacked].items():
                files.read_into(base[ours][local], f"{inside}.{expert}.{part}.weight")


def read_head(files: WeightFiles, hf: PreTrainedModel) -> None:
    """Read the head of a model whose config ties it to the embedding.

    As in transformers, a stored head that is another than the stored embedding stays apart.
    """
    embedding = hf.model.embed_tokens.weight.data
    if HEAD not in files:
        return
    head = torch.empty_like(embedding)
    files.read_into(head, HEAD)
    if EMBEDDING not in files:
        embedding.copy_(head)
    elif not torch.equal(head, embedding):
        hf.lm_head.weight = nn.Parameter(head)
        hf.config.tie_word_embeddings = False


def projections(family: Family) -> dict[str, dict[str, str]]:
    """Return the stacked weights of a layer, each with its projections in order: our names and those of single ones."""
    return {GATE_UP: {"gate": family.gate, "up": family.up}, DOWN: {"down": family.down}}


def stacked_shapes(family: Family, num_experts: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the names of a layer's stacked tensors, and their shapes for so many experts of F = `width`."""
    sizes = {GATE_UP: (2 * width, hidden), DOWN: (hidden, width)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs) in sizes.items():
        shapes[name] = (num_experts, *((inputs, outputs) if family.experts.transposed else (outputs, inputs)))
    biases = {f"{name}{BIAS}": (num_experts, outputs) for name, (outputs, _) in sizes.items()}
    return shapes | biases if family.experts.biased else shapes


def unstacked(value: Tensor, stacked: str, line: ExpertsLine) -> dict[str, Tensor]:
    """Return views of a stacked tensor's projections: weights [.., O, I], of biases [.., O]."""
    if stacked.endswith(BIAS):
        parts = unstacked(value.unsqueeze(-1), stacked.removesuffix(BIAS), replace(line, transposed=False))
        return {name: part.squeeze(-1) for name, part in parts.items()}
    value_OI = value.mT if line.transposed else value
    if stacked == DOWN:
        return {"down": value_OI}
    if line.interleaved:
        return {"gate": value_OI[..., ::2, :], "up": value_OI[..., 1::2, :]}
    gate, up = value_OI.tensor_split(2, dim=-2)
    return {"gate": gate, "up": up}
