"""README and docs say nothing that does not exist: links, paths, commands, config keys; and their examples run."""

import contextlib
import importlib
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel

from tests.support import tiny
from tests.support.ranks import REPO
from tests.unit.test_architecture import LAYERS
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.server import Server, Usage
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config import reference
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.population import written_out
from ubsmoe_ds.data.sources import evaluation_rows
from ubsmoe_ds.models.families import read_facts
from ubsmoe_ds.moe.estimators import ESTIMATORS

PAGES = ["README.md", "CONTRIBUTING.md", "slurm/README.md", *(f"docs/{p.name}" for p in (REPO / "docs").glob("*.md"))]
TOP = "ubsmoe_ds|launch|tests|benchmarks|ds_configs|slurm|results|docs"
PATH = re.compile(rf"(?<![\w./-])(?:{TOP})/[\w./-]*\w/?")
WRITTEN = ("--out", "--write")  # options whose value need not exist yet
# `model.safetensors` is no key
FILES = {"py", "sbatch", "md", "yaml", "json", "jsonl", "safetensors", "csv", "toml", "cfg"}
# options of other programs come before the script
SCRIPT = r"(?:launch|benchmarks|tests/soak)/\w+\.py|slurm/\w+\.sbatch"
COMMAND = re.compile(rf"(?<!\S)(?:\S*/)?({SCRIPT})(?!\S)(.*)")
RUN_BY = {"slurm/train.sbatch": "launch/train.py", "slurm/compare.sbatch": "launch/compare.py"}
NO_PARSER = "launch/harness.py"  # lm-evaluation-harness has its own


def text_of(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[str]:
    """Fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def inline(page: str) -> list[str]:
    """Inline code of a page."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def command_lines(page: str) -> Iterator[tuple[str, str]]:
    """(script, what follows it) of every command, from blocks and from inline code; comments and pipes are cut off."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *inline(page)]:
        match = COMMAND.search(line)
        if match:
            yield match[1], re.split(r"\s#|[|);>]", match[2])[0]


def anchors(page: str) -> set[str]:
    """Names of a page's headings in links, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        goal = ((REPO / page).parent / path).resolve() if path else REPO / page
        assert goal.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(goal.relative_to(REPO))), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    text = re.sub(rf"(?:{'|'.join(WRITTEN)}) \S+", "", text_of(page))
    for path in PATH.findall(text):
        assert (REPO / path).exists(), f"{page}: {path}"
    folders = TOP.split("|")
    known = [f"/{path.relative_to(REPO)}" for top in folders for path in (REPO / top).rglob("*.py")]
    for name in inline(page):
        if re.fullmatch(r"[\w/]+\.py", name):
            assert any(path.endswith(f"/{name}") for path in known), f"{page}: {name}"


@cache
def options(script: str, subcommand: str = "") -> set[str]:
    """Options of a command, as its own parser prints them; of benchmarks and soaks, as their source names them."""
    if not script.startswith("launch/"):
        return set(re.findall(r'"(--?[a-z][\w-]*)"', text_of(script) + text_of("benchmarks/measuring.py")))
    parse = importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parse([*([subcommand] if subcommand else []), "--help"])
    usage = printed.getvalue().replace(importlib.import_module(parse.__module__).__doc__ or "", "")
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", usage))


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_their_options(page):
    for name, rest in command_lines(page):
        script = RUN_BY.get(name, name)
        if script == NO_PARSER:
            continue
        words = rest.split()
        subcommand = words[0] if script == "launch/prepare.py" and words else ""
        for word in words:
            if word.startswith("-"):
                assert word.split("=")[0] in options(script, subcommand), f"{page}: {name} {word}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z_ -]+):", text_of("Makefile"), re.MULTILINE))
    known = {name for line in targets for name in line.split()}
    lines = [line for block in blocks(page) for line in block.splitlines()]
    for line in [*lines, *inline(page)]:
        match = re.match(r"(?:\w+=\S+ )*make ([a-z -]+)", line)
        for target in match[1].split() if match else []:
            assert target in known, f"{page}: make {target}"


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Class of a section or of the items of a list; None for a plain key."""
    kind = model.model_fields[name].annotation
    return next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)), None)


def check_key(key: str, where: str) -> None:
    """Follow `merge.rule`, `clients.0.budget` or `clients[].source` through the sections."""
    model: type[BaseModel] | None = Experiment
    for part in key.replace("[]", "").split("."):
        if model is None:  # inside of a mapping, such as DeepSpeed's optimizer
            return
        if part.isdecimal():
            continue
        assert part in model.model_fields, f"{where}: {key}"
        model = section_of(model, part)


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_exist(page):
    sections = [name for name in Experiment.model_fields if section_of(Experiment, name)]
    for code in inline(page):
        key = code.split("=")[0].split(":")[0]
        dotted = re.fullmatch(r"[a-z_]+(?:\[\])?(?:\.\w+)+", key)
        if dotted and key.split(".")[0].removesuffix("[]") in sections and key.split(".")[-1] not in FILES:
            check_key(key, page)
    for name, rest in command_lines(page):
        for word in rest.split() if name != NO_PARSER else []:
            if re.match(r"[a-z_.0-9]+=", word):
                check_key(word.split("=")[0], page)


def check_mapping(value: dict[str, Any], model: type[BaseModel], where: str) -> None:
    """Check the keys of a part of an experiment, whatever is missing in it."""
    for name, inner in value.items():
        assert name in model.model_fields, f"{where}: {name}"
        section = section_of(model, name)
        for part in inner if isinstance(inner, list) else [inner]:
            if section is not None and isinstance(part, dict):
                check_mapping(part, section, where)


@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_have_known_keys(page):
    for block in blocks(page, "yaml"):
        check_mapping(written_out(yaml.safe_load(block)), Experiment, page)


def test_tests_that_pages_name_exist():
    """docs/security.md proves each of its statements by a test."""
    named = [found for page in PAGES for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of(page))]
    assert len(named) > 20
    for path, name in named:
        assert re.search(rf"^def {name}\(", text_of(path), re.MULTILINE), f"{path}::{name}"
    rows = [
        line for line in text_of("docs/security.md").partition("## What leaves")[2].splitlines() if line[:2] == "| "
    ]
    statements = [row for row in rows if not row.startswith("| statement")]
    assert statements and all("::test_" in row for row in statements)


def test_the_experiment_of_the_readme_is_valid():
    (block,) = blocks("README.md", "yaml")
    raw = yaml.safe_load(block)
    exp = Experiment.model_validate(raw | {"num_experts": 64, "k_max": 8})
    assert [exp.active_experts(client) for client in exp.clients] == [2, 8]  # as its comments say
    for started in ("--ntasks=", "mpiexec -n "):
        assert f"{started}{exp.world_size} " in text_of("README.md")


def test_the_page_of_config_keys_is_up_to_date():
    written = reference.PAGE.read_text(encoding="utf-8")
    assert reference.page() == written, "run python -m ubsmoe_ds.config.reference --write"
    assert "|  |\n" not in written, "a key without a description"


def test_pages_can_be_read_in_minutes():
    assert len(text_of("README.md").splitlines()) <= 200
    for page in PAGES:
        if page.startswith("docs/"):
            most = 300 if (REPO / page) == reference.PAGE else 200  # that one is looked up, not read
            assert 60 <= len(text_of(page).splitlines()) <= most, page


def test_architecture_lists_the_folders_in_their_order():
    table = re.search(r"^\| folder of .*?\n\n", text_of("docs/architecture.md"), re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)`", table[0], re.MULTILINE) == LAYERS


def test_the_glossary_is_short():
    glossary = text_of("docs/architecture.md").partition("## Glossary")[2]
    words = re.findall(r"^\| (?!word|---)([^|]+) \|", glossary, re.MULTILINE)
    assert 10 <= len(words) <= 20 and len(set(words)) == len(words)


def add_examples(page: str, section: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Add the examples of a section to the modules that their first lines name; return what is left, the tests."""
    text = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", text_of(page), re.MULTILINE | re.DOTALL)
    tests: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text[1], re.MULTILINE | re.DOTALL):
        path, _, table = re.match(r"# (\S+?\.py)(: one row of )?(\w+)?\n", block).groups()
        assert (REPO / path).exists(), path
        if path.startswith("tests/"):
            exec(block, tests)
            continue
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        if table:
            for name, row in eval("{" + block + "}", dict(vars(module))).items():
                monkeypatch.setitem(getattr(module, table), name, row)
            continue
        before = dict(vars(module))
        exec(block, vars(module))
        for name in vars(module).keys() - before.keys():
            value = vars(module).pop(name)
            monkeypatch.setattr(module, name, value, raising=False)  # so that it is gone after the test
    return {name: test for name, test in tests.items() if name.startswith("test_")}


def test_the_example_of_a_merge_rule(monkeypatch):
    (by_hand,) = add_examples("docs/extending.md", "A merge rule", monkeypatch).values()
    by_hand()
    exp = tiny.experiment("unused", [{"budget": 0.5}, {"budget": 0.5}], merge={"rule": "sign_vote"})
    server = Server(exp, [Unit("layers.0.experts.0.gate", "lora", expert=0, lora=(3, 4))], [0.25, 0.75])
    server.start([np.zeros(21, dtype=np.float32)] * 2)
    usage = Usage(torch.ones(2, 1, 8, dtype=torch.float64), torch.full((1, 8), 0.25))
    replies = server.merge([np.full(21, value, dtype=np.float32) for value in (-4.0, 8.0)], usage, exp.lora_ranks)
    for reply in replies:
        np.testing.assert_array_equal(reply, np.full(21, 7.0))  # + wins; 0.25 * 4 + 0.75 * 8


def test_the_example_of_an_estimator(monkeypatch):
    (against_a_loop,) = add_examples("docs/extending.md", "A PG estimator", monkeypatch).values()
    against_a_loop()
    with monkeypatch.context() as broken:
        row = ESTIMATORS["down_only"]
        broken.setitem(ESTIMATORS, "down_only", replace(row, function="token_weighted"))
        with pytest.raises(AssertionError):
            against_a_loop()


def test_the_example_of_a_model_family(monkeypatch, tmp_path):
    (logits,) = add_examples("docs/extending.md", "A model family", monkeypatch).values()
    logits(tmp_path)
    with pytest.raises(UserError, match="model_type 'mellum'; supported"):
        monkeypatch.undo()
        read_facts(tmp_path)


def test_the_example_of_a_method(monkeypatch):
    add_examples("docs/extending.md", "A method", monkeypatch)
    exp = tiny.experiment("unused", [{"budget": 0.5}], method="topk_median")
    assert exp.merge.rule == "median" and not exp.dmr.enabled


def test_the_example_of_a_data_format(monkeypatch, tmp_path):
    (by_hand,) = add_examples("docs/extending.md", "A data format", monkeypatch).values()
    by_hand()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "one", "response": "two"}\n{"instruction": "three"}\n')
    with pytest.raises(UserError, match="line 2: field 'response' is missing.*a good row of format dolly: .*Add up"):
        evaluation_rows(str(rows), None, 0)
    monkeypatch.undo()
    with pytest.raises(UserError, match="line 1: fits no format"):
        evaluation_rows(str(rows), None, 0)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (test_links_lead_somewhere, "[a](docs/nowhere.md)"),
        (test_links_lead_somewhere, "[a](docs/architecture.md#nowhere)"),
        (test_paths_exist, "see `ubsmoe_ds/nowhere.py`"),
        (test_paths_exist, "see `moe/nowhere.py`"),
        (test_commands_have_their_options, "```\npython launch/train.py --nowhere\n```"),
        (test_commands_have_their_options, "`python launch/prepare.py upcycle --tokens 3`"),
        (test_commands_have_their_options, "`python tests/soak/fuzz.py --nowhere`"),
        (test_make_targets_exist, "`make nowhere`"),
        (test_config_keys_exist, "`merge.nowhere`"),
        (test_config_keys_exist, "`clients.0.nowhere=3`"),
        (test_config_keys_exist, "```\ndeepspeed launch/train.py train.nowhere=3\n```"),
        (test_yaml_blocks_have_known_keys, "```yaml\nclients: [{nowhere: 1}]\n```"),
    ],
)
def test_each_check_can_fail(check, text, monkeypatch):
    monkeypatch.setattr("tests.unit.test_docs.text_of", lambda page: text if page == "README.md" else _read(page))
    with pytest.raises(AssertionError, match="nowhere|--tokens"):
        check("README.md")


_read = text_of
