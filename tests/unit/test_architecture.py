"""Design rules: a file imports only from its own folder and those above it, few files know MPI, nothing is pickled."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ubsmoe_ds"
# from the top: a folder imports only from folders above it; within a folder imports make no circle
LAYERS = [
    "base",
    "moe",
    "models",
    "config",
    "launching",
    "mpi",
    "data",
    "client",
    "adapters",
    "planning",
    "aggregation",
    "checkpoint",
    "federation",
    "studies",
    "run",
]
KNOWS_MPI = {
    "mpi.start",
    "mpi.collectives",
    "mpi.exits",
    "mpi.finished",
    "mpi.join",
    "mpi.world",
    "mpi.preemption",
    "mpi.ulfm",
    "aggregation.exchange",
    "aggregation.shared_memory",
}
# a mistake in a config, a hostfile or rows is reported before seconds of imports
FREE_OF_TORCH = ("base", "config", "launching", "data.s", "data.partition", "data.row_table", "data.f", "models.hub")
HEAVY = {"torch", "deepspeed", "transformers"}
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(source: str) -> set[str]:
    """Full names of everything imported anywhere in the file, type checking left out."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(name: str) -> set[str]:
    """Files of the package that a file imports."""
    return {other.removeprefix("ubsmoe_ds.") for other in imports(SOURCES[name])} & set(SOURCES)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_upwards(name):
    layer = name.split(".")[0]
    above = set(LAYERS[: LAYERS.index(layer) + 1])
    below = {other for other in own_imports(name) if other.split(".")[0] not in above}
    assert not below, f"{name} imports {sorted(below)} from below"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_import_circle(name):
    seen, rest = set(), own_imports(name)
    while rest:
        other = rest.pop()
        if other not in seen:
            seen.add(other)
            rest |= own_imports(other)
    assert name not in seen


def test_the_top_has_few_files():
    assert len(list(PACKAGE.glob("*.py"))) <= 4


def test_few_files_know_mpi():
    assert {name for name in SOURCES if any(i.split(".")[0] == "mpi4py" for i in imports(SOURCES[name]))} == KNOWS_MPI


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith(FREE_OF_TORCH)])
def test_no_torch_before_the_config_is_checked(name):
    heavy = {i.split(".")[0] for i in imports(SOURCES[name])} & HEAVY
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


def test_one_place_prints():
    """Names and values from files may hold control characters, which `base/terminal.py` escapes."""
    commands = {path.name: path.read_text() for path in (PACKAGE.parent / "launch").glob("[!_]*.py")}
    for name, source in (SOURCES | commands).items():
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
        if name != "base.terminal":
            assert not calls & {"print", "sys.stdout.write", "sys.stderr.write"}, f"{name}: use say"
