"""Design rules: a file imports only from layers above it, few modules know MPI, and nothing is pickled."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ubsmoe_ds"
# from the top: each file may import only from lines above its own
LAYERS = [
    "errors",
    "command_line",
    "files",
    "plain_yaml",
    "methods",
    "sections",
    "placement",
    "config",
    "models.families",
    "config_file",
    "launchers",
    "start_mpi",
    "relaunch",
    "run_folder",
    "federation.merge",
    "federation.modulation",
    "moe.pseudo_gradient",
    "cost",
    "rank_load",
    "memory_model",
    "planning",
    "fitting",
    "memory",
    "checkpoint",
    "same_experiment",
    "rendezvous",
    "heartbeat",
    "world",
    "stopping",
    "survival",
    "liveness",
    "data.synthetic",
    "data.sources",
    "data.partition",
    "inputs",
    "data.shares",
    "data.batches",
    "moe.gate",
    "moe.expert_mlp",
    "moe.experts",
    "moe.layer",
    "moe.collector",
    "moe.moments",
    "models.checkpoint",
    "models.tokenizer",
    "models.hf_config",
    "models.causal_lm",
    "models.conversion",
    "workload",
    "models.peft_format",
    "models.merged",
    "models.upcycle",
    "gradients",
    "federation.host_memory",
    "federation.exchange",
    "federation.units",
    "federation.server_optimizer",
    "federation.server",
    "federation.pruning",
    "client",
    "federation.statistics",
    "federation.state",
    "federation.position",
    "federation.keeper",
    "fidelity",
    "fidelity_report",
    "evaluation",
    "monitor",
    "federation.adapter",
    "lm_eval_model",
    "federation.metrics",
    "federation.views",
    "federation.outcome",
    "federation.rounds",
    "federation.build",
    "federation.survivors",
    "run",
    "comparison",
]
KNOWS_MPI = {"start_mpi", "world", "stopping", "survival", "federation.exchange", "federation.host_memory"}
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(source: str) -> set[str]:
    """Full names of everything imported anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_file_has_a_layer():
    assert sorted(SOURCES) == sorted(LAYERS)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_upwards(name):
    above = set(LAYERS[: LAYERS.index(name)])
    own = {other.removeprefix("ubsmoe_ds.") for other in imports(SOURCES[name]) if other.startswith("ubsmoe_ds.")}
    assert own & set(LAYERS) <= above, f"{name} imports {sorted(own & set(LAYERS) - above)} from below"


def test_few_modules_know_mpi():
    knows = {name for name, source in SOURCES.items() if any(i.split(".")[0] == "mpi4py" for i in imports(source))}
    assert knows == KNOWS_MPI


def test_config_is_free_of_torch():
    """A mistake in the config must be told before seconds of imports."""
    for name in (
        "errors",
        "command_line",
        "files",
        "plain_yaml",
        "methods",
        "sections",
        "config",
        "config_file",
        "relaunch",
        "run_folder",
        "data.synthetic",
        "data.sources",
        "data.partition",
        "data.shares",
        "placement",
        "cost",
        "rank_load",
        "memory_model",
        "planning",
        "fitting",
        "comparison",
    ):
        heavy = {i.split(".")[0] for i in imports(SOURCES[name])} & {"torch", "deepspeed", "transformers"}
        assert not heavy, f"{name} imports {heavy}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_is_pickled_or_evaluated(name):
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(SOURCES[name])) if isinstance(node, ast.Call)}
    forbidden = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "pickle.loads", "pickle.dumps"}
    assert not calls & forbidden and "pickle" not in imports(SOURCES[name])
    # mpi4py's lower-case methods pickle whatever they are given
    pickling = {".bcast", ".gather", ".scatter", ".allgather", ".alltoall", ".allreduce", ".send", ".recv"}
    methods = {"." + call.rsplit(".", 1)[-1] for call in calls if "comm" in call.rsplit(".", 1)[0]}
    assert not methods & pickling
