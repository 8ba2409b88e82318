"""Where a model's files are: built in, in a folder, or on the Hugging Face hub. Imports no torch."""

from functools import cache
from pathlib import Path

from ubsmoe_ds.base.errors import UserError

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # weights, config and tokenizer; no code
BUILTIN_MODELS = {"builtin:tiny_olmoe": Path(__file__).parent / "tiny_olmoe"}


@cache
def model_folder(path: str) -> Path:
    """The folder that `model.path` names: built in, on disk, or `hub:NAME[@REVISION]` in the hub's local cache.

    What the cache lacks is fetched, unless HF_HUB_OFFLINE is set.

    Raises:
        UserError: for an unknown name, and if the hub has or gives no such model.
    """
    if path.startswith("builtin:") and path not in BUILTIN_MODELS:
        raise UserError(f"model.path: {path!r} is not built in; use one of {sorted(BUILTIN_MODELS)} or a folder")
    if not path.startswith("hub:"):
        return BUILTIN_MODELS.get(path, Path(path))
    from huggingface_hub import snapshot_download  # the network is used only when the config asks for it

    name, _, revision = path.removeprefix("hub:").partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=MODEL_FILES))
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"model.path: {path!r} cannot be had ({message}); check the name, or use a folder") from error
