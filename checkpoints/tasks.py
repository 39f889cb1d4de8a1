"""The small question-and-answer tasks the tiny checkpoint is trained and judged on.

A question belongs to the held-out set when a hash of its key says so. The key is the question whatever its wording
(but for weekdays, where it is the prompt), so that the training stream, unbounded and sampled on the fly, and the
evaluation set never share a question.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

HELD_OUT_PERCENT = 12
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD_LIST = """
apple banana cherry grape lemon melon olive peach plum berry bread butter cheese honey sugar salt pepper rice
bean corn onion carrot tomato potato garlic coffee water juice milk cream cake candy cookie egg pasta pizza soup
cat dog horse sheep goat lamb cow pig hen duck goose eagle raven robin sparrow owl fox wolf bear lion tiger zebra
panda monkey camel llama alpaca rabbit mouse rat whale shark seal otter beaver turtle frog snake lizard bee ant
river lake ocean island beach hill valley forest desert meadow stone rock sand mud cloud rain snow storm wind
thunder spring summer autumn winter morning evening night moon sun star planet comet sky earth fire ice smoke
house door window wall floor roof kitchen table chair desk lamp clock mirror carpet bed pillow blanket shelf
book paper pencil letter story poem song music piano guitar violin drum flute dance paint brush color picture
red blue green yellow purple orange black white brown silver gold copper iron steel glass wood cotton wool silk
car train truck bus boat ship plane bicycle wheel engine road bridge tunnel station ticket map city village
street market school teacher student doctor farmer baker sailor pilot writer singer king queen prince knight
castle tower sword shield crown garden flower rose tulip daisy tree branch leaf root seed grass basket bottle
hammer nail saw ladder rope needle thread button pocket shirt jacket sweater glove scarf shoe boot hat umbrella
hello world happy funny quick quiet brave clever gentle little simple bright dark early late seven eight eleven
"""
_NAME_LIST = "amy bob joe sue tom ann ben dan eve fay gus hal ian jan kim lee max ned pat ray sam ted una val wes zoe"
WORDS = tuple(_WORD_LIST.split())
NAMES = tuple(_NAME_LIST.split())


@dataclass(frozen=True)
class Example:
    """One question with its answer; questions with one `key` are on the same side of the split."""

    task: str
    key: str
    prompt: str
    answer: str
    pictures: tuple[Image.Image, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether this question is reserved for evaluation."""
        digest = hashlib.sha256(f"{self.task}:{self.key}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def random_word(rng: random.Random) -> str:
    """A real word a quarter of the time, otherwise 3 to 6 letters, one time in five from only three."""
    if rng.random() < 0.25:
        return rng.choice(WORDS)
    alphabet = rng.sample(LETTERS, 3) if rng.random() < 0.2 else LETTERS
    return "".join(rng.choices(alphabet, k=rng.randint(3, 6)))


def random_number(rng: random.Random) -> int:
    """A number in 0..49, a single digit more often than one time in five."""
    return rng.randrange(10 if rng.random() < 0.2 else 50)


def addition(rng: random.Random) -> Example:
    """Sum of two numbers in 0..49."""
    a, b = random_number(rng), random_number(rng)
    wordings = (f"{a}+{b}=", f"What is {a}+{b}?", f"What is {a} plus {b}?")
    return Example("addition", f"{a}+{b}", rng.choices(wordings, (3, 1, 1))[0], str(a + b))


def subtraction(rng: random.Random) -> Example:
    """Difference of two numbers in 0..49, the smaller one taken away."""
    b, a = sorted((random_number(rng), random_number(rng)))
    wordings = (f"{a}-{b}=", f"What is {a}-{b}?", f"What is {a} minus {b}?")
    return Example("subtraction", f"{a}-{b}", rng.choices(wordings, (3, 1, 1))[0], str(a - b))


def copy(rng: random.Random) -> Example:
    """A word said again."""
    word = random_word(rng)
    return Example("copy", word, rng.choice((f"Copy: {word}", f"Repeat the word {word}")), word)


def reverse(rng: random.Random) -> Example:
    """A word spelled backwards."""
    word = random_word(rng)
    return Example("reverse", word, rng.choice((f"Reverse: {word}", f"Spell {word} backwards")), word[::-1])


def recall(rng: random.Random) -> Example:
    """The value, a digit, that a list of two pairs gives to a key; keys end in different letters."""
    names = rng.sample(NAMES, 2)
    while names[0][-1] == names[1][-1]:
        names = rng.sample(NAMES, 2)
    values = [str(rng.randrange(10)) for _ in names]
    asked = rng.randrange(len(names))
    pairs = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    prompt = f"{pairs}; {names[asked]}?"
    return Example("recall", prompt, prompt, values[asked])


def letters(rng: random.Random) -> Example:
    """How often a letter occurs in a word of 3 to 6 letters; made-up words have it 0 to 3 times, each as likely."""
    if rng.random() < 0.15:
        word = rng.choice([word for word in WORDS if len(word) <= 6])
        letter = rng.choice(word)
    else:
        letter = rng.choice(LETTERS)
        count = rng.randint(0, 3)
        others = rng.choices(LETTERS.replace(letter, ""), k=rng.randint(max(3, count), 6) - count)
        word = "".join(rng.sample([letter] * count + others, count + len(others)))
    wordings = (f"How many {letter} in {word}?", f"Count {letter} in {word}")
    return Example("letters", f"{letter} in {word}", rng.choice(wordings), str(word.count(letter)))


def weekday(rng: random.Random) -> Example:
    """The day of the week some days later. There are so few sums that wordings count as questions of their own."""
    day, shift = rng.randrange(7), rng.randint(1, 10)
    unit = "day" if shift == 1 else "days"
    sum_of = f"{DAYS[day]} plus {shift} {unit}?"
    prompt = rng.choice((sum_of, f"What is {sum_of}", f"What day is {sum_of}"))
    return Example("weekday", prompt, prompt, DAYS[(day + shift) % 7])


Task = Callable[[random.Random], Example]
TASKS: dict[str, Task] = {
    "addition": addition,
    "subtraction": subtraction,
    "copy": copy,
    "reverse": reverse,
    "recall": recall,
    "letters": letters,
    "weekday": weekday,
}


def draw(rng: random.Random, task: Task, held_out: bool) -> Example:
    """One question of a task from the training side (held_out False) or the evaluation side of the split."""
    while True:
        example = task(rng)
        if example.held_out == held_out:
            return example


def training_examples(
    rng: random.Random, count: int, weights: Mapping[str, float], tasks: Mapping[str, Task] = TASKS
) -> list[Example]:
    """Questions of the training side, tasks mixed by their weights."""
    names = rng.choices(list(weights), list(weights.values()), k=count)
    return [draw(rng, tasks[name], held_out=False) for name in names]


def evaluation_set(rng: random.Random, per_task: int, tasks: Mapping[str, Task]) -> list[Example]:
    """Up to `per_task` distinct questions of every task from the evaluation side, fewer where a task is that small."""
    chosen: list[Example] = []
    for task in tasks.values():
        questions: dict[tuple[str, str], Example] = {}
        for _ in range(per_task * 50):
            if len(questions) == per_task:
                break
            example = draw(rng, task, held_out=True)
            questions.setdefault((example.key, example.prompt), example)
        chosen.extend(questions.values())
    return chosen
