"""Start a run from an earlier adapter, ours or one of PEFT's: the first state of every client, and where it came from.

The clients' LoRA ranks, targets and base must be those of the adapter; nothing of it may be lost. Clients of a smaller
LoRA rank get its first LoRA ranks, as they do in a merge.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ubsmoe_ds.adapters import peft_config, peft_format
from ubsmoe_ds.adapters.adapter import WEIGHTS, Adapter, read_adapter
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.fingerprint import model_digest

FILES = (peft_format.CONFIG, peft_format.WEIGHTS, peft_format.SIDECAR)


def start_from_adapter(exp: Experiment, client: Client) -> dict[str, str]:
    """Write the adapter of `lora.from` into a client's model.

    Args:
        exp: the experiment.
        client: on this rank.

    Returns:
        Where it came from, for the record: folder, digest of its files, and, if known, the run's id and round.

    Raises:
        UserError: naming the key to change if it does not fit.
    """
    folder = Path(exp.lora.start)
    if (folder / WEIGHTS).exists():
        raise _unfit(
            "from", folder, "holds whole weights (FLoRA's), no adapter; export it with --merge and set model.path"
        )
    adapter = read_adapter(folder, exp.model.path)
    _check_base(exp, folder, adapter.facts)
    _check_fit(exp, folder, adapter)
    places, first = client.model.named_state(), client.model.layers[0].experts.first
    _check_places(folder, adapter, places, client)
    for name, value in adapter.state.items():
        place = places[name]
        if ".experts." in name:
            value = value[first : first + len(place)]
        if name.endswith(".lora_A"):
            value = value[..., : place.shape[-2], :]
        elif name.endswith(".lora_B"):
            value = value[..., : place.shape[-1]]
            factor = adapter.scaling / (exp.lora.alpha / exp.lora_rank(client.config))
            value = value * factor if factor != 1 else value
        assert isinstance(place, torch.nn.Parameter)
        client.gradient_hook.masters.write(place, value.to(place.device))
    known = {key: adapter.facts[key] for key in ("run_id", "round") if key in adapter.facts}
    return {"folder": str(folder.resolve()), "digest": _digest(folder)} | known


def _unfit(key: str, folder: Path, problem: str) -> UserError:
    return UserError(f"lora.{key}: {str(folder)!r} {problem}")


def _check_base(exp: Experiment, folder: Path, facts: Mapping[str, str]) -> None:
    """Raise if the adapter says that it was trained on another model."""
    recorded = facts.get("base_model")
    if not recorded:
        recorded = peft_config.read_config(folder / peft_format.CONFIG).get("base_model_name_or_path")
    if not isinstance(recorded, str) or not recorded:
        return
    name, here = recorded.removeprefix("hub:").partition("@")[0], exp.model.path.removeprefix("hub:").partition("@")[0]
    if name == here or Path(recorded).resolve() == exp.model_dir.resolve():
        return
    if Path(recorded).is_dir() and model_digest(Path(recorded)) == model_digest(exp.weights_dir):
        return
    raise _unfit(
        "from", folder, f"was trained on {recorded!r}, but model.path is {exp.model.path!r}; set one to fit the other"
    )


def _check_fit(exp: Experiment, folder: Path, adapter: Adapter) -> None:
    """Raise if the experiment has no place for a part of the adapter, or would begin with parts of its own."""
    names = list(adapter.state)
    if adapter.lora_rank != exp.lora.rank:
        raise _unfit("from", folder, f"has LoRA rank {adapter.lora_rank}; set lora.rank={adapter.lora_rank}")
    attention = any(".attention." in name for name in names)
    if attention != exp.lora.attention:
        has = "has" if attention else "has no"
        raise _unfit("from", folder, f"{has} LoRA on attention; set lora.attention={str(attention).lower()}")
    if any(name.endswith(".router.weight") for name in names) and not exp.router.trainable:
        raise _unfit("from", folder, "has trained routers; set router.trainable=true")
    if any(name.endswith(".phi") and bool(adapter.state[name].any()) for name in names) and not exp.dmr.enabled:
        raise _unfit("from", folder, "has phi, which is used with dmr.enabled=true only")
    if any(name.endswith(".scale") for name in names):
        raise _unfit("from", folder, "is one client's own, with the scales of its gates; name the run's shared adapter")


def _check_places(folder: Path, adapter: Adapter, places: Mapping[str, Tensor], client: Client) -> None:
    """Raise if a tensor has no place in the model, or a LoRA factor of the model is missing."""
    experts = client.model.layers[0].num_experts
    for name, value in adapter.state.items():
        place = places.get(name)
        if place is None or _whole_shape(name, place, experts, adapter.lora_rank) != list(value.shape):
            raise _unfit("from", folder, f"has the tensor {name!r} {[*value.shape]}, for which the model has no place")
    for name in places:
        if name.endswith((".lora_A", ".lora_B")) and name not in adapter.state:
            raise _unfit("from", folder, f"has no tensor {name!r}, which would begin anew; give it one for each target")


def _whole_shape(name: str, place: Tensor, experts: int, lora_rank: int) -> list[int]:
    """Return the shape that a tensor of the model has with all experts and LoRA ranks."""
    shape = list(place.shape)
    if ".experts." in name:
        shape[0] = experts
    if name.endswith(".lora_A"):
        shape[-2] = lora_rank
    elif name.endswith(".lora_B"):
        shape[-1] = lora_rank
    return shape


def _digest(folder: Path) -> str:
    """Return a digest of the adapter's files: 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for name in FILES:
        if (folder / name).exists():
            state.update((folder / name).read_bytes())
    return state.hexdigest()
