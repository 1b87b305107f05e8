"""Synthetic faces, for a first training without a download.

A face is what stays the same of a person (`Identity`: shape, colours, hair, marks) seen under what does not (pose,
expression, light, blur, occlusion, sensor). Both are drawn at random from continuous ranges, so a network can learn
to tell one from the other and is tested on people it never saw.

Coordinates: face space has its origin between the eyes, x to the right, y down, z towards the viewer; the eyes are
about 17 units to each side. A `_View` turns it into pixels of a canvas that is drawn larger and then reduced.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_CANVAS = 224  # pixels drawn, twice the usual image: reducing it smooths the edges
_HAIR_STYLES = ("shaved", "short", "parted", "long", "curly", "tied")


class Identity(NamedTuple):
    """What makes a person; lengths in units of face space, colours RGB 0 to 255."""

    skin: np.ndarray
    lips: np.ndarray
    iris: np.ndarray
    hair: np.ndarray
    brow: np.ndarray
    hair_style: str
    hair_volume: float
    hairline: float  # y of its middle, negative
    part: float  # x where the hair is parted
    cheek_width: float
    jaw_shape: float  # exponent of the outline: 1.7 pointed, 3.2 square
    chin: float  # y
    crown: float  # y, negative
    ear_size: float
    eye_distance: float  # from the middle
    eye_width: float
    eye_height: float
    eye_tilt: float
    eye_depth: float  # of the sockets
    brow_height: float
    brow_thickness: float
    brow_arch: float
    brow_tilt: float
    nose_length: float
    nose_width: float
    nose_height: float  # how far the ridge stands out
    mouth_y: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    mouth_curve: float
    cheekbones: float
    beard: float  # 0 none .. 1 full
    moles: np.ndarray  # [n, 3]: x, y, radius
    freckles: float


class _View(NamedTuple):
    """Where and how the person is seen: pose, in radians and pixels of the final 112, and expression."""

    yaw: float
    pitch: float
    roll: float
    scale: float
    shift_x: float
    shift_y: float
    smile: float
    open_mouth: float
    brow_raise: float
    lids: float  # 1 open .. 0.3 nearly closed
    gaze_x: float
    gaze_y: float

    def points(self, points_N2, depth=0.0, stiff: float = 0.0) -> list[tuple[float, float]]:
        """Face space to canvas pixels. stiff: share of the width that a turned head keeps, because it is round."""
        x, y = np.asarray(points_N2, float).T
        x = x * (stiff + (1 - stiff) * np.cos(self.yaw)) + depth * np.sin(self.yaw)
        y = y * np.cos(self.pitch) + depth * np.sin(self.pitch)
        cos, sin = np.cos(self.roll) * self.scale, np.sin(self.roll) * self.scale
        screen_x = (56 + self.shift_x + cos * x - sin * y) * (_CANVAS / 112)
        screen_y = (50 + self.shift_y + sin * x + cos * y) * (_CANVAS / 112)
        return list(zip(screen_x.tolist(), screen_y.tolist()))


def _between(random: np.random.RandomState, low: float, high: float) -> float:
    return low + (high - low) * random.random_sample()


def _mix(a, b, share: float) -> np.ndarray:
    return np.asarray(a, float) * (1 - share) + np.asarray(b, float) * share


def _along(colours, position: float) -> np.ndarray:
    """A colour at `position` 0 .. 1 along a list of colours."""
    colours = np.asarray(colours, float)
    place = position * (len(colours) - 1)
    first = min(int(place), len(colours) - 2)
    return _mix(colours[first], colours[first + 1], place - first)


def _paint(colour) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.asarray(colour, float), 0, 255)
    return int(red), int(green), int(blue)


def draw_identity(random: np.random.RandomState) -> Identity:
    """One person at random."""
    skin = _along(
        [(250, 222, 200), (232, 190, 160), (198, 145, 110), (150, 100, 72), (92, 60, 45)], random.random_sample()
    ) + random.normal(0, 7, 3)
    hair = _along(
        [(25, 20, 20), (60, 38, 26), (110, 70, 40), (170, 85, 40), (205, 165, 100), (150, 148, 146), (225, 222, 218)],
        random.random_sample() ** 1.5,
    ) + random.normal(0, 8, 3)
    iris = _along([(50, 30, 18), (95, 60, 30), (95, 110, 60), (70, 125, 140), (110, 150, 190)], random.random_sample())
    moles = random.random_sample((random.randint(0, 4), 3)) * (56, 62, 1.0) + (-28, -14, 0.8)
    return Identity(
        skin=skin,
        lips=_mix(skin, (165, 50, 60), _between(random, 0.25, 0.75)),
        iris=iris,
        hair=hair,
        brow=_mix(hair * 0.8, skin * 0.5, _between(random, 0.0, 0.4)),
        hair_style=_HAIR_STYLES[random.randint(len(_HAIR_STYLES))],
        hair_volume=_between(random, 2, 9),
        hairline=_between(random, -38, -22),
        part=_between(random, -22, 22),
        cheek_width=_between(random, 31, 41),
        jaw_shape=_between(random, 1.7, 3.2),
        chin=_between(random, 50, 62),
        crown=_between(random, -50, -42),
        ear_size=_between(random, 6, 11),
        eye_distance=_between(random, 13.5, 19.5),
        eye_width=_between(random, 6.8, 10.0),
        eye_height=_between(random, 2.8, 5.2),
        eye_tilt=_between(random, -0.18, 0.28),
        eye_depth=_between(random, 1.0, 4.5),
        brow_height=_between(random, 8, 14),
        brow_thickness=_between(random, 1.0, 3.4),
        brow_arch=_between(random, 0.0, 4.0),
        brow_tilt=_between(random, -0.22, 0.22),
        nose_length=_between(random, 17, 27),
        nose_width=_between(random, 5.0, 10.0),
        nose_height=_between(random, 6, 14),
        mouth_y=_between(random, 33, 41),
        mouth_width=_between(random, 10, 18),
        upper_lip=_between(random, 1.2, 4.0),
        lower_lip=_between(random, 2.0, 5.5),
        mouth_curve=_between(random, -2.0, 2.5),
        cheekbones=_between(random, 0, 5),
        beard=max(0.0, _between(random, -1.6, 1.0)),
        moles=moles,
        freckles=max(0.0, _between(random, -2.5, 1.0)),
    )


def _draw_view(random: np.random.RandomState) -> _View:
    return _View(
        yaw=random.normal(0, 0.22),
        pitch=random.normal(0, 0.12),
        roll=random.normal(0, 0.06),
        scale=_between(random, 0.82, 0.94),
        shift_x=random.normal(0, 1.8),
        shift_y=random.normal(0, 1.8),
        smile=_between(random, -1.0, 4.5),
        open_mouth=max(0.0, _between(random, -8, 6)),
        brow_raise=_between(random, -1.0, 3.0),
        lids=min(1.0, _between(random, 0.45, 1.5)),
        gaze_x=_between(random, -2, 2),
        gaze_y=_between(random, -0.7, 0.7),
    )


def _outline(person: Identity, grow: float = 0.0) -> np.ndarray:
    """[48, 2]: the head seen from the front, clockwise from the right temple, `grow` units larger."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    power = 2 / np.where(sin > 0, person.jaw_shape, 2.3)
    height = np.where(sin > 0, person.chin, -person.crown) + grow
    width = person.cheek_width + grow
    return np.stack([np.sign(cos) * np.abs(cos) ** power * width, np.sign(sin) * np.abs(sin) ** power * height], 1)


def _ellipse(x: float, y: float, width: float, height: float, turn: float = 0.0, points: int = 20) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    along, across = np.cos(angle) * width, np.sin(angle) * height
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack([x + along * cos - across * sin, y + along * sin + across * cos], 1)


class _Drawing:
    """One picture in the making: the canvas, the person and the view."""

    def __init__(self, person: Identity, view: _View, random: np.random.RandomState):
        self.person, self.view, self.random = person, view, random
        self.image = Image.new("RGB", (_CANVAS, _CANVAS))
        self.pen = ImageDraw.Draw(self.image)

    def fill(self, points_N2, colour, depth: float = 0.0, stiff: float = 0.0) -> None:
        self.pen.polygon(self.view.points(points_N2, depth, stiff), fill=_paint(colour))

    def line(self, points_N2, colour, width: float, depth: float = 0.0) -> None:
        self.pen.line(
            self.view.points(points_N2, depth),
            fill=_paint(colour),
            joint="curve",
            width=max(1, round(width * self.view.scale * _CANVAS / 112)),
        )

    def background(self) -> None:
        random = self.random
        corners = random.randint(20, 230, (2, 2, 3)).astype(np.uint8)
        self.image.paste(Image.fromarray(corners).resize((_CANVAS, _CANVAS), Image.BILINEAR))
        for _ in range(random.randint(0, 4)):
            x, y = random.randint(0, _CANVAS, 2)
            width, height = random.randint(10, 90, 2)
            self.pen.ellipse((x - width, y - height, x + width, y + height), fill=_paint(random.randint(20, 230, 3)))
        clothes = random.randint(15, 240, 3)
        self.fill([(-24, 52), (24, 52), (58, 72), (62, 130), (-62, 130), (-58, 72)], clothes, -14, 0.7)
        neck = self.person.cheek_width * 0.62
        self.fill([(-neck, 30), (neck, 30), (neck, 64), (0, 76), (-neck, 64)], self.person.skin * 0.72, -10, 0.8)

    def hair_behind(self) -> None:
        person = self.person
        if person.hair_style == "shaved":
            return
        shade = person.hair * 0.75
        volume = person.hair_volume
        if person.hair_style == "long":
            width = person.cheek_width + volume
            self.fill(
                [(-width, -10), (width, -10), (width + 3, 66), (width - 16, 74), (16 - width, 74), (-width - 3, 66)],
                shade,
                -14,
                0.8,
            )
        if person.hair_style == "tied":
            self.fill(_ellipse(0, person.crown - 4, 13 + volume, 10 + volume), shade, -18, 0.8)
        upper = _outline(person, volume)
        self.fill(upper[upper[:, 1] < 14], shade, -10, 0.8)

    def head(self) -> None:
        person = self.person
        for side in (-1, 1):
            self.fill(
                _ellipse(side * (person.cheek_width + 1.5), 6, person.ear_size * 0.5, person.ear_size),
                person.skin * 0.88,
                -8,
                0.8,
            )
        self.fill(_outline(person), person.skin, 0, 0.7)
        if person.beard > 0.15:
            outline = _outline(person)
            lower = outline[outline[:, 1] > 4]  # from the right ear along the jaw to the left one
            x = np.linspace(lower[-1, 0], lower[0, 0], 15)
            inner = 4 + (person.mouth_y - 13) * (1 - np.abs(x / person.cheek_width) ** 3)
            colour = _mix(person.skin, person.hair * 0.85, 0.25 + 0.65 * person.beard)
            self.fill(np.concatenate([lower, np.stack([x, inner], 1)]), colour, 2, 0.7)

    def eyes(self) -> None:
        person, view = self.person, self.view
        steps = np.linspace(0, np.pi, 9)
        for side in (-1, 1):
            centre = np.array([side * person.eye_distance, 0.0])
            turn = np.array([[1, -side * person.eye_tilt], [side * person.eye_tilt, 1]])  # small angles
            arc = np.stack([np.cos(steps) * person.eye_width, np.sin(steps)], 1)
            upper = (arc * (1, -person.eye_height * view.lids)) @ turn + centre
            lower = (arc * (-1, person.eye_height * 0.65)) @ turn + centre
            depth = 9 - person.eye_depth
            self.fill(_ellipse(*centre, person.eye_width * 1.35, person.eye_height * 2.0), person.skin * 0.9, depth)
            self.fill(np.concatenate([upper, lower]), (236, 231, 226), depth)
            radius = min(person.eye_height * 0.98, person.eye_width * 0.52)
            iris_at = centre + (view.gaze_x, view.gaze_y)
            height = min(radius, person.eye_height * view.lids)
            self.fill(_ellipse(*iris_at, radius, height), person.iris, depth)
            self.fill(_ellipse(*iris_at, radius * 0.45, height * 0.45, points=12), (12, 10, 10), depth)
            self.fill(_ellipse(iris_at[0] - 0.9, iris_at[1] - 0.9, 0.7, 0.7, points=8), (245, 245, 245), depth)
            self.line(upper, person.skin * 0.22, 1.1, depth)
            self.line(lower, person.skin * 0.6, 0.5, depth)

    def brows(self) -> None:
        person, view = self.person, self.view
        across = np.linspace(-1, 1, 8)
        thickness = person.brow_thickness * (1 - 0.35 * across**2)
        for side in (-1, 1):
            x = side * (person.eye_distance + across * person.eye_width * 1.35)
            y = (
                -person.brow_height
                - view.brow_raise
                + person.brow_arch * across**2
                + side * person.brow_tilt * (x - side * person.eye_distance)
            )
            upper, lower = np.stack([x, y - thickness], 1), np.stack([x, y + thickness * 0.6], 1)
            self.fill(np.concatenate([upper, lower[::-1]]), person.brow, 10)

    def nose(self) -> None:
        person = self.person
        tip = person.nose_length
        shade = person.skin * 0.78
        for side in (-1, 1):
            wing = person.nose_width * side
            self.line(
                [(wing * 0.75, tip - 6), (wing * 1.05, tip - 2), (wing * 0.85, tip + 1.2)],
                shade,
                1.0,
                person.nose_height * 0.7,
            )
            self.fill(
                _ellipse(wing * 0.5, tip + 0.8, person.nose_width * 0.24, 1.3, points=10),
                person.skin * 0.4,
                person.nose_height * 0.9,
            )
        self.line(
            [(-person.nose_width * 0.3, tip + 2), (person.nose_width * 0.3, tip + 2)], shade, 0.9, person.nose_height
        )

    def mouth(self) -> None:
        person, view = self.person, self.view
        across = np.linspace(-1, 1, 13)
        width = person.mouth_width + 0.7 * view.smile
        x = across * width
        line = person.mouth_y + view.smile * 0.6 - (person.mouth_curve + view.smile) * across**2
        bow = (1 - across**2) * (0.75 + 0.5 * np.abs(across))  # two peaks above the middle
        gap = view.open_mouth * (1 - across**2)
        upper, lower = np.stack([x, line - person.upper_lip * bow * 1.3], 1), line + gap
        below = np.stack([x, lower + person.lower_lip * (1 - across**2) ** 0.8], 1)
        self.fill(np.concatenate([upper, np.stack([x, line], 1)[::-1]]), person.lips * 0.92, 11)
        self.fill(np.concatenate([np.stack([x, lower], 1), below[::-1]]), person.lips, 11)
        if view.open_mouth > 1:
            hole = np.concatenate([np.stack([x, line], 1), np.stack([x, lower], 1)[::-1]])
            self.fill(hole, (60, 22, 24), 10)
            teeth = np.stack([x * 0.8, line + np.minimum(gap * 0.5, 2.2)], 1)
            self.fill(np.concatenate([np.stack([x * 0.8, line], 1), teeth[::-1]]), (232, 228, 220), 10)
        self.line(np.stack([x, line], 1), person.lips * 0.45, 0.8, 11)

    def marks(self) -> None:
        person = self.person
        for x, y, radius in person.moles:
            self.fill(_ellipse(x, y, radius, radius, points=8), person.skin * 0.35, 8 - abs(x) / 6)
        if person.freckles > 0:
            # always the same spots for one person: they are drawn from the person's own numbers
            spots = np.random.RandomState(int(person.freckles * 2**31)).normal(0, 1, (int(60 * person.freckles), 2))
            for x, y in spots * (15, 4) + (0, 15):
                self.fill(_ellipse(x, y, 0.5, 0.5, points=5), person.skin * 0.75, 8 - abs(x) / 6)

    def hair_above(self) -> None:
        person = self.person
        if person.hair_style == "shaved":
            return
        outer = _outline(person, person.hair_volume)
        outer = outer[outer[:, 1] < (-6 if person.hair_style != "long" else 6)]  # left temple, crown, right temple
        right = outer[-1, 0]
        x = np.linspace(right, -right, 17)
        inside = np.clip(x / person.cheek_width, -1, 1)
        line = person.hairline + 24 * np.abs(inside) ** 3
        if person.hair_style == "parted":
            line += 9 * np.clip(1 - np.abs(x + person.part) / 26, 0, 1) - 5
        if person.hair_style in ("long", "curly"):
            line += 4 - 4 * np.cos(x / 7 + person.part)
        if person.hair_style == "tied":
            line -= 4
        self.fill(np.concatenate([outer, np.stack([x, line], 1)]), person.hair, -2, 0.75)
        if person.hair_style == "curly":
            for curl_x, curl_y in outer:
                self.fill(_ellipse(curl_x, curl_y, 6, 6, points=10), person.hair * 0.92, -4, 0.75)
        tops = outer[np.linspace(1, len(outer) - 2, 12).astype(int)]
        ends = np.stack([x, line], 1)[np.linspace(15, 1, 12).astype(int)]
        for number, (top, end) in enumerate(zip(tops, ends)):  # strands, from the crown to a ragged hairline
            shade = person.hair * (0.8, 1.18, 1.0)[number % 3] + (0, 6, 0)[number % 3]
            middle = (top + end) / 2 + (person.part * 0.15, -2)
            self.line([top, middle, end + (0, number % 3 + 0.5)], shade, 1.1, -1)

    def glasses(self) -> None:
        random, person = self.random, self.person
        kind = random.random_sample()
        if kind > 0.16:
            return
        colour = random.randint(10, 120, 3)
        for side in (-1, 1):
            ring = _ellipse(side * person.eye_distance, 1, person.eye_width * 1.5, person.eye_height * 2.2)
            if kind < 0.04:
                self.fill(ring, (25, 25, 30), 14)
            self.line([*ring, ring[0]], colour, 1.3, 14)
            self.line(
                [(side * person.cheek_width, -2), (side * (person.eye_distance + person.eye_width * 1.5), 0)],
                colour,
                1.2,
                6,
            )
        gap = person.eye_distance - person.eye_width * 1.5
        self.line([(-gap, 0), (gap, 0)], colour, 1.3, 15)


def _relief(person: Identity, view: _View, size: int) -> np.ndarray:
    """float [size, size]: how far the surface stands out, in units, where light will fall on it."""
    step = 112 / size
    axis = (np.arange(size) + 0.5) * step
    x = (axis[None, :] - 56 - view.shift_x) / view.scale
    y = (axis[:, None] - 50 - view.shift_y) / view.scale
    x, y = x + view.roll * y, y - view.roll * x
    turn = np.sin(view.yaw)

    def bump(at_x, at_y, width, height, depth):
        return np.exp(-(((x - at_x - depth * turn) / width) ** 2) - ((y - at_y) / height) ** 2)

    middle = (person.chin + person.crown) / 2
    round_head = 1 - (x / (person.cheek_width * 1.12)) ** 2 - ((y - middle) / (person.chin * 1.15)) ** 2
    relief = 34 * np.sqrt(np.clip(round_head, 0.02, 1))
    relief = relief + person.nose_height * 0.75 * bump(0, person.nose_length - 4, person.nose_width * 0.62, 7, 14)
    relief += person.nose_height * 0.4 * bump(0, person.nose_length * 0.45, person.nose_width * 0.5, 11, 12)
    for side in (-1, 1):
        relief -= person.eye_depth * bump(side * person.eye_distance, 1, 10, 7, 8)
        relief += person.cheekbones * bump(side * person.cheek_width * 0.58, 17, 10, 8, 6)
    relief += 2.0 * bump(0, person.mouth_y + 2, person.mouth_width * 0.8, 5, 11)
    relief -= 2.0 * bump(0, person.mouth_y + 9, person.mouth_width * 0.7, 3.5, 10)
    relief += 3.0 * bump(0, person.chin - 6, 9, 6, 9)
    return relief


def _light(person: Identity, view: _View, random: np.random.RandomState, size: int) -> np.ndarray:
    """float32 [size, size, 3]: what the colours are multiplied with."""
    relief = _relief(person, view, size // 2)
    down, right = np.gradient(relief, 112 / (size // 2) / view.scale)
    side, height = random.normal(0, 0.55), random.normal(-0.45, 0.35)
    direction = np.array([side, height, 1.0])
    direction /= np.linalg.norm(direction)
    facing = (direction[2] - direction[0] * right - direction[1] * down) / np.sqrt(1 + right**2 + down**2)
    strength = _between(random, 0.35, 0.85)
    shade = Image.fromarray(((1 - strength) + strength * np.clip(facing, 0, 1.2)).astype(np.float32))
    colour = np.clip(random.normal(1, 0.08, 3), 0.7, 1.3) * _between(random, 0.65, 1.25)
    return np.asarray(shade.resize((size, size), Image.BILINEAR))[:, :, None] * colour.astype(np.float32)


def _occlude(image: Image.Image, random: np.random.RandomState) -> None:
    """Now and then something stands before the face: a hand, a scarf, the edge of a screen."""
    if random.random_sample() > 0.18:
        return
    pen, size = ImageDraw.Draw(image), image.width
    x, y = random.randint(0, size, 2)
    width, height = random.randint(size // 12, size // 4, 2)
    colour = _paint(random.randint(10, 240, 3))
    shape = pen.ellipse if random.random_sample() < 0.5 else pen.rectangle
    shape((x - width, y - height, x + width, y + height), fill=colour)


def _photograph(image: Image.Image, random: np.random.RandomState) -> Image.Image:
    """Optics and sensor: blur, low resolution, noise, contrast, now and then no colour."""
    size = image.width
    kind = random.random_sample()
    if kind < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(_between(random, 0.4, 1.5)))
    elif kind < 0.5:
        small = int(size * _between(random, 0.4, 0.8))
        image = image.resize((small, small), Image.BILINEAR).resize((size, size), Image.BILINEAR)
    pixels = np.asarray(image, np.float32) / 255
    pixels = pixels ** np.float32(_between(random, 0.7, 1.4)) * 255
    if random.random_sample() < 0.08:
        pixels = np.repeat(pixels.mean(2, keepdims=True), 3, 2)
    if random.random_sample() < 0.6:
        noise = random.randint(-128, 128, (size, size, 1)).astype(np.float32)
        pixels = pixels + noise * np.float32(_between(random, 0.01, 0.09))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_face(person: Identity, random: np.random.RandomState, size: int = 112) -> Image.Image:
    """One photograph of a person, RGB [size, size]: the person is the same in each, the rest comes from `random`."""
    view = _draw_view(random)
    drawing = _Drawing(person, view, random)
    drawing.background()
    drawing.hair_behind()
    drawing.head()
    drawing.eyes()
    drawing.nose()
    drawing.mouth()
    drawing.marks()
    drawing.brows()
    drawing.hair_above()
    drawing.glasses()
    image = drawing.image.resize((size, size), Image.BOX)
    lit = np.asarray(image, np.float32) * _light(person, view, random, size)
    image = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))
    _occlude(image, random)
    return _photograph(image, random)
