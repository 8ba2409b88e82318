"""Fuzz of the commands' options; each command runs in this process as if a shell had started it."""

import atexit
import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from hypothesis import strategies as st

from launch import compare, evaluate, export, prepare
from tests.soak.fuzz_cases import Surface, Violation, check_line, snapshot
from tests.soak.fuzz_rows import GOOD
from tests.support import tiny
from tests.support.ranks import REPO
from tests.unit.models.test_upcycle import llama
from ubsmoe_ds.adapters import peft_format
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.models.hub import BUILTIN_MODELS
from ubsmoe_ds.moe.gate import GateConfig

VOCABULARY = 768  # of the built-in tokenizer
WORDS = ["", " ", "-1", "0", "1", "3", "40", "999999999999", "9" * 5000, "nan", "inf", "1e3", "0x10", "\u0663", "1 2"]
WORDS += ["nowhere", "rows.jsonl", "used", "used/file", "pipe", "fresh", "../x", "a\nb", "\udcff", "x" * 5000, "--k"]
WORDS += ["jsonl:nowhere", "jsonl:", "csv:rows.jsonl", "hub:", "builtin:none", "adapter", "moe", "dense", "/dev/null"]
GOOD_LINES = {
    "evaluate": [
        "--adapter {adapter} --data jsonl:{rows} --k 1 2 --rows 1 --batch-size 2 --max-length 64 --seed 0",
        "--adapter {adapter} --data jsonl:{rows} --exact-match --max-new-tokens 2 --json --dtype bf16 --base {moe}",
        "--model {moe} --data jsonl:{rows} --format cloze",
    ],
    "export": ["--adapter {adapter} --merge fresh", "--adapter {adapter} --merge fresh --base {moe}"],
    "prepare": [
        "upcycle --model {dense} --experts 2 --k 1 --out fresh --seed 1",
        "split --model {dense} --data jsonl:{rows} --experts 4 --shared 8 --ks 1 2 --tokens 64 --length 16 --out fresh",
    ],
    "compare": ["--config {config} --methods topk --seeds 0 1 --out fresh train.rounds=1", "--ablate --seeds 3"],
}


@cache
def prepared() -> Path:
    """Make a folder with `moe` and its `adapter`, `dense`, both with a tokenizer, and rows; return it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-commands-"))
    atexit.register(shutil.rmtree, folder)
    tiny.hf_model(vocab_size=VOCABULARY).save_pretrained(folder / "moe")
    llama(vocab_size=VOCABULARY, eos_token_id=1, pad_token_id=0).save_pretrained(folder / "dense")
    for name in ("moe", "dense"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BUILTIN_MODELS["builtin:tiny_olmoe"] / file, folder / name)
    spec = UBSMoESpec(GateConfig(k=2, candidates=8), lora_rank=2, lora_alpha=4.0)
    places = load(folder / "moe", spec).named_state()
    state = {name: torch.randn(value.shape) / 9 for name, value in places.items() if ".lora_" in name or "phi" in name}
    facts = {"k": "2", "k_max": "4", "candidates": "8", "base_model": str(folder / "moe")}
    peft_format.save(
        folder / "adapter",
        state,
        lora_rank=2,
        alpha=4.0,
        base_model=str(folder / "moe"),
        facts=facts,
        family=FAMILIES["olmoe"],
    )
    questions = [GOOD.replace(b"Which?", f"Which {n}?".encode()) for n in range(60)]
    (folder / "rows.jsonl").write_bytes(b"\n".join(questions))
    return folder


def arguments_of(name: str) -> st.SearchStrategy[list[str]]:
    """Return a strategy that damages good command lines."""

    @st.composite
    def worse(draw: st.DrawFn) -> list[str]:
        places = {key: str(prepared() / key) for key in ("adapter", "moe", "dense")}
        places |= {"rows": str(prepared() / "rows.jsonl"), "config": str(REPO / "ds_configs" / "compare_tiny.yaml")}
        line = [word.format(**places) for word in draw(st.sampled_from(GOOD_LINES[name])).split()]
        for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
            at = draw(st.integers(0, len(line)))
            how = draw(st.sampled_from(["replace"] * 4 + ["insert", "remove", "option"]))
            word = draw(st.one_of(st.sampled_from(WORDS), st.text("abc-=.0\u20ac", max_size=6)))
            line[at : at + (how in ("replace", "remove"))] = {"remove": [], "option": ["--" + word]}.get(how, [word])
        return line

    return worse()


def run_in_process(module: ModuleType, call: Callable[[], int], name: str, line: Sequence[str]) -> tuple[int, str]:
    """Run a command; return (exit code, its stderr)."""
    errors = io.StringIO()
    before = sys.argv
    sys.argv = [f"launch/{name}.py", *line]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = call()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = before
    return code, errors.getvalue()


def checker(module: ModuleType, name: str) -> Callable[[list[str], Path], bool]:
    def check(line: list[str], folder: Path) -> bool:
        (folder / "used").mkdir()
        (folder / "used" / "file").write_text("mine")
        (folder / "rows.jsonl").write_bytes(GOOD)
        shutil.copytree(prepared() / "adapter", folder / "adapter")
        before, shared = snapshot(folder), snapshot(prepared())
        call = (lambda: compare.main(line, lambda command, log: 1)) if name == "compare" else module.main
        with contextlib.chdir(folder):
            code, errors = run_in_process(module, call, name, line)
        after = snapshot(folder)
        lost = [path for path in before if after.get(path) != before[path]]
        left = [path for path in after.keys() - before.keys() if code == 2 or "unfinished" in path]
        if lost or left or snapshot(prepared()) != shared:
            raise Violation(f"files changed: exit code {code}, lost {lost}, left {sorted(left)}")
        return _verdict(code, errors, name)

    return check


def _verdict(code: int, errors: str, name: str) -> bool:
    if code == 0 or (name == "compare" and code == 1):  # its jobs cannot run here
        return True
    if code != 2:
        raise Violation(f"exit code {code}: {errors[-300:]!r}")
    if not errors.startswith("error: ") or errors.count("\n") != 1:
        raise Violation(f"not one line that starts with error: {errors[:300]!r}")
    check_line(errors.removesuffix("\n"))
    return False


COMMANDS = {"evaluate": evaluate, "export": export, "prepare": prepare, "compare": compare}
SURFACES = [
    Surface(f"{name}.py", arguments_of(name), checker(module, name), share=0.3) for name, module in COMMANDS.items()
]
