"""Pictures drawn on the fly, and the questions the tiny checkpoint answers about them.

Drawn with Pillow and its built-in font, so that nothing has to be downloaded. A question belongs to the held-out set
when a hash of its pictures' pixels says so, whatever is asked about them.
"""

from __future__ import annotations

import hashlib
import math
import random
from functools import lru_cache, partial

from PIL import Image, ImageDraw, ImageFont

from checkpoints.tasks import Example, Task

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (220, 35, 35),
    "green": (35, 165, 60),
    "blue": (45, 80, 225),
    "yellow": (240, 215, 40),
    "purple": (150, 50, 185),
    "orange": (245, 135, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
MAX_DOTS = 6
TILE = 56  # pixels a side; larger pictures are cut into several tiles
SMALLEST = 32
MOST_TILES = 4  # a side
OFF_CENTRE = 0.08  # how far a digit or shape may be moved from the middle, of the picture's side
FINE = 4  # outlines are drawn this many times as large and shrunk, which smooths their edges


def random_size(rng: random.Random, most_tiles: int) -> tuple[int, int]:
    """Width and height: mostly one tile, else up to two tiles a side, one time in fifty up to four.

    Args:
        most_tiles: How many tiles a side may span at the most.
    """
    kind = rng.random()
    if kind < 0.78 or most_tiles == 1:
        low, high = SMALLEST, TILE
    elif kind < 0.98 or most_tiles == 2:
        low, high = TILE, 2 * TILE
    else:
        low, high = 2 * TILE, most_tiles * TILE
    width = rng.randint(low, high)
    if rng.random() < 0.5:
        return width, width
    return width, min(max(round(width * rng.uniform(0.7, 1.4)), low), high)


def random_grey(rng: random.Random, low: int, high: int) -> Colour:
    """A faintly tinted grey between two brightnesses."""
    grey = rng.randint(low, high)
    red, green, blue = (min(max(grey + rng.randint(-20, 20), 0), 255) for _ in range(3))
    return red, green, blue


def ink_and_paper(rng: random.Random) -> tuple[Colour, Colour]:
    """Dark on light or light on dark; the ink is one of COLOURS half of the time."""
    if rng.random() < 0.5:
        ink, paper = random_grey(rng, 0, 70), random_grey(rng, 190, 255)
    else:
        ink, paper = random_grey(rng, 200, 255), random_grey(rng, 0, 60)
    if rng.random() < 0.5:
        ink = shaded(rng, rng.choice(list(COLOURS.values())))
    return ink, paper


def shaded(rng: random.Random, colour: Colour) -> Colour:
    """The colour, a little off."""
    red, green, blue = (min(max(channel + rng.randint(-18, 18), 0), 255) for channel in colour)
    return red, green, blue


@lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font, `size` pixels high."""
    chosen = ImageFont.load_default(size)
    assert isinstance(chosen, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return chosen


def stamp(rng: random.Random, picture: Image.Image, mask: Image.Image, colour: Colour) -> None:
    """Paint `colour` through what the mask holds, about the middle of the picture."""
    mask = mask.crop(mask.getbbox())
    left, top = (
        (side - part) // 2 + round(OFF_CENTRE * side * rng.uniform(-1, 1))
        for side, part in zip(picture.size, mask.size, strict=True)
    )
    picture.paste(colour, (left, top), mask)


def draw_digit(rng: random.Random, digit: int, most_tiles: int) -> Image.Image:
    """One digit, thin or bold, a little turned."""
    ink, paper = ink_and_paper(rng)
    picture = Image.new("RGB", random_size(rng, most_tiles), paper)
    height = round(min(picture.size) * rng.uniform(0.7, 1.0))
    mask = Image.new("L", (2 * height, 2 * height))
    weight = rng.randint(0, max(height // 14, 1))
    ImageDraw.Draw(mask).text(
        (height, height), str(digit), fill=255, font=font(height), anchor="mm", stroke_width=weight
    )
    stamp(rng, picture, mask.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR), ink)
    return picture


def outline(shape: str, radius: float) -> list[Point]:
    """The corners of a shape that is not round, about the origin."""
    if shape == "square":
        turns = [(radius, math.tau * (corner + 0.5) / 4) for corner in range(4)]
    elif shape == "triangle":
        turns = [(radius, math.tau * (corner / 3 - 0.25)) for corner in range(3)]
    else:
        arm = math.atan(0.35)
        inner, reach = radius * math.sin(arm) * math.sqrt(2), radius
        turns = []
        for quarter in range(4):
            middle = math.tau * quarter / 4
            turns += [(reach, middle - arm), (reach, middle + arm), (inner, middle + math.tau / 8)]
    return [(distance * math.cos(angle), distance * math.sin(angle)) for distance, angle in turns]


def draw_shape(rng: random.Random, shape: str, colour: str, most_tiles: int) -> Image.Image:
    """One filled shape, a little turned, on white, black or grey."""
    paper = random_grey(rng, *rng.choice(((215, 255), (0, 40), (100, 150))))
    picture = Image.new("RGB", random_size(rng, most_tiles), paper)
    radius = min(picture.size) * rng.uniform(0.25, 0.44)
    side = 2 * math.ceil(radius) + 2
    mask = Image.new("L", (side * FINE, side * FINE))
    centre = side * FINE / 2
    if shape == "circle":
        ImageDraw.Draw(mask).circle((centre, centre), radius * FINE, fill=255)
    else:
        tilt = math.radians(rng.uniform(-12, 12))
        cos, sin = math.cos(tilt), math.sin(tilt)
        corners = [(centre + x * cos - y * sin, centre + x * sin + y * cos) for x, y in outline(shape, radius * FINE)]
        ImageDraw.Draw(mask).polygon(corners, fill=255)
    stamp(rng, picture, mask.reduce(FINE), shaded(rng, COLOURS[colour]))
    return picture


def draw_dots(rng: random.Random, count: int, most_tiles: int) -> Image.Image:
    """`count` dots of one size and colour, apart from each other."""
    ink, paper = ink_and_paper(rng)
    picture = Image.new("RGB", random_size(rng, most_tiles), paper)
    width, height = picture.size
    radius = min(width, height) * rng.uniform(0.06, 0.1)
    centres: list[Point] = []
    while len(centres) < count:
        centre = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if all(math.dist(centre, other) > 2.6 * radius for other in centres):
            centres.append(centre)
    mask = Image.new("L", (width * FINE, height * FINE))
    for x, y in centres:
        ImageDraw.Draw(mask).circle((x * FINE, y * FINE), radius * FINE, fill=255)
    picture.paste(ink, (0, 0), mask.reduce(FINE))
    return picture


def picture_example(task: str, prompt: str, answer: str, *pictures: Image.Image) -> Example:
    """A question about pictures; its key is a hash of their pixels."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        digest.update(repr(picture.size).encode() + picture.tobytes())
    return Example(task, digest.hexdigest(), prompt, answer, pictures)


def digit(rng: random.Random, most_tiles: int = MOST_TILES) -> Example:
    """Which digit a picture shows."""
    shown = rng.randrange(10)
    prompt = rng.choice(("Which digit is this?", "What digit do you see?"))
    return picture_example("digit", prompt, str(shown), draw_digit(rng, shown, most_tiles))


def shape(rng: random.Random, most_tiles: int = MOST_TILES) -> Example:
    """Colour and shape of the one thing in a picture."""
    colour, form = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    prompt = rng.choice(("What is shown?", "Which colour and shape is this?"))
    return picture_example("shape", prompt, f"{colour} {form}", draw_shape(rng, form, colour, most_tiles))


def dots(rng: random.Random, most_tiles: int = MOST_TILES) -> Example:
    """How many dots a picture has."""
    count = rng.randint(1, MAX_DOTS)
    prompt = rng.choice(("How many dots?", "Count the dots"))
    return picture_example("dots", prompt, str(count), draw_dots(rng, count, most_tiles))


def compare(rng: random.Random) -> Example:
    """Which of two pictures has more dots."""
    first, second = rng.sample(range(1, MAX_DOTS + 1), 2)
    prompt = rng.choice(("Which has more dots?", "Which image has more dots?"))
    answer = "first" if first > second else "second"
    return picture_example("compare", prompt, answer, draw_dots(rng, first, 2), draw_dots(rng, second, 2))


PICTURE_TASKS: dict[str, Task] = {
    "digit": digit,
    "shape": shape,
    "dots": dots,
    "compare": compare,
}
ONE_TILE_TASKS: dict[str, Task] = {
    "digit": partial(digit, most_tiles=1),
    "shape": partial(shape, most_tiles=1),
    "dots": partial(dots, most_tiles=1),
}
