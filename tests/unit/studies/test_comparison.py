"""Check tables and pictures of made-up run folders against figures worked by hand."""

import json
import math
import os
from pathlib import Path

import pytest

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.methods import ABLATIONS, PRESETS
from ubsmoe_ds.data.fingerprint import data_digest, machine, model_digest
from ubsmoe_ds.studies.comparison_cohorts import cohort_notes
from ubsmoe_ds.studies.comparison_picture import picture
from ubsmoe_ds.studies.comparison_runs import ROUND_COLUMNS, Run, check_inputs, collect, departures, machines
from ubsmoe_ds.studies.comparison_table import by_budget, markdown, paired_differences

CONFIG = "ds_configs/compare_tiny.yaml"
TWO = "clients=[{name: poor, budget: 0.5}, {name: rich, budget: 1.0}]"
LOSS = {"topk": (0.30, 0.40, 0.50), "ub_smoe": (0.29, 0.37, 0.45)}  # by seed; the second client's is 0.1 less


def finish(exp: Experiment, loss: float) -> None:
    """Write the folder that a finished run leaves.

    The client at place i has loss - 0.1 i, accuracy 1 - that, and 0.01 more of it normalised by length.
    """
    names, rounds = [client.name for client in exp.clients], exp.train.rounds
    rows = [
        {"client": name, "flops_ratio": 0.25 * (i + 1), "tokens_per_second": 300.0 * (i + 1)}
        | {"seconds_per_step": 0.05 * (i + 1), "loss_before": 0.9, "accuracy_before": 0.1}
        | {"loss_after": loss - 0.1 * i, "accuracy_after": 1 - (loss - 0.1 * i)}
        for i, name in enumerate(names)
    ]
    records = []
    for number in range(rounds + 1):
        metrics = {f"megabytes_sent/{name}": 1.5 * (i + 1) for i, name in enumerate(names)} if number else {}
        if number:
            metrics["utilisation/cv"] = 0.5 - 0.1 * number
        if number % exp.evaluation.every == 0 or number == rounds:
            metrics |= {"eval/loss": loss + rounds - number, "eval/accuracy": 0.5, "eval/utilisation_cv": 0.1 * number}
            metrics |= {f"eval_{view}/accuracy_norm_all": 1.01 - loss + 0.1 * i for i, view in enumerate(exp.views)}
        seconds = {f"seconds_local/{name}": 2.0 * (i + 1) for i, name in enumerate(names)} if number else {}
        records.append({"round": number, "metrics": metrics, "seconds": seconds})
    exp.run_dir.mkdir(parents=True, exist_ok=True)
    (exp.run_dir / "config.json").write_text(exp.model_dump_json(indent=2))
    (exp.run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (exp.run_dir / "summary.json").write_text(json.dumps({"clients": rows, "utilisation_cv_after": 0.2}))


def made_up(folder: Path, clients: str = TWO, methods: tuple[str, ...] = ("ub_smoe", "topk"), seeds: int = 3) -> list:
    """Return finished runs with the losses of `LOSS`."""
    runs = []
    for method in methods:
        for seed in range(seeds):
            job_keys = [
                f"method={method.partition('-')[0]}",
                f"seed={seed}",
                f"name={method}-{seed}",
                f"output={folder}",
            ]
            exp = load_experiment(CONFIG, [clients, *job_keys, "train.rounds=3", "evaluation.every=2"])
            finish(exp, LOSS.get(method, (0.6, 0.6, 0.6))[seed])
            runs.append(Run(method, seed, exp))
    return runs


def test_one_row_per_client_with_sums_over_rounds(tmp_path):
    clients, _ = collect(made_up(tmp_path, methods=("topk", "flexlora")))
    assert len(clients) == 2 * 3 * 2
    assert clients.iloc[3].to_dict() == {
        "method": "topk",
        "seed": 1,
        "client": "rich",
        "budget": 1.0,
        "k": 8,
        "lora_rank": 8,
        "loss_before": 0.9,
        "loss": pytest.approx(0.3),
        "accuracy_before": 0.1,
        "accuracy": pytest.approx(0.7),
        "accuracy_norm": pytest.approx(0.71),
        "flops_ratio": 0.5,
        "tokens_per_second": 600.0,
        "seconds_per_step": 0.1,
        "megabytes_sent": 9.0,  # 3 rounds x 3.0
        "local_seconds": 12.0,  # 3 rounds x 4.0
        "busy_seconds": 12.0,
    }
    # a budget cuts down experts or LoRA ranks
    assert clients[["k", "lora_rank"]].values.tolist()[::6] == [[4, 8], [8, 4]]


def test_rounds_are_nan_where_nothing_was_measured(tmp_path):
    _, rounds = collect(made_up(tmp_path, methods=("topk",)))
    first = rounds[rounds["seed"] == 0]
    assert list(first["round"]) == [0, 1, 2, 3]
    nan = math.nan  # round 1 was not evaluated, round 0 not trained
    assert list(first["loss"]) == pytest.approx([3.3, nan, 1.3, 0.3], nan_ok=True)
    assert list(first["utilisation_cv"]) == pytest.approx([0.0, nan, 0.2, 0.3], nan_ok=True)
    assert list(first["training_utilisation_cv"]) == pytest.approx([nan, 0.4, 0.3, 0.2], nan_ok=True)
    assert list(rounds.columns) == ["method", "seed", "round", *ROUND_COLUMNS]


def test_mean_and_sample_standard_deviation_over_seeds(tmp_path):
    table = by_budget(collect(made_up(tmp_path))[0])
    assert tuple(table.loc[("topk", 0.5), "loss"]) == pytest.approx((0.40, 0.10, 3))  # of 0.3 0.4 0.5
    assert tuple(table.loc[("ub_smoe", 0.5), "loss"]) == pytest.approx((0.37, 0.08, 3))  # of 0.29 0.37 0.45
    assert tuple(table.loc[("ub_smoe", 1.0), "accuracy"]) == pytest.approx((0.73, 0.08, 3))


def test_clients_of_one_budget_are_averaged_within_a_run(tmp_path):
    three = "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0}, {name: c, budget: 0.5}]"
    table = by_budget(collect(made_up(tmp_path, three))[0])
    # a and c: loss and loss - 0.2, so on average 0.1 less; their distance is no spread between seeds
    assert tuple(table.loc[("topk", 0.5), "loss"]) == pytest.approx((0.30, 0.10, 3))


def test_differences_are_paired_by_seed(tmp_path):
    table = paired_differences(collect(made_up(tmp_path))[0], "topk")
    assert set(table.index) == {("ub_smoe", 0.5), ("ub_smoe", 1.0)}
    assert tuple(table.loc[("ub_smoe", 0.5)]) == pytest.approx((-0.03, 0.02, 3))  # of -0.01 -0.03 -0.05


def test_markdown(tmp_path):
    lines = markdown(*collect(made_up(tmp_path)), "headline").splitlines()
    assert lines[0] == "headline"
    results = [line for line in lines if line.startswith("| `")]
    costs = "25.0 | 300 | 0.050 | 13.5 | 12.0 |"
    assert results == [
        f"| `ub_smoe` | 0.3700 ± 0.0800 | 63.0 ± 8.0 | 0.2700 ± 0.0800 | 73.0 ± 8.0 | {costs}",
        f"| `topk` | 0.4000 ± 0.1000 | 60.0 ± 10.0 | 0.3000 ± 0.1000 | 70.0 ± 10.0 | {costs}",
        "| `ub_smoe` | 64.0 ± 8.0 | 74.0 ± 8.0 |",
        "| `topk` | 61.0 ± 10.0 | 71.0 ± 10.0 |",
        "| `ub_smoe` | -0.0300 ± 0.0200 | -0.0300 ± 0.0200 |",
        "| `topk` | +0.0300 ± 0.0200 | +0.0300 ± 0.0200 |",
    ]
    assert all(line.count("|") == lines[4].count("|") for line in lines[4:8])


def test_markdown_of_one_seed_or_without_the_baseline(tmp_path):
    text = markdown(*collect(made_up(tmp_path, methods=("flora", "flexlora"), seeds=1)), "headline")
    assert "| `flora` | 0.6000 | 40.0 | 0.5000 | 50.0 |" in text and "nan" not in text and "paired" not in text


def test_pictures_show_every_method(tmp_path):
    methods = tuple(PRESETS)
    figure = picture(*collect(made_up(tmp_path, methods=methods)), methods)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(methods)
    accuracy, end, loss, cv = figure.axes
    assert len(accuracy.containers) == len(end.containers) == len(loss.lines) == len(cv.lines) == len(methods) >= 10
    assert len({(line.get_color(), line.get_marker()) for line in loss.lines}) == len(methods)
    topk = methods.index("topk")
    assert list(loss.lines[topk].get_ydata()) == pytest.approx([3.4, 1.4, 0.4])  # the mean of three seeds
    assert list(cv.lines[topk].get_xdata()) == [1, 2, 3]  # round 0 is before training
    assert list(accuracy.containers[topk][0].get_ydata()) == pytest.approx([60.0, 70.0])
    assert list(end.containers[topk][0].get_ydata()) == pytest.approx([0.4, 0.3])
    assert list(accuracy.lines[0].get_xdata()) != list(accuracy.containers[topk][0].get_xdata())


def test_a_methods_line_looks_the_same_in_every_picture(tmp_path):
    """Whatever else is drawn, and in whatever order; the lines of the picture of ablations differ in colour."""
    ablations = ("ub_smoe", "topk", *ABLATIONS)
    frames = collect(made_up(tmp_path, methods=(*PRESETS, *ABLATIONS), seeds=1))
    looks = []
    for methods in (tuple(PRESETS), tuple(reversed(PRESETS)), ("flora", "topk"), ablations):
        axes = picture(*frames, methods).axes[2]
        lines = dict(zip(methods, axes.lines, strict=True))
        looks.append({m: (line.get_color(), line.get_marker(), line.get_linestyle()) for m, line in lines.items()})
    assert all(look == looks[0].get(method, look) for part in looks for method, look in part.items())
    assert len({colour for colour, _, _ in looks[-1].values()}) == len(ablations)


def test_finished_runs_must_have_used_the_weights_and_rows_that_exist_now(tmp_path):
    """Digests are of contents: a model split or trained anew has the same names and sizes."""
    (run,) = made_up(tmp_path / "runs", methods=("topk",), seeds=1)
    check_inputs([run])  # a run that recorded no digests passes
    summary = run.exp.run_dir / "summary.json"
    recorded = json.loads(summary.read_text())
    inputs = {"model_digest": model_digest(run.exp.model_dir), "data_digest": data_digest(run.exp)}
    summary.write_text(json.dumps(recorded | inputs))
    check_inputs([run])
    for name, meaning in {"model_digest": "weights", "data_digest": "rows"}.items():
        summary.write_text(json.dumps(recorded | inputs | {name: "0" * 32}))
        with pytest.raises(UserError, match=f"topk-0 holds a finished run with other {meaning} than there are now"):
            check_inputs([run])
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    digests = set()
    for value in (0, 1):
        (folder / "model.safetensors").write_bytes(bytes([value]) * 2**20)
        digests.add(model_digest(folder))
    assert len(digests) == 2


@pytest.mark.parametrize("lines", ["", '{"round": 1, "metrics": {}, "seconds": {}}\n', '{"round": 1'])
def test_damaged_run_is_named(tmp_path, lines):
    runs = made_up(tmp_path, methods=("topk",), seeds=1)
    (runs[0].exp.run_dir / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match="topk-0 is damaged .*Error.*remove the folder"):
        collect(runs)


def test_machine(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\n" * 2)
    gpu = tmp_path / "driver" / "nvidia" / "gpus" / "0000:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t\t Some GPU\nIRQ: 1\n")
    cores = f"{len(os.sched_getaffinity(0))} cores of "
    assert machine(tmp_path).startswith(f"{cores}Some CPU @ 2 GHz, Some GPU, Python 3.")
    elsewhere = machine(tmp_path / "none")
    assert elsewhere.startswith(cores) and ", torch " in elsewhere


def test_machines_are_read_from_the_runs(tmp_path):
    runs = made_up(tmp_path, methods=("topk",), seeds=3)
    for run, name in zip(runs, ("2 cores of A", "8 cores of B", "2 cores of A"), strict=True):
        path = run.exp.run_dir / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": name}))
    assert machines(runs) == "2 cores of A; 8 cores of B"
    finish(runs[1].exp, 0.5)  # as runs were before they recorded it
    assert machines(runs) == f"2 cores of A; machine not recorded, table made on {machine()}"


def lose_the_last(run: Run) -> None:
    path = run.exp.run_dir / "summary.json"
    summary = json.loads(path.read_text())
    lost = summary["clients"].pop()["client"]
    path.write_text(json.dumps(summary | {"lost_in_round": {lost: 2}}))


def test_a_lost_client_has_no_final_figures(tmp_path):
    runs = made_up(tmp_path, methods=("topk",), seeds=1)
    lose_the_last(runs[0])
    clients, rounds = collect(runs)
    assert clients.set_index("client").loss.isna().to_dict() == {"poor": False, "rich": True}
    assert "| `topk` | 0.3000 | 70.0 | - | - | 25.0 | 300 | 0.050 |" in markdown(clients, rounds, "headline")


def test_a_budget_that_lost_a_client_is_left_out_and_the_other_seeds_are_counted(tmp_path):
    """Otherwise the mean of seed 1 would be over other clients than the mean of the other seeds."""
    three = "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0}, {name: c, budget: 0.5}]"
    runs = made_up(tmp_path, three)
    lose_the_last(next(run for run in runs if (run.method, run.seed) == ("topk", 1)))
    clients, rounds = collect(runs)
    table = by_budget(clients)
    assert tuple(table.loc[("topk", 0.5), "loss"]) == pytest.approx((0.30, math.sqrt(0.02), 2))  # of 0.2 0.4
    assert tuple(table.loc[("topk", 1.0), "loss"]) == pytest.approx((0.30, 0.10, 3))
    text = markdown(clients, rounds, "headline")
    assert "| `topk` | 0.3000 ± 0.1414 (n = 2) | 70.0 ± 14.1 (n = 2) | 0.3000 ± 0.1000 | 70.0 ± 10.0 |" in text
    assert "| `ub_smoe` | -0.0300 ± 0.0283 (n = 2) | -0.0300 ± 0.0200 |" in text  # of -0.01 -0.05


def test_a_client_that_rejoined_sent_nothing_meanwhile(tmp_path):
    (run,) = made_up(tmp_path, methods=("topk",), seeds=1)
    path = run.exp.run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[2]["metrics"]["megabytes_sent/rich"], records[2]["seconds"]["seconds_local/rich"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rich = collect([run])[0].iloc[1]
    assert (rich["megabytes_sent"], rich["local_seconds"]) == (6.0, 8.0)  # of two rounds of three


def test_keys_that_depart_from_the_label_are_named(tmp_path):
    def changed(label: str, *overrides: str) -> list[str]:
        return departures(Run(label, 0, load_experiment(CONFIG, [f"method={label}", *overrides])))

    assert changed("topk") == changed("ub_smoe") == changed("flora", "dmr.enabled=false") == []
    assert changed("topk", "dmr.enabled=true", "dmr.zeta=0.5") == ["dmr.enabled=True (not False)"]
    assert changed("flora", "merge.rule=florist", "lora.alpha=8.0") == ["merge.rule=florist (not flora)"]
    exp = load_experiment(CONFIG, ["method=ub_smoe", "dmr.enabled=false", "pseudo_gradient.tokens_per_expert=8"])
    changes = departures(Run("ub_smoe-no_dmr", 0, exp))
    assert changes == ["pseudo_gradient.tokens_per_expert=8 (not 4)"]


POPULATION = ["groups=[{count: 2}]", "sampling={clients: 2}"]
THREE = "clients=[{name: a, budget: 0.5}, {name: b, budget: 0.5}, {name: c, budget: 1.0}]"


def population(folder: Path, cohorts: dict[str, list[list[str]]]) -> list[Run]:
    """Return finished runs of three clients and two groups; g0 is busy 2 s in a round, g1 3 s, each client 1 s."""
    runs = []
    for method, of_rounds in cohorts.items():
        exp = load_experiment(
            CONFIG, [THREE, *POPULATION, f"method={method}", f"name={method}-0", f"output={folder}", "train.rounds=2"]
        )
        finish(exp, 0.5)
        path = exp.run_dir / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record, cohort in zip(records, [[], *of_rounds], strict=True):
            record["metrics"] |= {f"steps/{name}": 4 for name in cohort}
            record["seconds"] = {f"seconds_local/{name}": 1.0 for name in cohort}
            record["seconds"] |= {"seconds_local/g0": 2.0, "seconds_local/g1": 3.0} if cohort else {}
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        summary = json.loads((exp.run_dir / "summary.json").read_text())
        for row in summary["clients"]:
            if not any(row["client"] in cohort for cohort in of_rounds):
                row["tokens_per_second"] = row["seconds_per_step"] = None
        (exp.run_dir / "summary.json").write_text(json.dumps(summary))
        runs.append(Run(method, 0, exp))
    return runs


def test_a_client_that_was_never_drawn_has_no_speed_and_hides_no_other(tmp_path):
    """b took part in no round: it has a loss like everybody, and the speed of its budget is a's alone."""
    runs = population(tmp_path, {"topk": [["a", "c"], ["a", "c"]]})
    clients, rounds = collect(runs)
    assert list(clients["local_seconds"]) == [2.0, 0.0, 2.0] and set(clients["busy_seconds"]) == {6.0}
    table = by_budget(clients)
    assert tuple(table.loc[("topk", 0.5)]["tokens_per_second"])[::2] == (300.0, 1)
    assert tuple(table.loc[("topk", 0.5)]["loss"])[::2] == pytest.approx((0.45, 1))  # of 0.5 and 0.4
    lines = [line for line in markdown(clients, rounds, "headline").splitlines() if line.startswith("| `topk`")]
    assert lines[0].endswith("| 300 | 0.050 | 18.0 | 6.0 |")  # MB: 2 rounds x (1.5 + 3.0 + 4.5); g1: 2 x 3.0


def test_cohorts_of_a_seed_are_compared_over_methods(tmp_path):
    same = population(tmp_path / "same", {"topk": [["a", "c"], ["b", "c"]], "flexlora": [["c", "a"], ["b", "c"]]})
    assert cohort_notes(same) == ["the clients of each round are the same for all methods of a seed"]
    cut = population(tmp_path / "cut", {"topk": [["a", "c"], ["b", "c"]], "flexlora": [["a", "c"], ["b"]]})
    (note,) = cohort_notes(cut)
    assert note.startswith("seed 0: the clients of some rounds are others for flexlora than for topk")
    assert cohort_notes(same[:1]) == cohort_notes(made_up(tmp_path / "alone", seeds=1)) == []


def test_fairness_is_of_the_last_evaluation_and_shown_only_where_it_was_measured(tmp_path):
    """Worst tenths 0.6 and 0.8 of two seeds: mean 0.7, sample standard deviation sqrt(0.02); the third has none."""
    runs = made_up(tmp_path, methods=("topk",))
    assert "Fairness" not in markdown(*collect(runs), "headline")
    for run, worst in zip(runs[:2], (0.6, 0.8), strict=True):
        path = run.exp.run_dir / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in (records[0], records[-1]):
            last = record is records[-1]
            record["metrics"] |= {"fairness/worst_tenth": worst if last else 9.0, "fairness/variance": 0.01}
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = markdown(*collect(runs), "headline")
    assert "| method | loss of the worst tenth | variance of losses |" in text
    assert "| `topk` | 0.7000 ± 0.1414 (n = 2) | 0.0100 ± 0.0000 (n = 2) |" in text
