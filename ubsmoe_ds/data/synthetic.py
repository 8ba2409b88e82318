"""Generate multiple-choice questions about small worlds that a tiny model can learn; no file is needed.

Every task is one short function from a random generator to (question, right answer, wrong answers). Its docstring is an
example. Rows have the schema of `data/sources.py`; questions are unique.
"""

from collections.abc import Callable, Iterator
from functools import partial

from numpy.random import Generator, default_rng

from ubsmoe_ds.base.errors import UserError

NAMES = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LEGS = {"dogs": 4, "birds": 2, "ants": 6, "spiders": 8, "cats": 4, "hens": 2}
KINDS = {
    "fruit": ("apple", "pear", "plum", "grape", "lemon", "cherry"),
    "animal": ("horse", "wolf", "mouse", "goat", "tiger", "rabbit"),
    "tool": ("hammer", "saw", "drill", "wrench", "shovel", "axe"),
    "colour": ("red", "blue", "green", "yellow", "purple", "white"),
    "vehicle": ("car", "bus", "train", "boat", "truck", "plane"),
}
PLACES = ("box", "bag", "drawer", "basket", "cupboard")
# facts of a small world that only training rows tell, so that fine-tuning has something to learn
FACTS: dict[str, tuple[str, dict[str, str]]] = {
    "colours": (
        "{a} and {b} look at a {thing}. What colour is it?",
        {
            "apple": "red",
            "pear": "green",
            "plum": "blue",
            "grape": "purple",
            "lemon": "yellow",
            "cherry": "white",
        },
    ),
    "storage": (
        "{a} and {b} look for the {thing}. Where is it kept?",
        {
            "hammer": "box",
            "saw": "bag",
            "drill": "drawer",
            "wrench": "basket",
            "shovel": "cupboard",
            "axe": "bag",
        },
    ),
    "drivers": (
        "{a} and {b} wait for the {thing}. Who drives it?",
        {
            "car": "Kim",
            "bus": "Leo",
            "train": "Ida",
            "boat": "Jon",
            "truck": "Gina",
            "plane": "Hugo",
        },
    ),
}
COMPARISONS = (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"))

Item = tuple[str, str, list[str]]


def _pick(rng: Generator, items: tuple[str, ...] | list[str], n: int) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))[:n]]


def _near(rng: Generator, value: int, n: int = 3) -> list[str]:
    """Return wrong numbers close to the right one."""
    others = [v for v in range(max(0, value - 4), value + 5) if v != value]
    return [str(others[i]) for i in rng.permutation(len(others))[:n]]


def sums(rng: Generator) -> Item:
    """Make sums: what is 7 plus 5?"""
    a, b = (int(v) for v in rng.integers(1, 50, 2))
    if rng.random() < 0.5:
        return f"What is {a} plus {b}?", str(a + b), _near(rng, a + b)
    a, b = max(a, b), min(a, b)
    return f"What is {a} minus {b}?", str(a - b), _near(rng, a - b)


def legs(rng: Generator) -> Item:
    """How many legs do 2 dogs and 3 birds have?"""
    first, second = _pick(rng, list(LEGS), 2)
    a, b = (int(v) for v in rng.integers(2, 13, 2))
    total = a * LEGS[first] + b * LEGS[second]
    return f"How many legs do {a} {first} and {b} {second} have?", str(total), _near(rng, total)


def order(rng: Generator) -> Item:
    """Anna is taller than Ben. Ben is taller than Cara. Who is tallest?"""
    more, most, least = COMPARISONS[rng.integers(len(COMPARISONS))]
    a, b, c = _pick(rng, NAMES, 3)
    facts = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
    if rng.random() < 0.5:
        facts.reverse()
    asked, right = (most, a) if rng.random() < 0.5 else (least, c)
    return f"{' '.join(facts)} Who is {asked}?", right, [n for n in (a, b, c) if n != right]


def weekdays(rng: Generator) -> Item:
    """If today is Monday, what day is it in 3 days?"""
    start, shift = int(rng.integers(7)), int(rng.integers(1, 14))
    right = DAYS[(start + shift) % 7]
    wrong = _pick(rng, [d for d in DAYS if d != right], 3)
    who = NAMES[rng.integers(len(NAMES))]
    return f"{who} knows that today is {DAYS[start]}. What day is it in {shift} days?", right, wrong


def odd_one_out(rng: Generator) -> Item:
    """Anna has plum, saw, pear, apple. Which of them is not one of the fruits?"""
    kind, other = _pick(rng, list(KINDS), 2)
    right = KINDS[other][rng.integers(len(KINDS[other]))]
    wrong = _pick(rng, KINDS[kind], 3)
    things = ", ".join(_pick(rng, [*wrong, right], 4))
    who = NAMES[rng.integers(len(NAMES))]
    return f"{who} has {things}. Which of them is not one of the {kind}s?", right, wrong


def boxes(rng: Generator) -> Item:
    """The apple is in the box. The saw is in the bag. Where is the saw?"""
    things = [KINDS[k][rng.integers(6)] for k in _pick(rng, list(KINDS)[:3], 3)]
    places = _pick(rng, PLACES, 3)
    asked = int(rng.integers(3))
    facts = " ".join(f"The {t} is in the {p}." for t, p in zip(things, places, strict=True))
    return f"{facts} Where is the {things[asked]}?", places[asked], [p for i, p in enumerate(places) if i != asked]


def syllogisms(rng: Generator) -> Item:
    """All wolfs are red. Anna has a wolf. What colour is it?"""
    first, second = _pick(rng, KINDS["animal"], 2)
    colours = _pick(rng, KINDS["colour"], 4)
    who = NAMES[rng.integers(len(NAMES))]
    asked, right = (first, colours[0]) if rng.random() < 0.5 else (second, colours[1])
    rule = f"Every {first} here is {colours[0]} and every {second} is {colours[1]}."
    return f"{rule} {who} has a {asked}. What colour is it?", right, [c for c in colours if c != right]


def largest(rng: Generator) -> Item:
    """Which number is the largest?"""
    numbers = [str(v) for v in rng.choice(90, 4, replace=False) + 10]
    word, pick = ("largest", max) if rng.random() < 0.5 else ("smallest", min)
    right = pick(numbers, key=int)
    return f"Which of {', '.join(numbers)} is the {word} number?", right, [n for n in numbers if n != right]


def _fact(name: str, rng: Generator) -> Item:
    """Anna and Ben look at a lemon. What colour is it?"""
    form, facts = FACTS[name]
    thing = list(facts)[rng.integers(len(facts))]
    a, b = _pick(rng, NAMES, 2)
    wrong = sorted(set(facts.values()) - {facts[thing]})
    return form.format(a=a, b=b, thing=thing), facts[thing], _pick(rng, wrong, 3)


REASONING: tuple[Callable[[Generator], Item], ...] = (
    sums,
    legs,
    order,
    weekdays,
    odd_one_out,
    boxes,
    syllogisms,
    largest,
)
TASKS: dict[str, Callable[[Generator], Item]] = {function.__name__: function for function in REASONING}
TASKS |= {name: partial(_fact, name) for name in FACTS}


def rows(count: int, seed: int) -> list[dict]:
    """Return `count` rows, the tasks in turn, no question twice.

    Args:
        count: number of rows.
        seed: the same seed gives the same rows.
    """
    streams = [_unique(task, default_rng([seed, i])) for i, task in enumerate(TASKS)]
    return [make_row(*next(streams[i % len(streams)]), number=i) for i in range(count)]


def make_row(task: str, question: str, choices: list[str], label: int, number: int) -> dict:
    """Return a row in the style of LLM-Adapters (arXiv 2304.01933); a choice is its own label, as in its BoolQ rows."""
    options = "/".join(choices)
    return {
        "task": task,
        "id": f"{task}-{number}",
        "instruction": f"Please answer the following question: {question}\n\nAnswer format: {options}",
        "answer": f"the correct answer is {choices[label]}",
        "question": question,
        "choices": choices,
        "labels": choices,
        "label": label,
    }


def _unique(task: str, rng: Generator) -> Iterator[tuple[str, str, list[str], int]]:
    """Yield (task, question, shuffled choices, index of the right one).

    Raises:
        UserError: when the task's world has no more questions.
    """
    seen: set[str] = set()
    misses = 0
    while misses < 10_000:
        question, right, wrong = TASKS[task](rng)
        misses += 1
        if question in seen:
            continue
        seen.add(question)
        misses = 0
        choices = _pick(rng, [right, *wrong], len(wrong) + 1)
        yield task, question, choices, choices.index(right)
    raise UserError(
        f"data.rows: task {task!r} has only {len(seen)} different questions; use at most {len(seen) * len(TASKS)} rows"
    )
