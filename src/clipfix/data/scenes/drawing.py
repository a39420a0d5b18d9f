"""Scenes as pictures: flat shapes on a pastel gradient, drawn four times too large and averaged down.

Why sprites: a thing looks the same at every place, so each look is drawn once and then pasted.
Coordinates in a sprite run from -1 to 1, with y downwards; things with a direction are drawn facing right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from clipfix.data.scenes.world import Scene, Thing

RGB = tuple[int, ...]  # or RGBA
Point = tuple[float, float]

GRID = 64  # lengths below are pixels of a 64-pixel picture
SUPERSAMPLE = 4
SPRITE = 34
RADIUS = {"large": 10.0, "small": 6.8}
CELLS = (12.5, 32.0, 51.5)
LAYOUTS: dict[int, tuple[Point, ...]] = {
    1: ((0, 0),),
    2: ((-13, 0), (13, 0)),
    3: ((0, -13), (-13, 12), (13, 12)),
    4: ((-13, -13), (13, -13), (-13, 13), (13, 13)),
}

PALETTE: dict[str, RGB] = {
    "red": (222, 56, 58),
    "orange": (246, 141, 38),
    "yellow": (247, 195, 34),
    "green": (67, 168, 92),
    "blue": (52, 120, 216),
    "purple": (132, 78, 190),
    "pink": (245, 134, 180),
    "brown": (135, 86, 56),
}
TINTS: dict[str, tuple[RGB, RGB]] = {
    "sky": ((184, 219, 246), (220, 238, 251)),
    "mint": ((184, 230, 210), (219, 245, 230)),
    "cream": ((250, 223, 182), (254, 241, 216)),
    "lilac": ((211, 200, 243), (233, 226, 251)),
}
INK: RGB = (52, 46, 70)
WHITE: RGB = (255, 255, 255)
GLASS: RGB = (201, 231, 246)
GLOW: RGB = (255, 226, 112)
STEM: RGB = (58, 135, 84)

# Letters as strokes rather than a font: the same pixels on every machine.
_CIRCLE = tuple((0.5 + 0.5 * math.cos(a * math.pi / 12), 0.5 + 0.5 * math.sin(a * math.pi / 12)) for a in range(25))
STROKES: dict[str, tuple[tuple[Point, ...], ...]] = {
    "A": (((0, 1), (0.5, 0), (1, 1)), ((0.2, 0.68), (0.8, 0.68))),
    "H": (((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 0.5), (1, 0.5))),
    "L": (((0.1, 0), (0.1, 1), (0.95, 1)),),
    "O": (_CIRCLE,),
    "T": (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),
    "X": (((0, 0), (1, 1)), ((1, 0), (0, 1))),
}


def draw(scene: Scene, size: int = GRID) -> Image.Image:
    """Return the picture of a scene, `size` x `size` pixels."""
    scale = size / GRID
    picture = _background(scene.background, size).copy()
    for thing, (dx, dy) in zip(scene.things, scene.jitter, strict=True):
        sprite = _sprite(replace(thing, place=0, count=1), scale)
        row, column = divmod(thing.place, 3)
        for x, y in LAYOUTS[thing.count]:
            left = round((CELLS[column] + x + dx) * scale - sprite.width / 2)
            top = round((CELLS[row] + y + dy) * scale - sprite.height / 2)
            picture.paste(sprite, (left, top), sprite)
    return picture


@lru_cache(maxsize=64)
def _background(tint: str, size: int) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((size, size))
    top, bottom = TINTS[tint]
    picture = Image.composite(Image.new("RGB", (size, size), bottom), Image.new("RGB", (size, size), top), ramp)
    disc = Image.new("L", (size * SUPERSAMPLE,) * 2)
    margin = 0.07 * disc.width
    ImageDraw.Draw(disc).ellipse((margin, margin, disc.width - margin, disc.width - margin), fill=80)
    picture.paste(WHITE, mask=disc.reduce(SUPERSAMPLE))
    return picture


@lru_cache(maxsize=8192)  # more than there are looks
def _sprite(look: Thing, scale: float) -> Image.Image:
    pen = Pen(look, scale * SUPERSAMPLE)
    ARTISTS[look.kind](pen, look)
    image = pen.image
    if look.orientation == "left":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif look.orientation == "up":
        image = image.transpose(Image.Transpose.ROTATE_90)
    elif look.orientation == "down":
        image = image.transpose(Image.Transpose.ROTATE_270)
    return Image.alpha_composite(_shadow(look.size, scale), image).reduce(SUPERSAMPLE)


@lru_cache(maxsize=64)
def _shadow(size: str, scale: float) -> Image.Image:
    """Draw the soft shadow on the ground, which is equal for all kinds and directions."""
    pen = Pen(Thing("", "red", size, 0), scale * SUPERSAMPLE)
    shade = Image.new("L", pen.image.size)
    pen.ellipse(0, 1.02, 0.85, 0.16, target=shade)
    shade = shade.filter(ImageFilter.GaussianBlur(0.8 * pen.unit)).point(lambda v: v * 0.28)
    shadow = Image.new("RGBA", shade.size, INK)
    shadow.putalpha(shade)
    return shadow


def _mix(colour: RGB, other: RGB, amount: float) -> RGB:
    return tuple(round(c + (o - c) * amount) for c, o in zip(colour, other, strict=True))


class Pen:
    """The canvas of a sprite: draws shapes in unit coordinates, with the colour and fill of the look."""

    def __init__(self, look: Thing, unit: float) -> None:
        side = round(SPRITE * unit / SUPERSAMPLE) * SUPERSAMPLE
        self.unit, self.radius, self.centre = unit, RADIUS[look.size] * unit, side / 2
        self.colour, self.fill = PALETTE[look.colour], look.fill
        self.dark, self.light = _mix(self.colour, INK, 0.3), _mix(self.colour, WHITE, 0.45)
        self.image = Image.new("RGBA", (side, side))

    def at(self, x: float, y: float) -> Point:
        return self.centre + x * self.radius, self.centre + y * self.radius

    def _put(self, target: Image.Image | None, colour: RGB | int | None) -> tuple[ImageDraw.ImageDraw, RGB | int]:
        default: RGB | int = 255 if target is not None else self.colour
        return ImageDraw.Draw(target if target is not None else self.image), default if colour is None else colour

    def ellipse(
        self, x: float, y: float, rx: float, ry: float | None = None, colour: RGB | int | None = None,
        target: Image.Image | None = None,
    ) -> None:  # fmt: skip
        canvas, ink = self._put(target, colour)
        ry = rx if ry is None else ry
        canvas.ellipse((*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)), fill=ink)

    def polygon(
        self, *points: Point, colour: RGB | int | None = None, target: Image.Image | None = None
    ) -> None:  # fmt: skip
        canvas, ink = self._put(target, colour)
        canvas.polygon([self.at(*point) for point in points], fill=ink)

    def block(
        self, left: float, top: float, right: float, bottom: float, corner: float = 0.1,
        colour: RGB | int | None = None, target: Image.Image | None = None,
    ) -> None:  # fmt: skip
        canvas, ink = self._put(target, colour)
        canvas.rounded_rectangle((*self.at(left, top), *self.at(right, bottom)), corner * self.radius, fill=ink)

    def line(self, points: Sequence[Point], width: float, colour: RGB | int | None = None) -> None:
        """Draw a stroke with round ends and joints."""
        canvas, ink = self._put(None, colour)
        canvas.line([self.at(*point) for point in points], fill=ink, width=max(1, round(width * self.radius)))
        for x, y in points:
            self.ellipse(x, y, width / 2, colour=ink)

    def body(self, shape: Callable[[Image.Image], None]) -> None:
        """Draw the part that has the fill: solid, striped with white, or white with a coloured outline."""
        mask = Image.new("L", self.image.size)
        shape(mask)
        self.image.paste(self.colour, mask=mask)
        if self.fill == "striped":
            stripes = Image.new("L", self.image.size)
            canvas, step = ImageDraw.Draw(stripes), (5.6 if self.radius > 8 * self.unit else 4.0) * self.unit
            x = self.centre % step - 0.25 * step - step
            while x < self.image.width:
                canvas.rectangle((x, 0, x + step / 2, self.image.height), fill=255)
                x += step
            self.image.paste(WHITE, mask=ImageChops.multiply(self._inside(mask, 0.7), stripes))
        elif self.fill == "outlined":
            self.image.paste(WHITE, mask=self._inside(mask, 1.5))

    def _inside(self, mask: Image.Image, depth: float) -> Image.Image:
        """Return the mask of the pixels deeper than `depth`: a box blur of that radius leaves them full white."""
        return mask.filter(ImageFilter.BoxBlur(depth * self.unit)).point(lambda v: 255 if v >= 254 else 0)

    def letter(self, letter: str, x: float, y: float, half: float, width: float, colour: RGB) -> None:
        for stroke in STROKES[letter]:
            self.line([(x + (2 * u - 1) * half * 0.8, y + (2 * v - 1) * half) for u, v in stroke], width, colour)

    def hat(self, x: float, y: float) -> None:
        self.block(x - 0.3, y - 0.62, x + 0.3, y, 0.06, INK)
        self.block(x - 0.3, y - 0.2, x + 0.3, y - 0.06, 0, WHITE)
        self.block(x - 0.5, y - 0.08, x + 0.5, y + 0.08, 0.08, INK)

    def eye(self, x: float, y: float, r: float = 0.17) -> None:
        self.ellipse(x, y, r, colour=WHITE)
        self.ellipse(x + r * 0.25, y, r * 0.62, colour=INK)


def _fish(pen: Pen, look: Thing) -> None:
    def shape(mask: Image.Image) -> None:
        pen.polygon((-0.25, 0.08), (-1.05, -0.55), (-0.82, 0.08), (-1.05, 0.7), target=mask)
        pen.ellipse(0.22, 0.08, 0.82, 0.62, target=mask)

    pen.body(shape)
    pen.polygon((-0.05, 0.2), (-0.35, 0.5), (0.2, 0.42), colour=pen.dark)
    pen.eye(0.62, -0.05)
    if look.presence:
        pen.hat(0.25, -0.48)


def _bird(pen: Pen, look: Thing) -> None:
    for x in (-0.1, 0.2):
        pen.line(((x, 0.6), (x, 0.95)), 0.09, INK)
    pen.polygon((0.6, -0.5), (1.08, -0.26), (0.6, -0.1), colour=(240, 150, 40))

    def shape(mask: Image.Image) -> None:
        pen.polygon((-0.4, 0.0), (-1.08, -0.3), (-0.95, 0.1), (-1.0, 0.42), (-0.4, 0.5), target=mask)
        pen.ellipse(-0.02, 0.22, 0.68, 0.55, target=mask)
        pen.ellipse(0.34, -0.3, 0.42, target=mask)

    pen.body(shape)
    pen.ellipse(-0.22, 0.2, 0.34, 0.22, pen.dark)
    pen.eye(0.44, -0.34, 0.15)
    if look.presence:
        pen.hat(0.3, -0.62)


def _arrow(pen: Pen, look: Thing) -> None:
    def shape(mask: Image.Image) -> None:
        pen.block(-1.0, -0.3, 0.2, 0.3, 0.12, target=mask)
        pen.polygon((0.02, -0.85), (1.02, 0), (0.02, 0.85), target=mask)

    pen.body(shape)


def _car(pen: Pen, look: Thing) -> None:
    if look.viewpoint == "above":
        for x in (-0.58, 0.58):
            for y in (-0.54, 0.54):
                pen.block(x - 0.2, y - 0.1, x + 0.2, y + 0.1, 0.06, INK)
        pen.block(-1.05, -0.54, 1.05, 0.54, 0.28)
        pen.block(-0.82, -0.42, 0.52, 0.42, 0.16, GLASS)
        pen.block(-0.68, -0.42, 0.1, 0.42, 0.1, pen.light)
        for y in (-0.36, 0.36):
            pen.ellipse(0.94, y, 0.15, 0.14, GLOW)
        return
    pen.polygon((-0.8, 0.1), (-0.6, -0.52), (0.12, -0.52), (0.5, 0.1))
    pen.polygon((-0.62, 0.02), (-0.5, -0.38), (-0.3, -0.38), (-0.3, 0.02), colour=GLASS)
    pen.polygon((-0.16, 0.02), (-0.16, -0.38), (0.05, -0.38), (0.28, 0.02), colour=GLASS)
    pen.block(-1.05, 0.02, 1.05, 0.62, 0.18)
    pen.ellipse(0.95, 0.22, 0.13, 0.13, GLOW)
    for x in (-0.55, 0.55):
        pen.ellipse(x, 0.64, 0.29, colour=INK)
        pen.ellipse(x, 0.64, 0.12, colour=WHITE)


def _cup(pen: Pen, look: Thing) -> None:
    if look.viewpoint == "above":
        pen.ellipse(0, 0, 1.02, colour=WHITE)
        if look.presence:
            pen.block(0.4, -0.14, 1.15, 0.14, 0.12, pen.dark)
        pen.ellipse(0, 0, 0.72)
        pen.ellipse(0, 0, 0.52, colour=(88, 54, 40))
        pen.ellipse(-0.16, -0.18, 0.14, 0.1, (150, 104, 78))
        return
    pen.ellipse(0, 0.84, 0.9, 0.14, WHITE)
    if look.presence:
        pen.line([(0.5, -0.3), (0.86, -0.3), (1.0, -0.05), (0.86, 0.25), (0.42, 0.4)], 0.19, pen.dark)
    pen.polygon((-0.68, -0.55), (0.68, -0.55), (0.5, 0.5), (0.3, 0.82), (-0.3, 0.82), (-0.5, 0.5))
    pen.ellipse(0, -0.55, 0.68, 0.16, pen.light)
    pen.ellipse(0, -0.53, 0.54, 0.1, (88, 54, 40))


def _box(pen: Pen, look: Thing) -> None:
    if look.state == "open":
        pen.polygon((-0.84, -0.36), (-0.6, -0.72), (0.6, -0.72), (0.84, -0.36), colour=INK)
        for side in (-1, 1):
            pen.polygon(
                (side * 0.84, -0.36), (side * 0.6, -0.72), (side * 0.92, -1.08), (side * 1.16, -0.78), colour=pen.light
            )
    else:
        pen.block(-0.98, -0.72, 0.98, -0.3, 0.08, pen.dark)
    pen.block(-0.84, -0.38, 0.84, 0.95, 0.06)
    pen.block(-0.56, -0.24, 0.56, 0.82, 0.12, WHITE)
    assert look.letter
    pen.letter(look.letter, 0, 0.29, 0.34, 0.2, INK)


def _lamp(pen: Pen, look: Thing) -> None:
    if look.state == "lit":
        pen.ellipse(0, -0.1, 1.3, 1.2, (*_mix(GLOW, WHITE, 0.35), 150))
        pen.polygon((-0.7, -0.1), (0.7, -0.1), (1.0, 0.9), (-1.0, 0.9), colour=GLOW)
    pen.line(((0, -0.2), (0, 0.85)), 0.14, INK)
    pen.block(-0.45, 0.78, 0.45, 0.98, 0.1, INK)
    pen.body(lambda mask: pen.polygon((-0.42, -1.0), (0.42, -1.0), (0.85, 0.0), (-0.85, 0.0), target=mask))
    if look.state == "lit":
        pen.ellipse(0, 0.04, 0.3, 0.2, WHITE)


def _house(pen: Pen, look: Thing) -> None:
    if look.presence:
        pen.block(0.38, -0.84, 0.7, -0.2, 0.04, INK)
        for x, y, r in ((0.6, -1.02, 0.18), (0.86, -1.14, 0.16)):
            pen.ellipse(x, y, r, colour=WHITE)
    pen.block(-0.78, -0.2, 0.78, 0.98, 0.05)
    pen.polygon((-1.1, -0.05), (0, -0.88), (1.1, -0.05), colour=pen.dark)
    pen.block(-0.17, 0.45, 0.17, 0.98, 0.06, WHITE)
    for x in (-0.45, 0.45):
        pen.block(x - 0.26, 0.04, x + 0.26, 0.5, 0.05, WHITE)
        pen.block(x - 0.19, 0.11, x + 0.19, 0.43, 0.02, GLOW if look.state == "lit" else INK)


def _star(pen: Pen, look: Thing) -> None:
    tips = [
        (
            (1.1 if k % 2 == 0 else 0.52) * math.sin(k * math.pi / 5),
            0.05 - (1.1 if k % 2 == 0 else 0.52) * math.cos(k * math.pi / 5),
        )
        for k in range(10)
    ]
    pen.body(lambda mask: pen.polygon(*tips, target=mask))
    if look.presence:
        pen.line(((-0.62, -0.12), (0.62, -0.12)), 0.1, INK)
        for x in (-0.3, 0.3):
            pen.block(x - 0.25, -0.16, x + 0.25, 0.2, 0.14, INK)


def _heart(pen: Pen, look: Thing) -> None:
    turns = (k * math.pi / 30 for k in range(60))
    pen.polygon(
        *(
            (
                math.sin(t) ** 3 * 1.08,
                0.02 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15.5,
            )
            for t in turns
        )
    )
    assert look.letter
    pen.letter(look.letter, 0, -0.08, 0.36, 0.21, WHITE if sum(pen.colour) < 430 else INK)


def _flower(pen: Pen, look: Thing) -> None:
    if look.viewpoint == "above":
        for k in range(6):
            angle = k * math.pi / 3
            pen.ellipse(0.6 * math.sin(angle), 0.6 * math.cos(angle), 0.42)
        pen.ellipse(0, 0, 0.36, colour=pen.dark)
        pen.ellipse(0, 0, 0.26, colour=GLOW)
        return
    pen.line(((0, 0), (0, 0.95)), 0.14, STEM)
    pen.polygon((0, 0.92), (-0.62, 0.2), (-0.5, 0.7), colour=STEM)
    pen.polygon((0, 0.92), (0.62, 0.2), (0.5, 0.7), colour=STEM)
    pen.ellipse(0, -0.32, 0.56, 0.48)
    pen.polygon((-0.56, -0.3), (-0.58, -1.02), (-0.24, -0.62), (0, -1.08), (0.24, -0.62), (0.58, -1.02), (0.56, -0.3))


def _umbrella(pen: Pen, look: Thing) -> None:
    if look.state == "open":
        pen.line(((0, -1.0), (0, 0.72), (0.06, 0.88), (0.2, 0.92), (0.34, 0.84), (0.36, 0.7)), 0.13, INK)

        def shape(mask: Image.Image) -> None:
            pen.ellipse(0, 0.1, 1.12, 0.98, target=mask)
            pen.polygon((-1.3, 0.1), (1.3, 0.1), (1.3, 1.3), (-1.3, 1.3), colour=0, target=mask)
            for x in (-0.75, 0, 0.75):
                pen.ellipse(x, 0.12, 0.38, 0.16, 0, mask)

        pen.body(shape)
        return
    pen.line(((0, -1.1), (0, 0.72), (0.06, 0.88), (0.2, 0.92), (0.34, 0.84), (0.36, 0.7)), 0.13, INK)
    pen.body(lambda mask: pen.polygon((-0.06, -1.0), (0.06, -1.0), (0.42, 0.3), (0, 0.42), (-0.42, 0.3), target=mask))


ARTISTS: dict[str, Callable[[Pen, Thing], None]] = {
    "fish": _fish,
    "bird": _bird,
    "arrow": _arrow,
    "car": _car,
    "cup": _cup,
    "box": _box,
    "lamp": _lamp,
    "house": _house,
    "star": _star,
    "heart": _heart,
    "flower": _flower,
    "umbrella": _umbrella,
}
