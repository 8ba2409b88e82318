"""A trained adapter as a model of EleutherAI's lm-evaluation-harness, for its tasks; needs the extra `lm-eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ubsmoe_ds.adapters.adapter import load_trained, read_adapter
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.tokenizer import read_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OF_HFLM = {  # what `HFLM` heeds of a model that it is given; all else would go by unseen
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "softmax_dtype"),
    *("mixed_precision_dtype", "add_bos_token", "prefix_token_id"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
}


@register_model("ubsmoe")
class UBSMoELM(HFLM):
    """transformers' model of the harness with our blocks in it, so with phi, gate rescaling and any K.

    Args:
        adapter: folder of an adapter.
        base: as model.path; None: the model that it was trained on.
        k: active experts; None: the adapter's.
        dtype: of the frozen weights, "float32" or "bfloat16".
        device: where it runs; None: an accelerator if there is one.
        rest: as `HFLM`, see `OF_HFLM`.

    Raises:
        UserError: for an adapter that cannot be read, a K that the router cannot choose, or another argument.
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
        rest.pop("trust_remote_code", None)  # the harness adds it for data sets; of the model's folder no code is run
        _check_names(rest)
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} must be one of {', '.join(DTYPES)}")
        found = read_adapter(Path(adapter), base)
        model = load_trained(found, DTYPES[dtype]).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        most = model.layers[0].gate.candidates
        if k is not None and not (type(k) is int and 1 <= k <= most):
            raise UserError(f"k: {k} must be 1 to {most}, the experts that the router may choose from")
        model.set_active_experts(k or model.layers[0].gate.k)
        tokenizer = read_tokenizer(found.base, model.hf.config.vocab_size)
        super().__init__(pretrained=model.hf, tokenizer=tokenizer, **rest)


def _check_names(rest: Mapping[str, Any]) -> None:
    for name in rest:
        if name not in OF_HFLM:
            known = ", ".join(["adapter", "base", "k", "dtype", "device", *sorted(OF_HFLM)])
            raise UserError(f"--model_args: {name!r} is not known; use {known}")
