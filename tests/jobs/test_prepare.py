"""launch/prepare.py as a user calls it, and the models it leaves in training."""

import json
import shutil
import subprocess

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.jobs import train
from tests.support.ranks import REPO, clean_environment, warm_python
from tests.unit.models.test_upcycle import llama
from ubsmoe_ds.models.hub import BUILTIN_MODELS


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small Llama with the built-in model's tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    llama(vocab_size=len(tokenizer), **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepare(*arguments):
    command = [*warm_python(), "launch/prepare.py", *map(str, arguments)]
    environment = clean_environment()
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)


def test_upcycle_writes_a_checkpoint(dense, tmp_path):
    done = prepare("upcycle", "--model", dense, "--experts", 4, "--k", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([tokenizer("is it true?")["input_ids"]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense)(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    again = prepare("upcycle", "--model", dense, "--out", tmp_path / "out")
    assert again.returncode == 2 and "is in use; name a new folder" in again.stderr


def test_layers_that_the_config_leaves_out_are_missed(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    done = prepare("upcycle", "--model", folder, "--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "tensors that its config.json does not describe, first 'model.layers.1." in done.stderr


def test_split_model_trains(dense, tmp_path):
    """Split, recover, say the losses; then a round of the federation on it."""
    sizes = ["--experts", 4, "--shared", 8, "--ks", 1, 2, 4, "--tokens", 2048, "--length", 32]
    recovery = ["--recover-steps", 3, "--recover-rows", 4]
    done = prepare("split", "--model", dense, "--data", "synthetic", *sizes, *recovery, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["layer 1/2", "layer 2/2"]
    assert sum(line.startswith("loss on held-out text:") for line in lines) == 2 and "dense" in lines[2]
    assert sum(line.startswith("recovery step") for line in lines) == 3
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 4, 8)
    overrides = [f"model.path={tmp_path / 'out'}", "train.rounds=1"]
    overrides += ["clients=[{name: a, budget: 0.25}, {name: b, budget: 1.0}]", "data.rows=200", "data.eval_rows=20"]
    overrides += ["train.local_steps=2", f"output={tmp_path}"]
    code, output = train(*overrides)
    assert code == 0, output
    assert "K 1 4 of 4 experts" in output and (tmp_path / "tiny" / "adapter").is_dir()


SPLIT = ["split", "--model", "{dense}", "--data", "synthetic", "--experts", "4", "--shared", "8", "--ks", "1"]
SPLIT += ["--tokens", "64", "--length", "16"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["split", "--model", "{dense}", "--data", "synthetic", "--experts", "7", "--ks", "4"],
            "cannot be divided among 7 experts evenly",
        ),
        (["split", "--model", "{dense}", "--data", "synthetic", "--ks", "99"], "--ks: [99] must each be 1 to 16"),
        (["split", "--model", "{dense}", "--data", "synthetic", "--experts", "1"], "--experts: 1 must be 2 to 1024"),
        (
            [*SPLIT, "--recover-steps", "3", "--lr", "1e30", "--recover-rows", "1"],
            "loss on held-out text is nan at K 1, recovered; lower --lr",
        ),
        (["upcycle", "--model", "{dense}", "--experts", "2", "--k", "3"], "--k: 3 must be 1 to 2"),
        (["upcycle", "--model", "builtin:tiny_olmoe"], "model_type is 'olmoe'; only dense models of type 'llama'"),
        (["upcycle", "--model", "nowhere"], "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, message, dense, tmp_path):
    done = prepare(*(text.replace("{dense}", str(dense)) for text in arguments), "--out", tmp_path / "out")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert list(tmp_path.iterdir()) == []
