"""Answer some evaluation prompts at each distinct K after an evaluation, and write them down for people to read.

Written are prompts, right and generated answers. Their control characters are escaped: a model writes anything.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ubsmoe_ds.base.files import replace_files, writes
from ubsmoe_ds.base.terminal import lines_of
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.client.generation import Prompts
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.evaluation import View
from ubsmoe_ds.federation.tensorboard import TensorBoard
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.world import World

SAMPLES = "samples.jsonl"


class Sample(NamedTuple):
    """A generated answer.

    view: name of the model that gave it, see `Experiment.views`; k: its active experts.
    row: number of the evaluation row, from 0; answer: the right one; generated: the model's.
    """

    view: str
    k: int
    row: int
    prompt: str
    answer: str
    generated: str


Answers = list[tuple[int, str, int]]  # number of the prompt, answer, number of a client whose model gave it


def generate_samples(
    exp: Experiment, client: Client, prompts: Prompts | None, views: Iterable[View], stop: Callable[[], bool]
) -> Answers:
    """Answer this rank's part of the prompts with its group's views (a collective over the group).

    The ranks that share a view share the prompts, as they share the evaluation rows.

    Returns:
        The answers; not all if the job is asked to stop; none without prompts.
    """
    if prompts is None:
        return []
    answers: Answers = []
    for view in views:
        answered = prompts.answered(
            client.model,
            client.k,
            view.place,
            batch_size=exp.evaluation.batch_size,
            together=client.config.expert_parallel > 1,
            stop=stop,
        )
        answers += [(number, text, view.client) for number, text in answered.items()]
    return answers


def gather_samples(exp: Experiment, world: World, prompts: Prompts | None, answers: Answers) -> list[Sample]:
    """Return the samples of all ranks, by view and row (a collective over the job if there are prompts)."""
    if prompts is None:
        return []
    views, ks = exp.views, [exp.active_experts(client) for client in exp.clients]
    samples = []
    for number, text, client in [item for part in gather_json(world.comm, answers) for item in part]:
        samples.append(Sample(views[client], ks[client], number, prompts.texts[number], prompts.answers[number], text))
    order = {view: n for n, view in enumerate(dict.fromkeys(views))}
    return sorted(samples, key=lambda sample: (order[sample.view], sample.row))


class SampleFile:
    """Append samples to `samples.jsonl`, one a line, and to TensorBoard's texts.

    Args:
        folder: the run's.
        run_id: the run's.
        kept: lines of rounds that the run has left behind.
    """

    def __init__(self, folder: Path, run_id: str, kept: Sequence[str]) -> None:
        self.path, self.run_id = folder / SAMPLES, run_id
        if kept or self.path.exists():
            text = "".join(kept)
            replace_files(folder, {SAMPLES: lambda path: path.write_text(text, encoding="utf-8")})

    def write(self, number: int, samples: Sequence[Sample], tensorboard: TensorBoard) -> None:
        """Write the samples of a round's evaluation, if there are any."""
        if not samples:
            return
        lines = []
        for sample in samples:
            facts = {key: lines_of(v) if isinstance(v, str) else v for key, v in sample._asdict().items()}
            lines.append(json.dumps({"run_id": self.run_id, "round": number, **facts}) + "\n")
        with writes(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        for view in dict.fromkeys(sample.view for sample in samples):
            of_view = [sample for sample in samples if sample.view == view]
            tensorboard.text(f"samples/{view}", "\n\n---\n\n".join(map(_as_markdown, of_view)), number)


def _as_markdown(sample: Sample) -> str:
    """Return a sample as a block of code, in which nothing is read as Markdown or HTML."""
    text = f"{sample.prompt}\n--- right\n{sample.answer}\n--- generated\n{sample.generated}"
    return "\n".join(f"    {line}" for line in lines_of(text).split("\n"))
