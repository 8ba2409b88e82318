"""The model class for lm-evaluation-harness against our own model; skipped if the harness is not installed."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.ranks import REPO, clean_environment
from ubsmoe_ds.adapters import peft_format
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.models.hub import BUILTIN_MODELS

FOLDER = BUILTIN_MODELS["builtin:tiny_olmoe"]


@pytest.fixture
def adapter(tmp_path):
    """Save an adapter of the built-in model whose phi matters and whose LoRA factors are small."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(3):
        for name, shape in {"gate": (128, 128), "up": (128, 128), "down": (128, 128)}.items():
            state[f"layers.{layer}.experts.{name}.lora_A"] = torch.randn(16, 2, shape[1], generator=generator) / 10
            state[f"layers.{layer}.experts.{name}.lora_B"] = torch.randn(16, shape[0], 2, generator=generator) / 10
        state[f"layers.{layer}.phi"] = torch.rand(16, generator=generator) * 2 - 1
    facts = {"k": "2", "k_max": "8", "candidates": "16", "gate_rescale": "none", "base_model": "builtin:tiny_olmoe"}
    peft_format.save(
        tmp_path / "adapter",
        state,
        lora_rank=2,
        alpha=2.0,
        base_model=str(FOLDER),
        facts=facts,
        family=FAMILIES["olmoe"],
    )
    return tmp_path / "adapter"


def test_log_likelihoods_match_ours(adapter):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from transformers import AutoTokenizer

    from ubsmoe_ds.adapters.adapter import load_trained, read_adapter
    from ubsmoe_ds.adapters.lm_eval import UBSMoELM

    rows = synthetic.rows(5, seed=3)
    requests = [
        Instance("loglikelihood", {}, (row["instruction"], "\n" + row["answer"]), n) for n, row in enumerate(rows)
    ]
    model = load_trained(read_adapter(adapter))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    values = {}
    for k in (2, 8):
        values[k] = [value for value, _ in UBSMoELM(str(adapter), k=k, batch_size=2).loglikelihood(requests)]
        model.set_active_experts(k)
        for row, value in zip(rows, values[k], strict=True):
            whole = tokenizer(row["instruction"] + "\n" + row["answer"])["input_ids"]
            prompt = len(tokenizer(row["instruction"])["input_ids"])
            ids = torch.tensor([whole])
            with torch.no_grad():
                logp = model(ids, torch.ones_like(ids, dtype=torch.bool))[0].log_softmax(-1)
            expected = sum(float(logp[at - 1, whole[at]]) for at in range(prompt, len(whole)))
            assert value == pytest.approx(expected, abs=1e-3)
    assert values[2] != pytest.approx(values[8], abs=0.1)  # K has an effect
    for k in (17, 2.5, "two"):
        with pytest.raises(UserError, match=f"k: {k} must be 1 to 16"):
            UBSMoELM(str(adapter), k=k)
    UBSMoELM(str(adapter), trust_remote_code=True)  # the harness adds this for data sets
    if not torch.cuda.is_available():  # and names this device unless it is told another
        assert UBSMoELM(str(adapter), device="cuda:0").device == torch.device("cpu")
    with pytest.raises(UserError, match="--device: 'tpu' cannot be used"):
        UBSMoELM(str(adapter), device="tpu")
    for name in ("K", "peft", "revision"):  # ignored, they would evaluate another model than was meant
        with pytest.raises(UserError, match=f"--model_args: '{name}' is not known; use adapter, base, k, "):
            UBSMoELM(str(adapter), **{name: 2})


def harness(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the command with the modules of a folder in front of installed ones."""
    environment = clean_environment()
    environment["PYTHONPATH"] = f"{folder}:{environment['PYTHONPATH']}"
    command = [sys.executable, "launch/harness.py", *arguments]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=100)


def test_a_missing_harness_is_named(tmp_path):
    """A stand-in module hides an installed harness, as on a machine without it."""
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(name='lm_eval')\n")
    done = harness(tmp_path, "run", "--model", "ubsmoe")
    assert done.returncode == 2 and done.stderr == "error: harness: lm_eval is missing; pip install '.[lm-eval]'\n"


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_help_needs_no_harness(tmp_path):
    done = harness(tmp_path, "--help")
    assert done.returncode == 0 and "--model ubsmoe" in done.stdout and done.stderr == ""


def test_the_harness_gets_the_evaluate_of_hugging_face(tmp_path):
    """The script's folder has an evaluate.py, which must not hide the package; stand-ins for both packages."""
    (tmp_path / "evaluate.py").write_text("print('the package')\n")
    (tmp_path / "lm_eval.py").write_text("import evaluate\nraise ModuleNotFoundError(name='lm_eval')\n")
    assert harness(tmp_path).stdout == "the package\n"
