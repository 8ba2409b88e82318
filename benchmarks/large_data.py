"""Measure what a job of many rows takes: time until the first round may begin, and the memory of each rank.

    python benchmarks/large_data.py --gigabytes 0.02 2 --ranks 4

For each size a file of that many Alpaca rows is made (own text, about 460 bytes each) and a job of one-rank clients is
run on it with the built-in model, one round of one step. `rows_s` is from the start of the command until all ranks have
read and dealt theirs (rows in memory are tokenised then, too) and hold the model; `first_s` until the first evaluation
is done, after which the first step follows; `cpu_s` what the busiest rank used, the one that reads. `private_mb` is the
largest memory that a rank had to itself at any time (Private_Dirty of its smaps_rollup), `mapped_mb` what it then had
mapped of files beside, which the ranks share and the system may take back.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

from measuring import add_output_option, machine, say

from ubsmoe_ds.launching.fast_start import SERVER

REPO = Path(__file__).resolve().parent.parent
MARK = "UBSMOE_DS_BENCHMARK"
WORDS = [first + last for first in ("wa", "te", "ri", "no", "ku", "mel", "sor") for last in ("ter", "ve", "na", "der")]


def write_rows(path: Path, size: float) -> int:
    """Write rows of so many bytes together; return their number."""
    draw, written, count = random.Random(0), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            asked, said = (" ".join(draw.choices(WORDS, k=draw.randint(5, most))) for most in (45, 85))
            row = {"instruction": f"{count}: {asked}", "input": "", "output": said}
            written += file.write(json.dumps(row) + "\n")
            count += 1
    return count


def memory(pid: int) -> tuple[float, float, float] | None:
    """Return (megabytes private and mapped, CPU seconds) of a process; None if it has ended."""
    try:
        used = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines[1:]}
    private = sizes["Private_Dirty"]
    return private, sizes["Rss"] - private, sum(map(int, used)) / os.sysconf("SC_CLK_TCK")


def ranks(mark: str) -> list[int]:
    """Return the processes of a job that hold a model or are about to: all but its launchers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            is_of_job = f"{MARK}={mark}".encode() in path.read_bytes()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if is_of_job and b"train.py" in command and b"mpi4py" in command and b"mpiexec" not in command:
            found.append(int(path.parent.name))
    return found


def run(rows: Path, count: int, folder: Path) -> dict[str, float]:
    """Run a job of `count` clients and return its figures."""
    mark, peaks, seconds, done = uuid.uuid4().hex, {}, {}, threading.Event()

    def watch() -> None:
        while not done.wait(2):
            for pid in ranks(mark):
                now = memory(pid)
                if now is not None:
                    peaks[pid] = max(peaks.get(pid, (0.0, 0.0)), now[:2])
                    seconds[pid] = now[2]

    clients = ", ".join(f"{{name: c{n}, budget: 1.0}}" for n in range(count))
    command = [sys.executable, "launch/train.py", f"data.source={rows}", f"clients=[{clients}]", f"output={folder}"]
    command += ["data.partition=iid", "data.rows=null", "data.eval_rows=40", "train.rounds=1", "train.local_steps=1"]
    start = time.perf_counter()
    environment = os.environ | {MARK: mark, SERVER: "/none"}  # each rank a process of its own, not a fork of a server
    process = subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    times: dict[str, float] = {}
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        for beginning, name in (("rows (weight)", "rows_s"), ("before", "first_s")):
            if line.startswith(beginning):
                times[name] = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.wait():
        raise SystemExit("".join(output))
    private, shared = max(peaks.values())
    return {**times, "cpu_s": max(seconds.values()), "private_mb": private, "mapped_mb": shared}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.02, 2.0], help="sizes of the file of rows")
    parser.add_argument("--ranks", type=int, default=4, help="clients, of one rank each")
    add_output_option(parser)
    options = parser.parse_args()
    if not options.json:
        print(machine(), flush=True)
    for size in options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            count = write_rows(rows, size * 1e9)
            figures = {"gigabytes": size, "rows": count, **run(rows, options.ranks, Path(folder) / "runs")}
        say(figures, options.json)


if __name__ == "__main__":
    main()
