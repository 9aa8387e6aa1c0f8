"""Chest phantoms and auscultation sounds: drawn from numbers, many at a time. Not medical images.

Coordinates: x to the viewer's right, y down, both in [-1, 1] over the picture. As on films, the patient's left is on
the viewer's right of a frontal view. A lateral view is taken with the affected side at the detector: for a left finding
the spine is on the viewer's right, for a right finding on the left.
"""

from dataclasses import dataclass

import numpy as np

MM_PER_UNIT = 160.0  # the picture is 320 mm wide
_CHUNK_PIXELS = 1 << 18  # pixels drawn together: small enough to stay in the processor's cache

Numbers = np.ndarray | float

ZONE_HEIGHT = np.array([-0.44, -0.09, 0.25], np.float32)  # y of upper, middle, lower


@dataclass(frozen=True, kw_only=True, slots=True)
class Chests:
    """N chests as columns of numbers, each (N,); what differs between patients is stable over a patient's records."""

    # anatomy of the patient
    width: np.ndarray  # of the body, about 1
    height: np.ndarray  # of the lungs, about 1
    shift: np.ndarray  # of the body in x
    dome: np.ndarray  # y of the diaphragm
    curve: np.ndarray  # of the spine
    ribs: np.ndarray  # phase of the ribs
    heart: np.ndarray  # half width of the heart, .27 to .54
    # of the record
    lateral: np.ndarray  # bool
    left: np.ndarray  # bool, side of finding and effusion
    x: np.ndarray  # of the finding, on its side
    y: np.ndarray
    radius: np.ndarray  # of the finding, in units of the picture
    shape: np.ndarray  # 0 nodule, 1 consolidation, 2 cavity
    tilt: np.ndarray  # of an oval finding, [-1, 1]
    effusion: np.ndarray  # height of the fluid above the diaphragm; 0 is none
    exposure: np.ndarray  # about 1

    def __len__(self) -> int:
        return len(self.width)

    def part(self, rows: np.ndarray | slice) -> "Chests":
        return Chests(**{name: getattr(self, name)[rows] for name in self.__slots__})


def draw(chests: Chests, size: int, rng: np.random.Generator, *, noise_std: float = 0.014) -> np.ndarray:
    """Pictures of the chests. Returns: (N, size, size, 1) uint8. The first rows do not depend on how many follow."""
    out = np.empty((len(chests), size, size, 1), np.uint8)
    step = max(1, _CHUNK_PIXELS // (size * size))
    for start in range(0, len(chests), step):
        rows = np.arange(start, min(start + step, len(chests)))
        picture = np.empty((len(rows), size, size), np.float32)
        lateral = chests.lateral[rows]
        for chosen, view in ((~lateral, _frontal), (lateral, _lateral)):
            if chosen.any():
                picture[chosen] = view(chests.part(rows[chosen]), size)
        grain = rng.standard_normal(picture.shape, dtype=np.float32)
        grain *= noise_std
        picture += grain
        picture *= 255.0
        picture += 0.5
        np.clip(picture, 0, 255, out=picture)
        out[rows, :, :, 0] = picture.astype(np.uint8)
    return out


def _axes(c: Chests, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates inside the body: x (N, 1, S), y (1, S, 1)."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0
    return line[None, None, :] - _column(c.shift), line[None, :, None]


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False)[:, None, None]


def _soft(inside: np.ndarray, slope: float) -> np.ndarray:
    """A smooth step, in place: 0 where ``inside`` <= -.5/slope, 1 where >= .5/slope."""
    inside *= slope
    inside += 0.5
    np.clip(inside, 0.0, 1.0, out=inside)
    square = inside * inside
    inside *= -2.0
    inside += 3.0
    inside *= square
    return inside


def _ellipse(
    x: np.ndarray, y: np.ndarray, cx: Numbers, cy: Numbers, rx: Numbers, ry: Numbers, tilt: Numbers = 0.0
) -> np.ndarray:
    """1 - squared elliptic radius, (N, S, S): positive inside."""
    dx, dy = (x - cx) / rx, (y - cy) / ry
    inside = (1.0 - dx * dx) - dy * dy
    inside += (dx * dy) * tilt
    return inside


def _paint(picture: np.ndarray, where: np.ndarray, brightness: float) -> None:
    """Moves the picture towards ``brightness`` by ``where`` (overwritten)."""
    where *= brightness - picture
    picture += where


def _body(c: Chests, x: np.ndarray, y: np.ndarray, neck: float, chest: float) -> np.ndarray:
    """Soft tissue: a neck, shoulders, a trunk. (N, S, S)."""
    shoulders = np.clip((y + 0.92) / 0.34, 0.0, 1.0)
    half = neck + (chest - neck) * shoulders * (2.0 - shoulders)
    return _soft(half * _column(c.width) - np.abs(x), 7.0)


def _frontal(c: Chests, size: int) -> np.ndarray:
    x, y = _axes(c, size)
    far = np.abs(x) / _column(c.width)  # distance from the midline, on either side
    sign = np.where(c.left, 1.0, -1.0)
    body = _body(c, x, y, 0.26, 0.93)
    dome = _column(c.dome) + 0.55 * (far - 0.40) ** 2  # the diaphragm is highest in the middle of each lung
    picture = body * 0.50
    below = _soft(y - dome, 9.0)
    below *= body
    _paint(picture, below.copy(), 0.66)

    # lungs: two ellipses, cut by the diaphragm
    ry = 0.80 * _column(c.height)
    lungs = _soft(_ellipse(far, y, 0.44, 0.06, 0.335, ry), 2.6)
    lungs *= 1.0 - below
    bones = np.sin(_column(c.ribs) + (21.0 * y - 7.0 * (far - 0.35) ** 2 * 4.0))
    bones *= 0.022
    bones *= body
    dark = lungs * 0.86
    _paint(picture, dark, 0.13)
    picture += bones
    hilum = _soft(_ellipse(far, y, 0.20, -0.06, 0.17, 0.26), 1.2)
    _paint(picture, hilum * 0.30, 0.60)

    # what lies in the middle: spine and great vessels, then the heart
    column = _soft(0.145 - np.abs(x - _column(c.curve) * (y - 0.2)), 9.0)
    column *= _soft(y + 0.95, 4.0)
    _paint(picture, column * 0.80, 0.72)
    windpipe = _soft(0.07 - np.abs(x), 7.0) * _soft(-0.42 - y, 5.0)
    _paint(picture, windpipe * 0.32, 0.25)
    half = _column(c.heart)
    heart = _soft(_ellipse(x, y, 0.02 + 0.36 * half, 0.29, half, 0.16 + 0.52 * half, 0.55), 1.6)
    _paint(picture, heart * 0.92, 0.74)

    # a meniscus: the fluid climbs along the chest wall
    fluid = _soft(y - (dome - _column(c.effusion) * (0.42 + 2.1 * far**3)), 6.0)
    fluid *= _soft(x * _column(sign) - 0.16, 5.0)
    fluid *= body
    fluid *= _column(c.effusion > 0)
    _paint(picture, fluid, 0.78)
    _finding(picture, c, x * _column(sign), y)
    picture *= _column(c.exposure)
    return picture


def _lateral(c: Chests, size: int) -> np.ndarray:
    x, y = _axes(c, size)
    back = x * _column(np.where(c.left, 1.0, -1.0))  # towards the spine
    body = _body(c, back + 0.06 * y, y, 0.34, 0.76)
    dome = _column(c.dome) - 0.10 + 0.42 * (back + 0.05) ** 2 + 0.20 * back  # deeper at the back
    picture = body * 0.54
    below = _soft(y - dome, 9.0)
    below *= body
    _paint(picture, below.copy(), 0.66)

    lungs = _soft(_ellipse(back, y, 0.03, 0.02, 0.60, 0.80 * _column(c.height), -0.25), 2.4)
    lungs *= 1.0 - below
    _paint(picture, lungs * 0.84, 0.15)
    arms = _soft(-0.52 - y, 3.0)
    arms = arms * body
    _paint(picture, arms * 0.55, 0.62)
    bones = np.sin(_column(c.ribs) + (19.0 * y - 8.0 * back))
    bones *= 0.018
    bones *= body
    picture += bones

    spine = 0.135 - np.abs(back - 0.55 + (0.16 + _column(c.curve)) * (y + 0.1) ** 2)
    spine = _soft(spine, 9.0)
    spine *= body
    blocks = 0.70 + 0.07 * np.sin(_column(c.ribs) + 30.0 * y)
    spine *= 0.85
    spine *= blocks - picture
    picture += spine
    half = _column(c.heart)
    heart = _soft(_ellipse(back, y, -0.44 + 0.62 * half, 0.30, 0.06 + 0.82 * half, 0.14 + 0.62 * half, -0.45), 1.6)
    heart *= body
    _paint(picture, heart * 0.86, 0.72)

    fluid = _soft(y - (dome - _column(c.effusion) * (0.45 + 2.3 * np.maximum(back + 0.1, 0.0) ** 1.5)), 6.0)
    fluid *= _soft(back + 0.10, 3.0)
    fluid *= body
    fluid *= _column(c.effusion > 0)
    _paint(picture, fluid, 0.78)
    _finding(picture, c, back, y)
    picture *= _column(c.exposure)
    return picture


def _finding(picture: np.ndarray, c: Chests, side: np.ndarray, y: np.ndarray) -> None:
    """Brightens the finding: a round nodule, a wide soft patch, a ring with a dark middle. ``side``: x on its side."""
    cx, cy, radius = _column(c.x), _column(c.y), _column(c.radius)
    for shape in range(3):
        rows = np.flatnonzero(c.shape == shape)
        if not len(rows):
            continue
        at = side[rows], y, cx[rows], cy[rows]
        r = radius[rows]
        if shape == 0:
            spot = _soft(_ellipse(*at, r, r), 0.75)
            spot *= 0.92
        elif shape == 1:
            tilt = _column(c.tilt[rows])
            spot = _soft(_ellipse(*at, 1.25 * r, 0.80 * r, tilt), 0.55)
            lobe = _soft(_ellipse(at[0], y, at[2] + 0.55 * r * tilt, at[3] - 0.55 * r, 0.85 * r, 0.6 * r), 0.55)
            np.maximum(spot, lobe, out=spot)
            spot *= 0.74
        else:
            spot = _soft(_ellipse(*at, r, r), 1.1)
            hole = _soft(_ellipse(*at, 0.62 * r, 0.62 * r), 0.75)
            hole *= 0.95
            hole *= spot
            spot -= hole
            spot *= 0.84
            part = picture[rows]
            _paint(part, hole, 0.10)
            picture[rows] = part
        part = picture[rows]
        _paint(part, spot, 0.97)
        picture[rows] = part


def sounds(
    heart_rate: np.ndarray, murmur: np.ndarray, wheeze: np.ndarray, rng: np.random.Generator, *, sample_rate: int = 4000
) -> np.ndarray:
    """One second of auscultation each: two heart sounds a beat, a systolic murmur, a wheeze while breathing out.

    Args: heart_rate (N,) beats a minute; murmur, wheeze (N,) bool. Returns: (N, sample_rate) float32 in [-1, 1].
    """
    out = np.empty((len(heart_rate), sample_rate), np.float32)
    time = (np.arange(sample_rate, dtype=np.float32) / sample_rate)[None, :]
    for start in range(0, len(out), 64):
        part = slice(start, start + 64)
        n = len(out[part])
        draws = rng.random((n, 4), dtype=np.float32)
        beat = (60.0 / heart_rate[part].astype(np.float32))[:, None]
        phase = np.mod(time / beat + draws[:, :1], 1.0) * beat  # seconds since the beat began
        first = np.exp(-phase / 0.03) * np.sin(2 * np.pi * 45.0 * phase)
        later = phase - 0.32 * np.sqrt(beat)
        second = np.where(later > 0, np.exp(-np.abs(later) / 0.022) * np.sin(2 * np.pi * 65.0 * later), 0.0)
        hiss = rng.standard_normal((n, sample_rate), dtype=np.float32)
        rough = hiss - np.roll(hiss, 6, axis=1)
        systole = np.clip(np.minimum(phase - 0.06, 0.30 * np.sqrt(beat) - phase) / 0.05, 0.0, 1.0)
        breath = 0.5 - 0.5 * np.cos(2 * np.pi * (time * 1.0 + draws[:, 1:2]))
        pitch = 280.0 + 160.0 * draws[:, 2:3]
        tone = np.sin(2 * np.pi * pitch * time) + 0.4 * np.sin(4 * np.pi * pitch * time)
        signal = 0.55 * first + 0.40 * second + 0.012 * hiss + 0.02 * breath * hiss
        signal += murmur[part, None] * systole * rough * 0.07
        signal += wheeze[part, None] * breath * tone * 0.14
        out[part] = np.clip(signal * (0.85 + 0.3 * draws[:, 3:4]), -1.0, 1.0)
    return out
