"""Convert models in memory; the program itself reads them from files, which takes tests longer."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM
from ubsmoe_ds.models.conversion import Fill, UBSMoESpec, replace_blocks
from ubsmoe_ds.models.families import FAMILIES


def convert(hf: PreTrainedModel, spec: UBSMoESpec) -> UBSMoEForCausalLM:
    """Convert `hf` in place, its experts' weights taken from itself."""
    family = FAMILIES[hf.config.model_type]
    return replace_blocks(hf, family, spec, lambda layer: fill_from_block(hf.model.layers[layer].mlp))


def fill_from_block(block: Any) -> Fill:
    """Return a function that copies experts from the stacked weights of a block of transformers."""

    def fill(base: dict[str, Tensor], first: int) -> None:
        local = slice(first, first + len(base["down"]))
        gate_EFD, up_EFD = block.experts.gate_up_proj.data[local].chunk(2, dim=1)
        for name, value in {"gate": gate_EFD, "up": up_EFD, "down": block.experts.down_proj.data[local]}.items():
            base[name].copy_(value)

    return fill
