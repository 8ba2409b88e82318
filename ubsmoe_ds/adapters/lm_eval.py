"""Register trained adapters as a model of EleutherAI's lm-evaluation-harness; needs the extra `lm-eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ubsmoe_ds.adapters.adapter import load_trained, read_adapter
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.models.hf_config import check_alignment
from ubsmoe_ds.models.tokenizer import read_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HFLM_ARGUMENTS = {  # those that `HFLM` heeds when it is given a model; it ignores all others in silence
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "softmax_dtype"),
    *("mixed_precision_dtype", "add_bos_token", "prefix_token_id"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
}


@register_model("ubsmoe")
class UBSMoELM(HFLM):
    """The harness's transformers model with our blocks in it, so with phi, the learned scale and any K.

    Args:
        adapter: folder of an adapter.
        base: as model.path; None: the model that the adapter was trained on.
        k: active experts; None: the adapter's.
        dtype: precision of the frozen weights, "float32" or "bfloat16".
        device: where to run. The harness names cuda:0 unless it is told otherwise; without CUDA that is the CPU.
        rest: arguments of `HFLM`, see `HFLM_ARGUMENTS`.

    Raises:
        UserError: for an adapter that cannot be read, a K that the router cannot choose, a device that is not there, or
            another argument.
    """

    def __init__(
        self,
        adapter: str,
        base: str | None = None,
        k: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        **rest: Any,
    ) -> None:
        rest.pop("trust_remote_code", None)  # the harness adds it for data sets; no code of the model's folder is run
        _check_names(rest)
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} must be one of {', '.join(DTYPES)}")
        stored = read_adapter(Path(adapter), base)
        place = _device(device)
        model = load_trained(stored, DTYPES[dtype])
        if place.type != "cpu" and dtype == "bfloat16":
            check_alignment(model.hf.config, "dtype=bfloat16")
        model.to(place)
        most = model.layers[0].gate.candidates
        if k is not None and not (type(k) is int and 1 <= k <= most):
            raise UserError(f"k: {k} must be 1 to {most}, the experts that the router may choose from")
        model.set_active_experts(k or model.layers[0].gate.k)
        tokenizer = read_tokenizer(stored.base, model.hf.config.vocab_size)
        super().__init__(pretrained=model.hf, tokenizer=tokenizer, **rest)


def _device(name: str | None) -> torch.device:
    """Return the device of this name, or the CPU with a line if there is no CUDA."""
    if not torch.cuda.is_available() and (name is None or name.startswith("cuda")):
        say("note: torch sees no CUDA device; the model runs on the CPU", error=True)
        return torch.device("cpu")
    try:
        device = torch.device(name or "cuda")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name!r} cannot be used ({str(error).splitlines()[0]}); use cpu") from error
    return device


def _check_names(rest: Mapping[str, Any]) -> None:
    for name in rest:
        if name not in HFLM_ARGUMENTS:
            known = ", ".join(["adapter", "base", "k", "dtype", "device", *sorted(HFLM_ARGUMENTS)])
            raise UserError(f"--model_args: {name!r} is not known; use {known}")
