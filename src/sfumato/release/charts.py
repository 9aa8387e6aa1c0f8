"""Charts as inline SVG: no script, no fonts, colours from the page's style so that dark mode and print work.

Every function takes plain numbers and returns markup. Labels are escaped here.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 460, 280  # of the drawing area's coordinates; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 16, 44

Point = Sequence[float]


def trajectory(points: Sequence[Point], *, budget: float | None, planned_steps: int | None) -> str:
    """Epsilon after each step as a line, the budget as a dashed one. Points: [[step, epsilon], ...], ascending."""
    steps = max([planned_steps or 0, *(int(p[0]) for p in points), 1])
    top = 1.12 * max([budget or 0.0, *(p[1] for p in points), 1e-9])
    frame = _Frame((0, steps), (0, top))
    marks = [frame.axes(_ticks(0, steps, whole=True), _ticks(0, top), "step", "ε spent so far")]
    if budget is not None:
        y = frame.y(budget)
        marks.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(_text(LEFT + 6, y - 6, f"budget ε = {budget:.4g}", "mark"))
    marks.append(frame.line([(0.0, 0.0), *((p[0], p[1]) for p in points)], "line"))
    last = points[-1]
    marks.append(frame.dot(last[0], last[1], "dot"))
    below = budget is not None and last[1] > 0.85 * budget
    marks.append(
        _text(frame.x(last[0]) - 8, frame.y(last[1]) + (22 if below else -10), f"ε = {last[1]:.4g}", "value end")
    )
    return _svg("Epsilon spent after each step", marks)


def looks(points: Sequence[Point], *, unit: str = "step") -> str:
    """The loss on public records at each look while it trained, the lowest marked. Points: [[step, loss], ...], ascending."""
    losses = [p[1] for p in points]
    room = 0.08 * (max(losses) - min(losses)) or 0.1 * abs(losses[0]) or 1.0
    bottom, top = min(losses) - room, max(losses) + room
    ticks = _ticks(bottom, top)
    frame = _Frame((0, points[-1][0]), (bottom, top), left=_room_for(ticks))
    marks = [frame.axes(_ticks(0, points[-1][0], whole=True), ticks, unit, "loss on public records")]
    marks.append(frame.line([(p[0], p[1]) for p in points], "line"))
    lowest = min(points, key=lambda p: p[1])
    marks.append(frame.dot(lowest[0], lowest[1], "dot"))
    right = frame.x(lowest[0]) > WIDTH / 2
    marks.append(
        _text(
            frame.x(lowest[0]) + (-8 if right else 8),
            frame.y(lowest[1]) - 10,
            f"lowest: {lowest[1]:.4g} at {unit} {lowest[0]:.0f}",
            "value end" if right else "value",
        )
    )
    return _svg("Loss on public records while it trained", marks)


def balance(
    points: Sequence[tuple[float, float, float | None, float | None, float]], *, quality: str, privacy: str, cost: str
) -> str:
    """Quality over what was spent, a dot a round, and what it cost above: three scales in one drawing.

    Args:
      points: (spent, quality, low, high, cost so far) after each round, ascending in what was spent.
      quality, privacy, cost: names of the scales.
    """
    values = [v for _, value, low, high, _ in points for v in (value, low, high) if v is not None]
    room = 0.08 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    bottom, top = min(values) - room, max(values) + room
    right = 1.06 * max(p[0] for p in points) or 1.0
    ticks = _ticks(bottom, top)
    frame = _Frame((0, right), (bottom, top), top=TOP + 38, left=_room_for(ticks))
    marks = [frame.axes(_ticks(0, right), ticks, privacy, quality)]
    above = frame.top - 10
    marks.append(_text((frame.left + WIDTH - RIGHT) / 2, TOP - 2, cost, "label middle"))
    marks.append(f'<line class="axis" x1="{frame.left}" x2="{WIDTH - RIGHT}" y1="{frame.top}" y2="{frame.top}"/>')
    taken = -math.inf
    for spent, _, _, _, paid in points:  # those labels that have room
        if frame.x(spent) - taken >= 46:
            taken = frame.x(spent)
            marks.append(f'<path class="axis" d="M{taken:.1f} {frame.top}v-5"/>')
            marks.append(_text(taken, above, f"{paid:.3g}", "tick middle"))
    marks.append(frame.line([(p[0], p[1]) for p in points], "line"))
    for number, (spent, value, low, high, _) in enumerate(points):
        if low is not None and high is not None:
            x = f"{frame.x(spent):.1f}"
            marks.append(f'<line class="range" x1="{x}" x2="{x}" y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>')
        if len(points) <= 40 or number == len(points) - 1:
            marks.append(frame.dot(spent, value, "dot"))
    return _svg("Quality, privacy and cost of a federation, round by round", marks)


def curve(points: Sequence[Point], *, at: Point | None) -> str:
    """The whole epsilon(delta) curve, delta logarithmic. Points: [[delta, epsilon], ...]; ``at`` is the claim."""
    pairs = sorted((math.log10(p[0]), p[1]) for p in points if p[0] > 0)
    low, high = math.floor(pairs[0][0]), math.ceil(pairs[-1][0])
    top = 1.12 * max([pair[1] for pair in pairs] + ([at[1]] if at else []) + [1e-9])
    frame = _Frame((low, high if high > low else low + 1), (0, top))
    decades = [(float(power), _power(power)) for power in range(low, high + 1, 1 if high - low <= 7 else 2)]
    marks = [frame.axes(decades, _ticks(0, top), "δ", "ε"), frame.line(pairs, "line")]
    if at is not None:
        x, y = frame.x(math.log10(at[0])), frame.y(at[1])
        marks.append(f'<path class="guide" d="M{LEFT} {y:.1f}H{x:.1f}V{HEIGHT - BOTTOM}"/>')
        marks.append(frame.dot(math.log10(at[0]), at[1], "dot"))
        marks.append(
            _text(x + 8, y - 8, "the claim", "value")
            if x < WIDTH - 100
            else _text(x - 8, y - 8, "the claim", "value end")
        )
    return _svg("Epsilon as a function of delta", marks)


def roc(series: Mapping[str, Sequence[Point]], *, floor: float) -> str:
    """Log-log ROC curves: [[false positive rate, true positive rate], ...] by name, the first drawn strongest.

    ``floor`` is the smallest rate shown: one in the number of non-members, below which nothing was measured.
    """
    low = max(-5, min(-1, math.floor(math.log10(floor)))) if floor > 0 else -3
    frame = _Frame((low, 0), (low, 0))
    decades = [(float(power), _power(power)) for power in range(low, 1)]
    marks = [frame.axes(decades, decades, "false positive rate", "true positive rate")]
    marks.append(frame.line([(low, low), (0, 0)], "chance"))
    marks.append(_text(frame.x(low) + 42, frame.y(low) - 12, "guessing", "mark"))
    for index, points in enumerate(series.values()):
        logs = [
            (math.log10(p[0]), math.log10(p[1]))
            for p in sorted((p[0], p[1]) for p in points)
            if p[0] >= 10**low and p[1] >= 10**low
        ]
        if logs:
            marks.append(frame.line(logs, ("line", "line second", "line third")[min(index, 2)]))
    return _svg("ROC curves of the attacks, both axes logarithmic", marks)


def row(
    value: float, low: float | None, high: float | None, baselines: Mapping[str, float], scale: tuple[float, float]
) -> str:
    """One figure on a horizontal scale: a dot with its interval, a mark for each baseline."""
    span = scale[1] - scale[0] or 1.0

    def place(number: float) -> str:
        return f"{100 * min(1.0, max(0.0, (number - scale[0]) / span)):.2f}%"

    marks = ['<line class="rail" x1="0%" x2="100%" y1="12" y2="12"/>']
    for name, number in baselines.items():
        shape = {
            "real held-out": '<path class="real" d="M0 3V21"/>',
            "shuffled captions": '<circle class="shuffled" cx="0" cy="12" r="4"/>',
            "shuffled conditions": '<circle class="shuffled" cx="0" cy="12" r="4"/>',
            "non-private twin": '<path class="twin" d="M-5.5 12L0 6.5L5.5 12L0 17.5Z"/>',
        }.get(name, '<path class="other" d="M-4 8L4 16M4 8L-4 16"/>')
        title = f"<title>{escape(name)}: {number:.4g}</title>"
        marks.append(f'<svg class="at" x="{place(number)}" overflow="visible">{title}{shape}</svg>')
    if low is not None and high is not None:
        marks.append(f'<line class="interval" x1="{place(low)}" x2="{place(high)}" y1="12" y2="12"/>')
    marks.append(
        f'<circle class="dot" cx="{place(value)}" cy="12" r="5"><title>this model: {value:.4g}</title></circle>'
    )
    label = f"this model: {value:.4g}"
    return f'<svg class="row" role="img" aria-label="{label}" width="100%" height="24">{"".join(marks)}</svg>'


def bar(value: float, limit: float) -> str:
    """A share of a limit, as a bar."""
    share = 0.0 if limit <= 0 else min(1.0, max(0.0, value / limit))
    return (
        f'<svg class="bar" role="img" aria-label="{value:.4g} of {limit:.4g}" width="100%" height="10">'
        '<rect class="rest" width="100%" height="10" rx="2"/>'
        f'<rect class="part" width="{100 * share:.2f}%" height="10" rx="2"/></svg>'
    )


class _Frame:
    """Data coordinates to drawing coordinates."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], top: float = TOP, left: float = LEFT) -> None:
        self.xs, self.ys, self.top, self.left = xs, ys, top, left

    def x(self, value: float) -> float:
        return self.left + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - self.top - BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> str:
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        return f'<path class="{style}" d="M{path}"/>'

    def dot(self, x: float, y: float, style: str) -> str:
        return f'<circle class="{style}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4.5"/>'

    def axes(self, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]], x_label: str, y_label: str) -> str:
        marks: list[str] = []
        for value, label in ys:
            y = f"{self.y(value):.1f}"
            marks.append(f'<line class="grid" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            marks.append(_text(self.left - 8, self.y(value) + 4, label, "tick end"))
        for value, label in xs:
            marks.append(_text(self.x(value), HEIGHT - BOTTOM + 18, label, "tick middle"))
        marks.append(
            f'<line class="axis" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        )
        marks.append(_text((self.left + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "label middle"))
        turn = f"translate(13 {(self.top + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)"
        marks.append(f'<text class="label middle" transform="{turn}">{escape(y_label)}</text>')
        return "".join(marks)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[tuple[float, str]]:
    """About five round numbers; of things that are counted, whole ones."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    if whole:
        step = max(1, math.ceil(step))
    first = math.ceil(low / step)
    return [(index * step, f"{index * step:.6g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _room_for(ticks: Sequence[tuple[float, str]]) -> float:
    """The left margin in which the labels stand beside the name of the scale: 7.5 is the width of a digit, 28 that of the name."""
    return max(LEFT, 28 + 7.5 * max((len(label) for _, label in ticks), default=0))


def _power(power: int) -> str:
    return "1" if power == 0 else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(title: str, marks: Sequence[str]) -> str:
    box = f"0 0 {WIDTH} {HEIGHT}"
    return f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="{box}">{"".join(marks)}</svg>'
