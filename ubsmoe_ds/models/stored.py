"""Find each part of a model in its files, as transformers does: nothing of the files or of the model is left over.

A layer's experts are stored one by one (`experts.0.gate_proj.weight`, as models are published) or stacked
(`experts.gate_up_proj`, as transformers writes them with `save_original_format=False`).

Shapes: E experts, D model width, F expert width.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.families import Family
from ubsmoe_ds.models.weights import WeightFiles, known_names

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
GATE_UP, DOWN = "gate_up_proj", "down_proj"  # stacked: [E, 2 F, D] and [E, D, F]


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


def check_files(
    files: WeightFiles, config: PreTrainedConfig, family: Family, kept: Mapping[str, Tensor], blocks: Iterable[int]
) -> None:
    """Check that the files hold all that config.json describes, in its shapes, and nothing else.

    Args:
        files: named by `Family.usual_name`.
        config: the model's.
        family: the model's.
        kept: the tensors outside of the blocks; without the head, if it is the embedding.
        blocks: layers with experts.

    Raises:
        UserError: naming the file and the tensor.
    """
    shapes = {name: tuple(value.shape) for name, value in kept.items()}
    if HEAD not in kept and HEAD in files:  # of a model whose config ties it, transformers is content with either
        shapes[HEAD] = shapes[EMBEDDING] if EMBEDDING in files else shapes.pop(EMBEDDING)
    same: set[str] = set()
    for layer in blocks:
        own, experts = _block_shapes(files, config, family, layer)
        shapes |= own
        same |= experts
    files.require(sorted(same))
    files.require_shapes(shapes)
    files.refuse_others(shapes.keys() | same)


def _block_shapes(
    files: WeightFiles, config: PreTrainedConfig, family: Family, layer: int
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return (shapes of a block's tensors, of single experts only the first's; names of all its single experts')."""
    num_experts, width, hidden = getattr(config, family.num_experts), getattr(config, family.width), config.hidden_size
    block = block_name(family, layer)
    shapes: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (num_experts, hidden)}
    names: set[str] = set()
    for stacked, parts in projections(family).items():
        size = (width, hidden) if stacked == GATE_UP else (hidden, width)
        if f"{block}.experts.{stacked}" in files:
            shapes[f"{block}.experts.{stacked}"] = (num_experts, len(parts) * size[0], size[1])
            continue
        for part in parts.values():
            shapes[f"{block}.experts.0.{part}.weight"] = size
            names |= {f"{block}.experts.{e}.{part}.weight" for e in range(num_experts)}
    return shapes, names


def read_experts(files: WeightFiles, family: Family, layer: int, base: Mapping[str, Tensor], first: int) -> None:
    """Read a layer's experts from a first one on into views, as `StackedExperts.base` gives them.

    Raises:
        UserError: as `WeightFiles.read_into`.
    """
    inside, width = f"{block_name(family, layer)}.experts", base["gate"].shape[1]
    for stacked, parts in projections(family).items():
        for i, (ours, part) in enumerate(parts.items()):
            for e in range(len(base[ours])):
                expert = first + e
                if f"{inside}.{stacked}" in files:
                    rows = slice(i * width, (i + 1) * width) if stacked == GATE_UP else slice(None)
                    place = slice(expert, expert + 1), rows
                    files.read_into(base[ours][e : e + 1], f"{inside}.{stacked}", place)
                else:
                    files.read_into(base[ours][e], f"{inside}.{expert}.{part}.weight")


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


def check_block(block: Any, family: Family) -> None:
    """Check that a block of transformers is what the conversion knows: a router, stacked experts, the shared modules.

    Raises:
        UserError: naming a parameter, buffer or module that would be lost.
    """
    known = {"gate", "gate.weight", "experts", f"experts.{GATE_UP}", f"experts.{DOWN}", "experts.act_fn"}
    inside = (*block.named_parameters(), *block.named_buffers(), *block.named_modules())
    shared = tuple(f"{name}." for name in family.shared)
    found = {name for name, _ in inside if name and not f"{name}.".startswith(shared)}
    if found != known:
        name = min(found ^ known)
        what = "has" if name in found else "lacks"
        raise UserError(
            f"model.path: a block of this model, as transformers builds it, {what} {name!r}; this program cannot train "
            "such blocks"
        )


def projections(family: Family) -> dict[str, dict[str, str]]:
    """Return the stacked tensors of a layer, each with its projections in order: our names and those of single ones."""
    return {GATE_UP: {"gate": family.gate, "up": family.up}, DOWN: {"down": family.down}}
