"""From the command to the first step: wall seconds until each line of a run of four clients on the built-in model.

    python benchmarks/startup.py --repeats 3

Runs `deepspeed launch/train.py` with one round of one step, and reports the median time of
    ready       all ranks are started, models built, DeepSpeed's worlds joined
    evaluated   the base model is evaluated on all rows
    round       the first step of every client, the merge, and the evaluation after it are done
`imports` is the CPU time that the imports of a rank take: once in a job where ranks are forked
(ubsmoe_ds/launching/fast_start.py), else once for each rank.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import add_output_option, machine, say

REPOSITORY = Path(__file__).resolve().parent.parent
LINES = {"ready": "startup:", "evaluated": "before ", "round": "round "}
IMPORTS = "import time, ubsmoe_ds.federation.build; print(time.process_time())"


def run(folder: str) -> dict[str, float]:
    """Seconds until the first line of each kind."""
    config = REPOSITORY / "ds_configs" / "compare_tiny.yaml"
    overrides = ["name=startup", f"output={folder}", "overwrite=true", "train.rounds=1", "train.local_steps=1"]
    command = [str(Path(sys.executable).with_name("deepspeed")), "launch/train.py", "--config", str(config), *overrides]
    environment = dict(os.environ, DS_ACCELERATOR="cpu", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    start = time.perf_counter()
    found: dict[str, float] = {}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for name, beginning in LINES.items():
                if line.startswith(beginning):
                    found.setdefault(name, time.perf_counter() - start)
    if process.returncode or set(found) != set(LINES):
        raise SystemExit(f"error: the run ended with {process.returncode}; it printed {sorted(found)}")
    return found


def main() -> None:
    """Repeat and report medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    add_output_option(parser)
    options = parser.parse_args()
    if not options.json:
        print(machine())
    environment = dict(os.environ, DS_ACCELERATOR="cpu", PYTHONPATH=str(REPOSITORY))
    imports = [
        float(subprocess.check_output([sys.executable, "-c", IMPORTS], env=environment, text=True).split()[-1])
        for _ in range(options.repeats)
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(folder) for _ in range(options.repeats)]
    say({"bench": "startup", "impl": "imports", "ranks": 1, "ms": 1e3 * statistics.median(imports)}, options.json)
    for name in LINES:
        seconds = statistics.median(found[name] for found in runs)
        say({"bench": "startup", "impl": name, "ranks": 4, "ms": 1e3 * seconds}, options.json)


if __name__ == "__main__":
    main()
