"""Find a model's files: built in, in a folder, or on the Hugging Face hub. Imports no torch."""

import os
from functools import cache
from pathlib import Path

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import leads_out, read_json

CONFIG_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # config and tokenizer; no code
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BUILTIN_MODELS = {"builtin:tiny_olmoe": Path(__file__).parent / "tiny_olmoe"}


@cache
def model_folder(path: str, *, weights: bool = False) -> Path:
    """Return the folder that `model.path` names: built in, on disk, or `hub:NAME[@REVISION]` in the hub's local cache.

    Config and tokenizer that the cache lacks are fetched, weights only if asked for; nothing if HF_HUB_OFFLINE is set.

    Args:
        path: as in `model.path`.
        weights: whether the folder must hold the weights too. They are those of the commit whose config was returned.

    Raises:
        UserError: for an unknown name, and if the hub has or gives no such model.
    """
    if path.startswith("builtin:") and path not in BUILTIN_MODELS:
        raise UserError(f"model.path: {path!r} is not built in; use one of {sorted(BUILTIN_MODELS)} or a folder")
    if not path.startswith("hub:"):
        return BUILTIN_MODELS.get(path, Path(path))
    name, _, revision = path.removeprefix("hub:").partition("@")
    if weights:
        folder = model_folder(path)
        return _fetch(path, name, folder.name, (*CONFIG_FILES, SINGLE, *_shards(folder / INDEX)))
    return _fetch(path, name, revision or None, CONFIG_FILES)


def _shards(index: Path) -> list[str]:
    """Return the files that an index names; a model may have others beside them, the same weights in another form.

    One that cannot be read names none here: `WeightFiles` says so.
    """
    try:
        files = read_json(index)["weight_map"].values()
        return sorted({file for file in files if isinstance(file, str)})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _fetch(path: str, name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # the network is used only when the config asks for it

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        remedy = remedy_for(error)
        raise UserError(f"model.path: {path!r} cannot be fetched ({message}); {remedy}, or use a folder") from error


def refuse_links_out(folder: Path) -> None:
    """Check that nothing that is copied from a model folder lies outside: a link may lead to a secret of this user.

    In the hub's cache, `models--NAME/snapshots/COMMIT`, files are links to `models--NAME/blobs`.

    Raises:
        UserError: naming a file of a model that is a link out of the folder.
    """
    cache = folder.resolve().parents[1] if len(folder.resolve().parents) > 1 else folder
    is_cached = folder.resolve().parent.name == "snapshots" and cache.name.startswith("models--")
    for pattern in (*CONFIG_FILES, "*.safetensors", "additional_chat_templates", "additional_chat_templates/*"):
        for path in sorted(folder.glob(pattern)):
            if leads_out(path, folder) and not (is_cached and not leads_out(path, cache / "blobs")):
                raise UserError(
                    f"model.path: {str(path)!r} is a link that leads out of the model's folder, so its content is not "
                    "written to another; put the file itself there"
                )


def remedy_for(error: Exception) -> str:
    """Return what to do where the hub gave nothing: it depends on whether the hub was reached at all."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "accept its terms on the hub and log in (hf auth login)"
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | ValueError):
        return "check the name"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set and the cache lacks it: unset it, or fetch it where there is a network"
    return "the hub was not reached or gave an error: check the network"
