"""Generated answers as they are written down, and the adapters of the best rounds that are kept."""

import json

from tests.support import tiny
from ubsmoe_ds.federation.monitor import Monitor
from ubsmoe_ds.federation.outputs import best_folder, remove_older_best
from ubsmoe_ds.federation.samples import Sample
from ubsmoe_ds.launching.run_folder import open_run_folder

SAMPLE = Sample("k2", 2, 0, "one\ntwo", "right", "a\x1b[2Jb\x07 <b>\u202e")


def monitor_of(folder, **options):
    exp = tiny.experiment("unused", [{"budget": 1.0}]).model_copy(update={"output": str(folder)})
    return exp.run_dir, Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"), **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def texts(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


def test_control_characters_are_escaped_and_nothing_is_read_as_markup(tmp_path):
    folder, monitor = monitor_of(tmp_path)
    monitor.samples(0, [SAMPLE, SAMPLE._replace(view="k4", k=4)])
    monitor.close()
    first, second = lines(folder)
    assert first["generated"] == "a\\x1b[2Jb\\x07 <b>\\u202e" and first["prompt"] == "one\ntwo"
    assert {key: first[key] for key in ("run_id", "round", "view", "k", "row", "answer")} == {
        "run_id": "an id",
        "round": 0,
        "view": "k2",
        "k": 2,
        "row": 0,
        "answer": "right",
    }
    assert second["k"] == 4
    (text,) = texts(folder, "samples/k2")
    assert all(line.startswith("    ") for line in text.split("\n")) and "a\\x1b[2Jb" in text


def test_a_resumed_run_writes_the_samples_of_its_own_rounds(tmp_path):
    folder, monitor = monitor_of(tmp_path)
    for number in range(3):
        monitor.samples(number, [SAMPLE, SAMPLE])
    monitor.close()
    _, resumed = monitor_of(tmp_path, resume_at=2)
    resumed.samples(2, [SAMPLE])
    resumed.close()
    assert [line["round"] for line in lines(folder)] == [0, 0, 1, 1, 2]


def test_without_samples_there_is_no_file(tmp_path):
    folder, monitor = monitor_of(tmp_path)
    monitor.samples(0, [])
    monitor.close()
    assert not (folder / "samples.jsonl").exists()


def test_adapters_that_a_checkpoint_counts_as_the_best_are_kept(tmp_path):
    for number in (0, 2, 3, 11):
        best_folder(tmp_path, number).mkdir()
    (tmp_path / "adapter-round-2").mkdir()
    remove_older_best(tmp_path, 11, {-1, 3})
    names = ["adapter-best-round-11", "adapter-best-round-3", "adapter-round-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
