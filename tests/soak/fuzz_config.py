"""Fuzz of the experiment: the YAML, the DeepSpeed JSON beside it, overrides, and characters of names."""

import json
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.soak.fuzz_cases import (
    DAMAGES,
    SCALARS,
    TEXTS,
    VALUES,
    Surface,
    Violation,
    damaged,
    mutations,
    places,
    reads_only,
)
from tests.support.ranks import REPO
from ubsmoe_ds.config.loading import load_experiment

TINY = (REPO / "ds_configs" / "tiny.yaml").read_text(encoding="utf-8")
TINY_JSON = (REPO / "ds_configs" / "tiny.json").read_text(encoding="utf-8")
EXPERIMENT = yaml.safe_load(TINY)
WHOLE = EXPERIMENT | {"deepspeed": json.loads(TINY_JSON)}
KEYS = sorted({key for path in places(WHOLE) for key in path if isinstance(key, str)})
NAMED = [*KEYS, "exp.yaml", "unknown key", "a key must be", "override", "is no text", "in quotes"]
NAMED += [
    "etc/passwd",
    ": is nested",
    "the number is too large",
    "must be a finite number",
]  # follow any key


def is_sound(path: Path, overrides: tuple[str, ...] = ()) -> None:
    """Load an experiment; an accepted one must be plain JSON, because a run writes it, and stay in its folder."""
    exp = load_experiment(path, overrides)
    recorded = exp.model_dump_json()
    json.loads(recorded, parse_constant=lambda text: _no(f"{text} was accepted"))
    for name in (exp.name, *(client.name for client in exp.clients)):
        if Path(name).name != name or len(name.encode()) > 200:
            _no(f"name {name[:40]!r} was accepted")


def _no(text: str) -> None:
    raise Violation(text)


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")


def check_document(document: Any, folder: Path) -> bool:
    """Check an experiment with changed values, those of its DeepSpeed section included."""
    (folder / "exp.yaml").write_bytes(_yaml(document))
    return reads_only(lambda: is_sound(folder / "exp.yaml"), folder, NAMED)


def check_json(document: Any, folder: Path) -> bool:
    (folder / "exp.yaml").write_text(TINY, encoding="utf-8")
    (folder / "tiny.json").write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return reads_only(lambda: is_sound(folder / "exp.yaml"), folder, ["tiny.json", "deepspeed"])


def check_bytes(data: bytes, folder: Path) -> bool:
    """Check a file that may not be an experiment, or not YAML."""
    (folder / "exp.yaml").write_bytes(data.replace(b"MARKER", str(folder / "marker").encode()))
    (folder / "tiny.json").write_text(TINY_JSON, encoding="utf-8")
    answer = reads_only(lambda: is_sound(folder / "exp.yaml"), folder, NAMED)
    if answer and data in HOSTILE and data not in HARMLESS:
        _no("what must be refused was accepted")
    return answer


def check_overrides(overrides: tuple[str, ...], folder: Path) -> bool:
    own = [text.partition("=")[0] for text in overrides]
    return reads_only(lambda: is_sound(REPO / "ds_configs" / "tiny.yaml", overrides), folder, [*NAMED, *own])


def _laughs(depth: int, merge: bool) -> bytes:
    """Return YAML of the "billion laughs" kind: each line expands to ten times the one before."""
    lines = ["a0: &a0 {x: lol}"]
    for n in range(1, depth):
        inner = ", ".join([f"*a{n - 1}"] * 10)
        lines.append(f"a{n}: &a{n} {{<<: [{inner}]}}" if merge else f"a{n}: &a{n} [{inner}]")
    return "\n".join([*lines, TINY, f"bf16: *a{depth - 1}"]).encode()


NESTED = [("[" * n + "]" * n).encode() for n in (50, 900, 20_000)] + [
    ("{a: " * n + "1" + "}" * n).encode() for n in (50, 900, 20_000)
]
HOSTILE = [
    b"",
    b"\x00",
    b"\x00" * 4096,
    b"\xff\xfe" + "name: x".encode("utf-16-le"),
    b"\xef\xbb\xbf" + TINY.encode(),
    b"null",
    b"---\n---\n",
    b"a: 1\n--- \nb: 2\n",
    b"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [MARKER]]",
    TINY.encode() + b"seedling: !!python/object/apply:os.system ['touch MARKER']\n",
    TINY.encode() + b"model2: !!python/name:os.system\n",
    b"&a {name: *a}",
    b"name: &a [*a]\n",
    TINY.encode() + b"lora2: &l {x: *l}\n",
    TINY.replace("train: {", "train: &t {<<: *t, ").encode(),
    TINY.encode() + b"seed: 3\n",
    TINY.replace("name: phone", "name: phone, name: other").encode(),
    TINY.encode() + b"1: 2\n",
    TINY.encode() + b"? [a]\n: 2\n",
    TINY.encode() + b"? {a: b}\n: 2\n",
    TINY.replace("seed: 0", "seed: 0x" + "f" * 6000).encode(),
    TINY.replace("seed: 0", "seed: " + "9" * 6000).encode(),
    TINY.replace("seed: 0", "seed: 1:30").encode(),
    TINY.replace("seed: 0", "seed: !!binary aGVsbG8=").encode(),
    TINY.replace("seed: 0", "seed: !!set {a, b}").encode(),
    TINY.replace("seed: 0", "seed: 2020-13-45").encode(),
    TINY.replace("seed: 0", "seed: 2020-01-01").encode(),
    TINY.replace("name: tiny", "name: " + "x" * 300).encode(),
    TINY.replace("name: tiny", "name: " + "x" * 2_000_000).encode(),
    TINY.replace("name: phone", "name: " + "x" * 300).encode(),
    TINY.encode() + b"output: " + b"x/" * 3000 + b"\n",
    TINY.encode() + b"output: " + b"x" * 300 + b"\n",
    TINY.replace(
        "deepspeed: tiny.json", "deepspeed: {optimizer: {type: AdamW, params: {lr: .nan}}, train_batch_size: 16}"
    ).encode(),
    TINY.replace(
        "deepspeed: tiny.json", "deepspeed: {optimizer: {type: AdamW, params: {lr: 2020-01-01}}, train_batch_size: 16}"
    ).encode(),
    TINY.replace("deepspeed: tiny.json", "deepspeed: ../../../etc/passwd").encode(),
    TINY.replace("deepspeed: tiny.json", "deepspeed: /dev/zero").encode(),
    TINY.replace("deepspeed: tiny.json", 'deepspeed: "a\\0b"').encode(),
    *(_laughs(depth, merge) for depth in (3, 9, 30) for merge in (False, True)),
    *NESTED,
    *(b"name: " + nested for nested in NESTED),
    b"a: 1\n" * 200_000,
]
HARMLESS = [
    b"\xef\xbb\xbf" + TINY.encode(),
    TINY.replace("seed: 0", "seed: 1:30").encode(),  # 90, in YAML 1.1
    TINY.encode() + b"output: " + b"x/" * 3000 + b"\n",  # the file system decides
    TINY.encode() + b"output: " + b"x" * 300 + b"\n",
]
JSONS = [
    b"",
    b"{",
    b"[]",
    b"NaN",
    b"\xff",
    b'{"train_batch_size": 16, "optimizer": {"type": "AdamW", "params": {"lr": NaN}}}',
    b'{"train_batch_size": 16, "optimizer": {"type": "AdamW", "params": {"lr": 1e999}}}',
    b'{"train_batch_size": 16, "train_batch_size": 24, "optimizer": {"type": "AdamW"}}',
    b'{"train_batch_size": 16, "optimizer": {"type": "\\ud800"}}',
    b'{"train_batch_size": ' + b"9" * 6000 + b', "optimizer": {"type": "AdamW"}}',
    *NESTED,
]
TINY_DEEPSPEED = json.loads(TINY_JSON) | {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
TINY_DEEPSPEED["zero_optimization"] |= {"offload_optimizer": {"device": "none"}, "compute_grad_norm": True}


def _keys() -> st.SearchStrategy[str]:
    known = [".".join(map(str, path)) for path in places(WHOLE)]
    return st.one_of(st.sampled_from(known), st.text("abc.019-", max_size=6), TEXTS)


PATHS = ["../x", "/abs", "a/../../b", "..", ".", "a\x00b", "~", "a b", "-x", "con\n", "é", "x" * 300]
NAMES = st.one_of(st.sampled_from(PATHS), st.text(max_size=5))
OVERRIDE = st.one_of(
    st.builds("{}={}".format, _keys(), VALUES.map(lambda value: json.dumps(value))),
    st.builds("{}={}".format, _keys(), st.one_of(TEXTS, st.text("{}[]&*!: ,-'\"\n1a", max_size=12))),
    st.builds("{}={}".format, st.sampled_from(["name", "output", "clients.0.name", "model.path"]), NAMES),
    st.sampled_from(
        ["seed=" + "9" * 6000, "seed=0x" + "f" * 6000, "seed=2020-13-45", "seed=" + "[" * 20_000, "clients.-1.budget=2"]
    ),
    TEXTS,
)
SURFACES = [
    Surface("yaml", mutations(WHOLE), check_document, share=3),
    Surface(
        "yaml_bytes",
        st.one_of(
            st.sampled_from(HOSTILE),
            st.binary(max_size=64),
            DAMAGES.map(lambda how: damaged(TINY.encode(), *how)),
            st.builds(lambda text: TINY.encode() + text.encode("utf-8", "surrogatepass"), st.text(max_size=20)),
        ),
        check_bytes,
        share=2,
    ),
    Surface(
        "json",
        st.one_of(
            mutations(TINY_DEEPSPEED),
            SCALARS,
            st.sampled_from(JSONS),
            DAMAGES.map(lambda how: damaged(TINY_JSON.encode(), *how)),
        ),
        check_json,
        share=2,
    ),
    Surface("overrides", st.lists(OVERRIDE, min_size=1, max_size=2).map(tuple), check_overrides, share=2),
]
