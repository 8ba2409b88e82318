"""Convert models in memory; the program itself reads them from files, which takes tests longer."""

from functools import partial

from transformers import PreTrainedModel

from ubsmoe_ds.models.block_check import copy_experts
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM
from ubsmoe_ds.models.conversion import Fill, UBSMoESpec, replace_blocks
from ubsmoe_ds.models.families import FAMILIES


def convert(hf: PreTrainedModel, spec: UBSMoESpec) -> UBSMoEForCausalLM:
    """Convert `hf` in place, its experts' weights taken from itself."""
    family = FAMILIES[hf.config.model_type]

    def source(layer: int) -> Fill:
        return partial(copy_experts, getattr(hf.model.layers[layer], family.module).experts, family)

    return replace_blocks(hf, family, spec, source)
