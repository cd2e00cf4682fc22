"""Pictures with questions of rising difficulty, drawn from a seed: scenes, documents and bar charts.

Each picture is 336 x 336 RGB and carries label maps on a 24 x 24 grid of 14-pixel cells (one cell a visual token),
which the training uses as an auxiliary target for the vision tower.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 336
CELL = 14
GRID = SIZE // CELL

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
FIELDS = (
    "order", "room", "seat", "gate", "ticket", "locker", "train", "badge", "crate", "shelf", "permit", "cabin",
)  # fmt: skip
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and O: they look like 1 and 0
CHARACTERS = LETTERS + "23456789"
TASKS = ("colour_shape", "count", "relation", "code", "chart")

# Label maps: 0 is "nothing there"; one head of the auxiliary loss each, with this many classes. A code's characters carry
# their line's field too, and a bar's letter the bar's value, so that the maps also say what belongs together.
LABELS = {
    "colour": 1 + len(COLOURS),
    "shape": 2 + len(SHAPES),
    "character": 1 + 36,
    "field": 1 + len(FIELDS),
    "value": 14,  # 1-9 the value of a bar, 10-13 the size of an object
    "centre": 2,  # the middle of an object
}
# Maps of measures, 0 is "nothing there": where across the picture the object's centre lies (in 2 pixels), and its radius (in
# quarters of a pixel). What is compared has to be known more finely than a cell.
MEASURES = ("across", "radius")
ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass
class Sample:
    """One picture, its label maps (name -> uint8 [24, 24]) and its (task, question, answer) triples."""

    image: Image.Image
    labels: dict[str, np.ndarray] = field(
        default_factory=lambda: {k: np.zeros((GRID, GRID), np.uint8) for k in (*LABELS, *MEASURES)}
    )
    questions: list[tuple[str, str, str]] = field(default_factory=list)


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


MONO = ("DejaVuSansMono-Bold.ttf", "DejaVuSansMono.ttf")
SANS = ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf", "DejaVuSerif-Bold.ttf")


def _noise(rng: np.random.Generator, low: float, high: float) -> Image.Image:
    """Smooth texture of three octaves with values between `low` and `high`."""
    total: Image.Image | None = None
    for cells, weight in ((4, 0.0), (14, 0.3), (56, 0.15)):
        coarse = rng.uniform(low, high, (cells, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        total = layer if total is None else Image.blend(total, layer, weight)
    assert total is not None
    return total


def _mark(labels: np.ndarray, box: tuple[float, float, float, float], value: int) -> None:
    """Writes `value` into the cells whose centre lies in `box` (pixels), and into the cell of the box's own centre."""
    x0, y0, x1, y1 = (v / CELL - 0.5 for v in box)
    rows = slice(max(0, int(np.ceil(y0))), max(0, int(np.floor(y1)) + 1))
    columns = slice(max(0, int(np.ceil(x0))), max(0, int(np.floor(x1)) + 1))
    labels[rows, columns] = value
    labels[int((box[1] + box[3]) / 2 / CELL), int((box[0] + box[2]) / 2 / CELL)] = value


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape of radius `r` about (x, y)."""
    if shape == "square":
        s = 0.86 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return [(x, y - r), (x + 0.95 * r, y + 0.75 * r), (x - 0.95 * r, y + 0.75 * r)]
    if shape == "diamond":
        return [(x, y - r), (x + 0.62 * r, y), (x, y + r), (x - 0.62 * r, y)]
    if shape == "cross":
        a, b = r, 0.34 * r
        return [(x + dx, y + dy) for dx, dy in (
            (-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b),
        )]  # fmt: skip
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5  # star
    radii = np.where(np.arange(10) % 2 == 0, r, 0.45 * r)
    return [(x + q * np.cos(t), y + q * np.sin(t)) for q, t in zip(radii, angles, strict=True)]


def _pick(rng: np.random.Generator, items: list | tuple, n: int) -> list:
    return [items[i] for i in rng.permutation(len(items))[:n]]


def draw_scene(rng: np.random.Generator, questions: int) -> Sample:
    """Three to eight objects on a textured ground: colour, shape, counting, position and size."""
    sample = Sample(_noise(rng, 60, 190))
    draw = ImageDraw.Draw(sample.image)
    colours = _pick(rng, list(COLOURS), int(rng.integers(3, 6)))
    shapes = _pick(rng, SHAPES, int(rng.integers(2, 5)))
    objects: list[tuple[str, str, float, float, float]] = []
    for _ in range(int(rng.integers(3, 9))):
        for _attempt in range(30):
            r = float(rng.uniform(15, 42))
            x, y = (float(v) for v in rng.uniform(r + 3, SIZE - r - 3, 2))
            if all((x - o[2]) ** 2 + (y - o[3]) ** 2 > (r + o[4] + 4) ** 2 for o in objects):
                colour, shape = colours[rng.integers(len(colours))], shapes[rng.integers(len(shapes))]
                objects.append((colour, shape, x, y, r))
                break
    for colour, shape, x, y, r in objects:
        fill = tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255))
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        else:
            draw.polygon(_outline(shape, x, y, r), fill=fill)
        box = (x - 0.7 * r, y - 0.7 * r, x + 0.7 * r, y + 0.7 * r)
        _mark(sample.labels["colour"], box, 1 + list(COLOURS).index(colour))
        _mark(sample.labels["shape"], box, 1 + SHAPES.index(shape))
        _mark(sample.labels["value"], box, 10 + int(np.digitize(r, (21, 28, 35))))
        _mark(sample.labels["across"], box, round(x / 2))
        _mark(sample.labels["radius"], box, round(4 * r))
        sample.labels["centre"][int(y / CELL), int(x / CELL)] = 1
    sample.questions = _scene_questions(rng, objects, colours, shapes, questions)
    return sample


def _scene_questions(
    rng: np.random.Generator, objects: list, colours: list[str], shapes: list[str], questions: int
) -> list[tuple[str, str, str]]:
    plain, counts, relations = [], [], []
    for shape in shapes:
        same = [o for o in objects if o[1] == shape]
        counts.append(("count", f"How many {shape}{'es' if shape == 'cross' else 's'} are there?", str(len(same))))
        if len(same) == 1:
            plain.append(("colour_shape", f"What colour is the {shape}?", same[0][0]))
    for colour in colours:
        same = [o for o in objects if o[0] == colour]
        counts.append(("count", f"How many {colour} objects are there?", str(len(same))))
        if len(same) == 1:
            plain.append(("colour_shape", f"What shape is the {colour} object?", same[0][1]))
    counts.append(("count", "How many objects are there?", str(len(objects))))
    names = [f"{o[0]} {o[1]}" for o in objects]
    unique = [i for i, name in enumerate(names) if names.count(name) == 1]
    for i in unique:
        for j in unique:
            if i == j:
                continue
            a, b = objects[i], objects[j]
            if abs(a[2] - b[2]) >= 24:
                left = names[i] if a[2] < b[2] else names[j]
                relations.append(("relation", f"Which is further left, the {names[i]} or the {names[j]}?", left))
            if max(a[4], b[4]) >= 1.35 * min(a[4], b[4]):
                large = names[i] if a[4] > b[4] else names[j]
                relations.append(("relation", f"Which is larger, the {names[i]} or the {names[j]}?", large))
    quarter, third = max(1, questions // 4), max(1, questions // 3)
    chosen = _pick(rng, plain, quarter) + _pick(rng, counts, third)
    chosen += _pick(rng, relations, max(1, questions - len(chosen)))
    return _pick(rng, chosen, questions)


def draw_document(rng: np.random.Generator, questions: int) -> Sample:
    """A form: a title and three to six lines 'field: CODE' on paper, with small print between them."""
    paper = 225 + 25 * rng.random()
    sample = Sample(_noise(rng, paper - 25, paper))
    draw = ImageDraw.Draw(sample.image)
    names = _pick(rng, FIELDS, int(rng.integers(3, 7)))
    code_font = _font(MONO[rng.integers(len(MONO))], int(rng.integers(23, 27)))
    name_font = _font(SANS[rng.integers(len(SANS))], int(rng.integers(18, 23)))
    small = _font(SANS[1], 10)
    ink = tuple(int(v) for v in rng.integers(0, 70, 3))
    left, column = int(rng.integers(12, 40)), int(rng.integers(176, 232))
    pitch = (SIZE - 30) / len(names)
    for line, name in enumerate(names):
        y = 12 + pitch * line + float(rng.uniform(0, pitch - 40))
        code = "".join(CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=4))
        draw.text((left, y + 2), name + ":", font=name_font, fill=ink)
        _mark(sample.labels["field"], draw.textbbox((left, y + 2), name, font=name_font), 1 + FIELDS.index(name))
        for i, character in enumerate(code):
            x = column + i * code_font.getlength("0")
            draw.text((x, y), character, font=code_font, fill=ink)
            box = draw.textbbox((x, y), character, font=code_font)
            _mark(sample.labels["character"], box, 1 + ALPHANUMERIC.index(character))
            _mark(sample.labels["field"], box, 1 + FIELDS.index(name))
        if rng.random() < 0.6:
            words = " ".join(_pick(rng, FIELDS, 7))
            draw.text((left, y + 30), words[: int(rng.integers(20, 44))], font=small, fill=(150, 150, 150))
        sample.questions.append(("code", f"What is the {name} code?", code))
    sample.questions = _pick(rng, sample.questions, questions)
    return sample


def draw_chart(rng: np.random.Generator, questions: int) -> Sample:
    """A bar chart of three to six bars of different colours, values 1 to 9 against a grid."""
    paper = 225 + 25 * rng.random()
    sample = Sample(_noise(rng, paper - 25, paper))
    draw = ImageDraw.Draw(sample.image)
    x0, y0 = 40 + float(rng.uniform(-8, 8)), 296 + float(rng.uniform(-6, 6))
    unit, x1 = float(rng.uniform(25, 28)), SIZE - 8
    tick, name_font = _font(SANS[1], 14), _font(SANS[0], 20)
    for value in range(10):
        y = y0 - value * unit
        draw.line((x0, y, x1, y), fill=(170, 170, 170), width=1)
        draw.text((x0 - 18, y - 8), str(value), font=tick, fill=(60, 60, 60))
    draw.line((x0, y0 - 9.6 * unit, x0, y0), fill=(40, 40, 40), width=2)
    colours = _pick(rng, list(COLOURS)[:6], int(rng.integers(3, 7)))
    letters = _pick(rng, LETTERS, len(colours))
    width = (x1 - x0) / len(colours)
    for i, (colour, letter) in enumerate(zip(colours, letters, strict=True)):
        value = int(rng.integers(1, 10))
        left, right = x0 + (i + 0.18) * width, x0 + (i + 0.82) * width
        draw.rectangle((left, y0 - value * unit, right, y0), fill=COLOURS[colour], outline=(40, 40, 40))
        box = (left, y0 - value * unit, right, y0)
        _mark(sample.labels["colour"], box, 1 + list(COLOURS).index(colour))
        _mark(sample.labels["shape"], box, 1 + len(SHAPES))
        _mark(sample.labels["value"], box, value)
        middle = (left + right) / 2
        at = (middle - name_font.getlength(letter) / 2, y0 + 6)
        draw.text(at, letter, font=name_font, fill=(20, 20, 20))
        box = draw.textbbox(at, letter, font=name_font)
        _mark(sample.labels["character"], box, 1 + ALPHANUMERIC.index(letter))
        _mark(sample.labels["value"], box, value)
        sample.questions.append(("chart", f"What is the value of the {colour} bar?", str(value)))
    sample.questions = _pick(rng, sample.questions, questions)
    return sample


def draw_sample(seed: int, questions: int = 8) -> Sample:
    """The picture of a seed: 60 % scenes, 28 % documents, 12 % charts. Same seed, same picture (same fonts given)."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, p=(0.6, 0.28, 0.12))
    return (draw_scene, draw_document, draw_chart)[kind](rng, questions)
