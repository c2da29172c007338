"""The procedurally drawn source tasks that the ``demo:*`` backbones were pretrained on.

Every task is a pure function of a :class:`numpy.random.Generator`: no data set is read and nothing
is downloaded. The only font is the one that Pillow ships. The tasks differ, on purpose, in how
relevant they are to handwritten digits: `digits` > `letters` > `shapes` > `textures` > `noise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

LETTERS = "ABCDEFGHJKLMNPQRTUVWXYZabdefghmnqrt&@#?%+*=$"
"""Classes of `letters`: no digit, none of their look-alikes (I, l, O, S ...), no case twins."""

DIGITS = "0123456789"
SHAPES = ("disc", "ring", "square", "frame", "triangle", "star", "cross", "bar", "arc", "hexagon")
TEXTURES = (*(f"grating{i}" for i in range(6)), "checker", "blobs", "dots", "rings")
NOISE_CLASSES = 10

_SUPERSAMPLE = 2  # draw larger and shrink: ImageDraw has no anti-aliasing of its own


def _canvas(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    side = size * _SUPERSAMPLE
    image = Image.new("L", (side, side), 0)
    return image, ImageDraw.Draw(image), side


def _warp(image: Image.Image, rng: np.random.Generator, angle: float) -> Image.Image:
    """Rotate, shear, scale and shift about the centre."""
    side = image.width
    turn = math.radians(rng.uniform(-angle, angle))
    shear, sx, sy = rng.uniform(-0.3, 0.3), *rng.uniform(0.8, 1.3, 2)
    matrix = np.array(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    ) @ np.array([[sx, shear], [0.0, sy]])
    centre = np.array([side / 2, side / 2])
    shift = centre - matrix @ (centre + rng.uniform(-0.07, 0.07, 2) * side)
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    return image.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )


def _wobble(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Bend smoothly, as a hand does to the strokes of a printed letter."""
    side, cells = image.width, 3
    knots = np.linspace(0, side, cells + 1)
    grid = np.stack(np.meshgrid(knots, knots), axis=-1)  # [row, column] -> (x, y)
    grid += rng.normal(0, 0.045 * side, grid.shape)
    mesh = []
    for row in range(cells):
        for column in range(cells):
            box = tuple(int(knots[i]) for i in (column, row, column + 1, row + 1))
            corners = ((0, 0), (1, 0), (1, 1), (0, 1))  # upper left, then counter-clockwise
            quad = tuple(float(v) for i, j in corners for v in grid[row + i, column + j])
            mesh.append((box, quad))
    return image.transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _finish(mask: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    """Turn a grey mask into an RGB image: blur or coarse pixels, polarity, contrast, noise."""
    mask = mask.resize((size, size), Image.Resampling.BOX)
    if rng.random() < 0.5:  # coarse pixels, as any small image that was enlarged has them
        small = int(rng.integers(8, 13))
        mask = mask.resize((small, small), Image.Resampling.BOX)
        mask = mask.resize((size, size), Image.Resampling.BICUBIC)
    elif rng.random() < 0.5:
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    alpha = np.asarray(mask, np.float32)[..., None] / 255.0
    tint = rng.uniform(0.85, 1.0, 3)
    back, ink = rng.uniform(0, 70), rng.uniform(150, 255)
    if rng.random() < 0.3:  # dark on light
        back, ink = 255 - back, 255 - ink
    picture = (back + (ink - back) * alpha) * tint + rng.normal(0, rng.uniform(0, 12), alpha.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _glyph(text: str, rng: np.random.Generator, size: int) -> np.ndarray:
    image, draw, side = _canvas(size)
    # capitals are about 0.7 em high: from half of the picture to all of it
    font = ImageFont.load_default(size=float(rng.integers(int(0.8 * side), int(1.35 * side))))
    stroke = int(rng.integers(0, max(1, side // 16) + 1))
    draw.text((side / 2, side / 2), text, fill=255, font=font, anchor="mm", stroke_width=stroke)
    return _finish(_wobble(_warp(image, rng, angle=15), rng), rng, size)


def _polygon(n: int, radius: float, side: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon; with `inner` < 1, of a star."""
    corners = n if inner == 1.0 else 2 * n
    points = []
    for i in range(corners):
        r = radius * (inner if i % 2 else 1.0) if inner != 1.0 else radius
        a = 2 * math.pi * i / corners - math.pi / 2
        points.append((side / 2 + r * math.cos(a), side / 2 + r * math.sin(a)))
    return points


def _shape(kind: str, rng: np.random.Generator, size: int) -> np.ndarray:
    image, draw, side = _canvas(size)
    r = side * rng.uniform(0.25, 0.42)
    thick = max(2, int(r * rng.uniform(0.2, 0.4)))
    low, high = side / 2 - r, side / 2 + r
    box = (low, low, high, high)
    if kind == "disc":
        draw.ellipse(box, fill=255)
    elif kind == "ring":
        draw.ellipse(box, outline=255, width=thick)
    elif kind == "square":
        draw.rectangle(box, fill=255)
    elif kind == "frame":
        draw.rectangle(box, outline=255, width=thick)
    elif kind == "triangle":
        draw.polygon(_polygon(3, r, side), fill=255)
    elif kind == "star":
        draw.polygon(_polygon(5, r, side, inner=0.45), fill=255)
    elif kind == "hexagon":
        draw.polygon(_polygon(6, r, side), fill=255)
    elif kind == "cross":
        draw.line((low, side / 2, high, side / 2), fill=255, width=thick)
        draw.line((side / 2, low, side / 2, high), fill=255, width=thick)
    elif kind == "bar":
        draw.line((low, side / 2, high, side / 2), fill=255, width=thick)
    else:
        start = rng.uniform(0, 360)
        draw.arc(box, start, start + rng.uniform(100, 220), fill=255, width=thick)
    return _finish(_warp(image, rng, angle=180), rng, size)


def _texture(label: int, rng: np.random.Generator, size: int) -> np.ndarray:
    kind = TEXTURES[label]
    y, x = np.mgrid[:size, :size].astype(np.float32)
    period = rng.uniform(4, 10)
    phase = rng.uniform(0, period, 2)
    if kind.startswith("grating"):
        a = math.pi * (label + rng.uniform(-0.25, 0.25)) / 6
        field = np.sin(2 * math.pi * (x * math.cos(a) + y * math.sin(a) + phase[0]) / period)
    elif kind == "checker":
        field = np.sign(np.sin(2 * math.pi * (x + phase[0]) / period))
        field = field * np.sign(np.sin(2 * math.pi * (y + phase[1]) / period))
    elif kind == "dots":
        field = np.sin(2 * math.pi * (x + phase[0]) / period)
        field = 2.0 * (field + np.sin(2 * math.pi * (y + phase[1]) / period) > 1.0) - 1.0
    elif kind == "rings":
        centre = rng.uniform(0, size, 2)
        field = np.sin(2 * math.pi * np.hypot(x - centre[0], y - centre[1]) / period)
    else:
        field = _smooth(rng, size, 1, rng.uniform(1.5, 3.0))[..., 0]
    low, high = rng.uniform(0, 100), rng.uniform(140, 255)
    picture = low + (high - low) * (field[..., None] + 1) / 2 * rng.uniform(0.8, 1.0, 3)
    return np.clip(picture + rng.normal(0, 10, picture.shape), 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator, size: int, channels: int, scale: float) -> np.ndarray:
    """Low-pass random field (size, size, channels) within [-1, 1]; periodic at the edges."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])[..., None]
    white = np.fft.fft2(rng.normal(size=(size, size, channels)), axes=(0, 1))
    field = np.fft.ifft2(white * np.exp(-2 * (math.pi * f * scale) ** 2), axes=(0, 1)).real
    return field / np.abs(field).max()


def _noise(label: int, rng: np.random.Generator, size: int) -> np.ndarray:
    """Coloured noise that does not depend on `label`: there is nothing to learn but by heart."""
    field = _smooth(rng, size, 3, rng.uniform(0.0, 2.0))
    return np.clip(127.5 * (1 + field), 0, 255).astype(np.uint8)


TASKS: dict[str, tuple[int, Callable[[int, np.random.Generator, int], np.ndarray]]] = {
    "letters": (len(LETTERS), lambda label, rng, size: _glyph(LETTERS[label], rng, size)),
    "digits": (len(DIGITS), lambda label, rng, size: _glyph(DIGITS[label], rng, size)),
    "shapes": (len(SHAPES), lambda label, rng, size: _shape(SHAPES[label], rng, size)),
    "textures": (len(TEXTURES), _texture),
    "noise": (NOISE_CLASSES, _noise),
}
"""Number of classes and painter ``(label, rng, size) -> (size, size, 3) uint8`` of each task."""


def classes(task: str) -> int:
    """Return the number of classes of a source task."""
    return TASKS[task][0]


def draw(
    task: str, rng: np.random.Generator, n: int, size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Draw images, uint8 (n, size, size, 3), and labels, int64 (n,), of one of the `TASKS`.

    The classes are balanced to within one image; equal generators draw equal images.
    """
    n_classes, paint = TASKS[task]
    labels = rng.permutation(np.arange(n, dtype=np.int64) % n_classes)
    images = np.stack([paint(int(label), rng, size) for label in labels])
    return images, labels
