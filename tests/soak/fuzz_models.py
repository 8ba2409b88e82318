"""Fuzz of adapters and model folders: damaged bytes, other tensors, hostile configs, and paths that are not files."""

import atexit
import json
import os
import pickle
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.soak.fuzz_cases import (
    DAMAGES,
    NUMBERS,
    TEXTS,
    VALUES,
    Bomb,
    Surface,
    Violation,
    damaged,
    mutations,
    reads_only,
)
from tests.support import tiny
from ubsmoe_ds.adapters import peft_format
from ubsmoe_ds.adapters.adapter import load_trained, read_adapter
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.moe.gate import GateConfig

RANK = 2
INDEX = "model.safetensors.index.json"
ADAPTER_FILES = (peft_format.CONFIG, peft_format.WEIGHTS, peft_format.SIDECAR)
SPEC = UBSMoESpec(GateConfig(k=3, candidates=8), lora_rank=RANK, lora_alpha=6.0, lora_attention=True)


@cache
def prepared() -> Path:
    """Make `single` and `sharded`, a random model in one file and in shards, and its `adapter`; return their folder."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-models-"))
    atexit.register(shutil.rmtree, folder)
    model = tiny.hf_model()
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    torch.manual_seed(1)
    places = load(folder / "single", SPEC).named_state()
    state = {name: torch.randn(value.shape) for name, value in places.items() if ".lora_" in name or "router" in name}
    state |= {name: torch.rand(value.shape) for name, value in places.items() if name.endswith(".phi")}
    facts = {"format": "ubsmoe_ds.adapter.2", "base_model": str(folder / "single"), "method": "ub_smoe"}
    facts |= {"k": "2", "k_max": "4", "candidates": "8", "modulate": "weights", "gate_rescale": "learned"}
    base = str(folder / "single")
    peft_format.save(
        folder / "adapter", state, lora_rank=RANK, alpha=6.0, base_model=base, facts=facts, family=FAMILIES["olmoe"]
    )
    sidecar = folder / "adapter" / peft_format.SIDECAR
    save_file(load_file(sidecar), sidecar, metadata=facts)  # without the digest, which would refuse all changed weights
    return folder


def load_adapter(folder: Path) -> None:
    adapter = read_adapter(folder)
    bad = [name for name, value in adapter.state.items() if not bool(value.isfinite().all())]
    if bad:
        raise Violation(f"NaN or Inf was accepted: {bad[0]}")
    load_trained(adapter)


def load_model(folder: Path) -> None:
    """Load a model, and compute with an accepted one."""
    model = load(folder, UBSMoESpec(GateConfig(k=2, candidates=2))).eval()
    ids = torch.arange(4).view(1, 4)
    with torch.no_grad():
        model(ids, torch.ones_like(ids, dtype=torch.bool))


def _copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(prepared() / name, folder / name))


def check_adapter(copy: Path, names: list[str]) -> bool:
    return reads_only(partial(load_adapter, copy), copy.parent, names)


def check_model(copy: Path, names: list[str]) -> bool:
    return reads_only(partial(load_model, copy), copy.parent, names)


def damage_adapter(case: tuple[str, Any], folder: Path) -> bool:
    name, how = case
    copy = _copied("adapter", folder)
    (copy / name).write_bytes(damaged((copy / name).read_bytes(), *how))
    return check_adapter(copy, [name, "tensor", "adapter:", "model.path:"])


def damage_model(case: tuple[str, int, Any], folder: Path) -> bool:
    kind, number, how = case
    copy = _copied(kind, folder)
    files = sorted(path for path in copy.iterdir() if path.name != "generation_config.json")
    path = files[number % len(files)]
    path.write_bytes(damaged(path.read_bytes(), *how))
    return check_model(copy, [path.name, str(copy)])


def change_adapter_config(change: Any, folder: Path) -> bool:
    copy = _copied("adapter", folder)
    (copy / peft_format.CONFIG).write_text(json.dumps(change))
    answer = check_adapter(copy, [peft_format.CONFIG, "tensor"])
    means = {"r": RANK, "peft_type": "LORA", **PEFT_OPTIONS}
    other = [key for key, value in means.items() if answer and (change.get(key) or None) != (value or None)]
    if other:
        raise Violation(f"another meaning was accepted: {other}")
    return answer


def change_facts(facts: dict[str, str], folder: Path) -> bool:
    copy = _copied("adapter", folder)
    facts = {"base_model": str(prepared() / "single")} | facts
    save_file(load_file(copy / peft_format.SIDECAR), copy / peft_format.SIDECAR, metadata=facts)
    return check_adapter(copy, [peft_format.SIDECAR, "model.path", "config.json", "adapter:"])


def change_tensor(case: tuple[str, int, str, Any], folder: Path) -> bool:
    """Rename or drop one tensor, give it another shape or dtype, or put NaN or Inf in it."""
    file, number, how, value = case
    copy = _copied("adapter", folder)
    tensors = load_file(copy / file)
    name = sorted(tensors)[number % len(tensors)]
    tensor = tensors.pop(name)
    if how == "rename":
        tensors[value] = tensor
    elif how == "add":
        tensors |= {name: tensor, value: tensor.clone()}
    elif how == "shape":
        tensors[name] = {0: tensor.flatten(), 1: tensor[:1], 2: tensor[None], 3: tensor[..., :1], 4: tensor[:0]}[value]
    elif how == "dtype":
        tensors[name] = tensor.to(value)
    elif how == "value":
        tensor.view(-1)[number % tensor.numel()] = value
        tensors[name] = tensor
    facts = {"k": "2"} if file == peft_format.SIDECAR else None
    save_file({key: value.contiguous() for key, value in tensors.items()}, copy / file, metadata=facts)
    answer = check_adapter(copy, ["tensor", name, file])
    if answer and how in ("rename", "drop") and value != name:
        raise Violation(f"a lost tensor was not missed: {name}")
    return answer


def change_model_config(config: Any, folder: Path) -> bool:
    copy = _copied("single", folder)
    (copy / "config.json").write_text(json.dumps(config).replace('"MARKER"', json.dumps(str(folder / "marker"))))
    (copy / "modeling.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'marker')!r}).touch()\n")
    return check_model(copy, ["config.json", str(copy)])


def change_index(index: Any, folder: Path) -> bool:
    copy = _copied("sharded", folder)
    (copy / INDEX).write_text(json.dumps(index))
    return check_model(copy, [INDEX, "safetensors", str(copy)])


def replace_file(case: tuple[str, int, str], folder: Path) -> bool:
    """Replace a file of an adapter or a model by something else, or put a pickled one beside it or in its place."""
    kind, number, what = case
    copy = _copied(kind, folder)
    files = sorted(path for path in copy.iterdir() if path.name != "generation_config.json")
    path = files[number % len(files)]
    data = path.read_bytes()
    if what not in ("beside", "shared"):
        path.unlink()
    _put(what, path, data, folder)
    answer = (check_adapter if kind == "adapter" else check_model)(copy, [path.name, "safetensors", str(copy)])
    harmless = ("link", "beside", "shared")
    if answer and what not in harmless and not (what in ("missing", "bin") and path.name in MAY_LACK):
        raise Violation(f"{path.name} as {what} was accepted")
    return answer


MAY_LACK = (peft_format.SIDECAR,)  # without it an adapter counts as PEFT's own


def _put(what: str, path: Path, data: bytes, folder: Path) -> None:
    bomb = pickle.dumps(Bomb(folder / "marker"))
    if what == "pickle":
        path.write_bytes(bomb)
    elif what == "zipped":
        torch.save({"x": Bomb(folder / "marker")}, path)
    elif what in ("bin", "beside"):
        for name in ("adapter_model.bin", "pytorch_model.bin", "model.pt"):
            path.with_name(name).write_bytes(bomb)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "link":
        (folder / "elsewhere").write_bytes(data)
        path.symlink_to(folder / "elsewhere")
    elif what in ("loop", "dead", "/dev/zero", "/dev/null"):
        path.symlink_to(path.name if what == "loop" else "nothing" if what == "dead" else what)
    elif what == "long_header":
        path.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    elif what == "nested":
        path.write_bytes(b"[" * 200_000)
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "big":
        with path.open("wb") as file:
            file.truncate(2**36)  # a hole, which takes no disk


WHATS = ["pickle", "zipped", "bin", "beside", "pipe", "folder", "link", "loop", "dead", "/dev/zero", "/dev/null"]
WHATS += ["long_header", "nested", "empty", "missing"]
FACTS = {"format": "ubsmoe_ds.adapter.2", "method": "ub_smoe", "k": "2", "k_max": "4", "candidates": "8"}
FACTS |= {"modulate": "weights", "gate_rescale": "learned"}
FACT = st.one_of(TEXTS, NUMBERS.filter(lambda n: abs(n) < 10**1000 if isinstance(n, int) else True).map(str))
FACT = FACT.filter(lambda text: text.isascii() or not any(0xD800 <= ord(c) <= 0xDFFF for c in text))
SHAPES = st.tuples(st.just("shape"), st.integers(0, 4))
DTYPES = st.tuples(
    st.just("dtype"),
    st.sampled_from([torch.int8, torch.int64, torch.bool, torch.bfloat16, torch.float16, torch.float64]),
)
TENSOR_NAMES = st.sampled_from(
    [
        "x",
        "",
        "layers.0.phi",
        "layers.0.experts.gate.lora_A",
        "layers.9.phi",
        "base_model.model.model.layers.9.mlp.gate.weight",
        "base_model.model.model.layers.0.mlp.experts.lora_A.weight",
        "base_model.model.lm_head.weight",
        "a\nb",
    ]
)
CHANGES = st.one_of(
    st.tuples(st.sampled_from(["rename", "add"]), TENSOR_NAMES),
    st.tuples(st.just("drop"), st.none()),
    SHAPES,
    DTYPES,
    st.tuples(st.just("value"), st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30])),
)


def _later(name: str, file: str, **more: Any) -> st.SearchStrategy[Any]:
    """Return a strategy of mutations of a prepared file, which is made when it is first needed."""
    return st.deferred(lambda: mutations(json.loads((prepared() / name / file).read_text()) | more))


PEFT_OPTIONS = {"use_dora": False, "fan_in_fan_out": False, "layer_replication": None}
SURFACES = [
    Surface("adapter", st.tuples(st.sampled_from(ADAPTER_FILES), DAMAGES), damage_adapter, share=1.5),
    Surface("adapter_json", _later("adapter", peft_format.CONFIG, **PEFT_OPTIONS), change_adapter_config, share=1.5),
    Surface(
        "facts",
        st.builds(lambda d: {str(k): str(v) for k, v in d.items()}, mutations(FACTS, values=FACT)),
        change_facts,
    ),
    Surface(
        "tensors",
        st.tuples(st.sampled_from(ADAPTER_FILES[1:]), st.integers(0, 60), CHANGES).map(lambda t: (t[0], t[1], *t[2])),
        change_tensor,
    ),
    Surface("model", st.tuples(st.sampled_from(["single", "sharded"]), st.integers(0, 9), DAMAGES), damage_model, 2),
    Surface(
        "model_json",
        _later("single", "config.json", auto_map={"AutoConfig": "modeling.C"}, quantization_config=None),
        change_model_config,
        share=2,
    ),
    Surface(
        "index",
        st.deferred(
            lambda: mutations(
                json.loads((prepared() / "sharded" / INDEX).read_text()),
                values=st.one_of(
                    VALUES, st.sampled_from(["../single/model.safetensors", "..", "/etc/passwd", "config.json"])
                ),
            )
        ),
        change_index,
    ),
    Surface(
        "odd_files",
        st.tuples(st.sampled_from(["adapter", "single", "sharded"]), st.integers(0, 9), st.sampled_from(WHATS)),
        replace_file,
        share=0.5,
    ),
]
