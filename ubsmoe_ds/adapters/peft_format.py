"""Read and write adapters as Hugging Face PEFT stores them, so that `PeftModel.from_pretrained(base, folder)` works.

A trained router is a module saved whole; peft_tensors.py has the forms of LoRA. Values that PEFT does not know (phi, K,
the gate's learned scale) are in a file beside, `SIDECAR`. PEFT alone therefore computes the model at phi = 0 and
scale 1, at the K of its config.
The file beside is named last and holds the digest of the weights: files of two runs do not pass for one adapter.
FLoRA leaves changed weights and no adapter, so PEFT is not used there.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds.adapters.peft_config import adapter_config, read_settings
from ubsmoe_ds.adapters.peft_tensors import SIDECAR_ENDINGS, expert_targets, from_peft, to_peft
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import replace_files, require_regular, sha256
from ubsmoe_ds.models.family import Family
from ubsmoe_ds.models.weights import read_tensors

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "ubsmoe.safetensors"
DIGEST = "weights_sha256"  # a fact of the sidecar; adapters of earlier versions lack it


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    lora_rank: int,
    alpha: float,
    base_model: str,
    facts: Mapping[str, str],
    family: Family,
    revision: str | None = None,
    rslora: bool = False,
) -> None:
    """Write an adapter folder: PEFT's two files and the sidecar.

    Args:
        folder: created if missing; files of these names in it are replaced.
        state: tensors in our names.
        lora_rank, alpha: those of LoRA.
        base_model: folder or id of the base, for readers.
        facts: K, N_p and the like, for the sidecar's metadata.
        family: of the base model.
        revision: revision of the base, if it is an id that has one.
        rslora: whether B A is scaled by alpha / sqrt(lora_rank).
    """
    tensors, targets = to_peft(state, family), expert_targets(state, family)
    config = adapter_config(
        tensors, targets, lora_rank, alpha, base_model, family=family, revision=revision, rslora=rslora
    )
    beside = {name: value.contiguous() for name, value in state.items() if name.endswith(SIDECAR_ENDINGS)}
    replace_files(
        folder,
        {
            WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
            SIDECAR: lambda path: save_file(
                beside, path, metadata={**facts, DIGEST: sha256(path.with_name(WEIGHTS)).hex()}
            ),
        },
    )


def check_belongs(folder: Path, facts: Mapping[str, str]) -> None:
    """Check that the weights are those that the sidecar was saved with.

    Args:
        folder: the adapter's.
        facts: of its sidecar; without a digest anything passes.

    Raises:
        UserError: naming both files, or the weights if they cannot be read.
    """
    weights = folder / WEIGHTS
    if DIGEST not in facts:
        return
    try:
        require_regular(weights)
        if sha256(weights).hex() == facts[DIGEST]:
            return
    except OSError as error:
        raise UserError(f"adapter: {str(weights)!r} cannot be read ({error.strerror}); save it again") from error
    raise UserError(
        f"adapter: {str(weights)!r} is not the file that {str(folder / SIDECAR)!r} was saved with, so phi and K may be "
        "another run's; take both from one saved adapter, or save it again"
    )


def read(folder: Path, family: Family, num_experts: int) -> tuple[dict[str, Tensor], int, float]:
    """Read an adapter folder, ours or PEFT's own with the same targets.

    Without a sidecar there is no phi, which then is zero.

    Args:
        folder: the adapter's.
        family: of the base model.
        num_experts: of a layer.

    Returns:
        (state in our names, LoRA rank, factor of B A).

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    settings = read_settings(folder / CONFIG)
    state, rank = from_peft(read_tensors(folder / WEIGHTS), settings, family, num_experts)
    beside = read_tensors(folder / SIDECAR) if os.path.lexists(folder / SIDECAR) else {}
    for name in beside:
        if not re.fullmatch(r"layers\.(0|[1-9][0-9]*)\.(phi|scale)", name):
            raise UserError(f"adapter: in {str(folder / SIDECAR)!r}, tensor {name!r} is neither phi nor scale")
    return state | beside, rank, settings.scaling
