"""The drawn pictures show what their answers say, and no picture is on both sides of the split."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from checkpoints.pictures import (
    COLOURS,
    MAX_DOTS,
    MOST_TILES,
    PICTURE_TASKS,
    SMALLEST,
    TILE,
    draw_dots,
    draw_shape,
    picture_example,
)
from checkpoints.tasks import Example, evaluation_set, training_examples


def blobs(picture: Image.Image) -> int:
    """How many connected regions stand out from the paper, which the picture's commonest colour is."""
    pixels_HWC = np.asarray(picture, dtype=np.int16)
    colours, counts = np.unique(pixels_HWC.reshape(-1, 3), axis=0, return_counts=True)
    left_HW = np.abs(pixels_HWC - colours[counts.argmax()]).sum(-1) > 0
    found = 0
    while left_HW.any():
        found += 1
        frontier = [tuple(np.argwhere(left_HW)[0])]
        while frontier:
            row, column = frontier.pop()
            if left_HW[row, column]:
                left_HW[row, column] = False
                frontier.extend(neighbours(row, column, left_HW.shape))
    return found


def neighbours(row: int, column: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
        if 0 <= near[0] < shape[0] and 0 <= near[1] < shape[1]:
            yield near


@pytest.mark.parametrize("count", range(1, MAX_DOTS + 1))
def test_dots_are_as_many_as_said(count: int) -> None:
    for seed in range(10):
        assert blobs(draw_dots(random.Random(seed), count, most_tiles=2)) == count


def test_a_comparison_is_answered_by_its_dots() -> None:
    rng = random.Random(0)
    examples = [PICTURE_TASKS["compare"](rng) for _ in range(30)]
    for example in examples:
        first, second = (blobs(picture) for picture in example.pictures)
        assert first != second
        assert example.answer == ("first" if first > second else "second")
    assert {example.answer for example in examples} == {"first", "second"}


@pytest.mark.parametrize("colour", COLOURS)
def test_a_shape_has_the_named_colour(colour: str) -> None:
    """The nearest of the named colours, wherever the picture is far from grey."""
    for seed in range(10):
        pixels_PC = np.asarray(draw_shape(random.Random(seed), "square", colour, most_tiles=1), np.int32).reshape(-1, 3)
        vivid_PC = pixels_PC[np.ptp(pixels_PC, axis=1) > 90]
        named_KC = np.array(list(COLOURS.values()))
        nearest_P = np.abs(vivid_PC[:, None] - named_KC).sum(-1).argmin(-1)
        assert list(COLOURS)[np.bincount(nearest_P).argmax()] == colour


@pytest.mark.parametrize("task", PICTURE_TASKS)
def test_pictures_are_reproducible_and_of_many_sizes(task: str) -> None:
    def drawn() -> list[Example]:
        rng = random.Random(1)
        return [PICTURE_TASKS[task](rng) for _ in range(60)]

    examples = drawn()
    assert [example.key for example in examples] == [example.key for example in drawn()]
    sides = [side for example in examples for picture in example.pictures for side in picture.size]
    assert min(sides) >= SMALLEST
    assert TILE < max(sides) <= MOST_TILES * TILE
    assert len({example.key for example in examples}) == len(examples)


def test_the_split_goes_by_the_pixels() -> None:
    picture = draw_dots(random.Random(0), 3, most_tiles=1)
    changed = picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    asked, asked_otherwise = (
        picture_example("dots", prompt, "3", picture) for prompt in ("How many dots?", "Count the dots")
    )
    assert asked.key == asked_otherwise.key != picture_example("dots", "How many dots?", "3", changed).key


def test_evaluation_pictures_are_held_out() -> None:
    held_out = evaluation_set(random.Random(0), 10, PICTURE_TASKS)
    assert len(held_out) == 10 * len(PICTURE_TASKS)
    assert all(example.held_out for example in held_out)
    trained = training_examples(random.Random(0), 100, dict.fromkeys(PICTURE_TASKS, 1.0), PICTURE_TASKS)
    assert not any(example.held_out for example in trained)
