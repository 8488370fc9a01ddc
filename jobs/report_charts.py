"""The page's charts as inline SVG. Colours come from the page's style sheet, so light and dark need nothing here.

Every piece of text goes through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from .report_data import ScoreSpread, TrainingLog

BINS = 48  # of the histogram
POINTS = 240  # most points of a curve in one phase


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to places in a drawing."""

    low: float
    high: float
    start: float
    """Where `low` lies."""
    end: float
    """Where `high` lies; may be less than `start`, as y grows downwards."""

    def at(self, value: float) -> float:
        """The value's place; values beyond the ends are put on them."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values within the axis, about so many."""
        raw = ((self.high - self.low) or 1.0) / count
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def histogram(spread: ScoreSpread) -> Markup:
    """Caption scores as bars, those below the threshold in the colour of drops; alt scores as an outline over them."""
    width, height = 1040, 320
    edges = _edges(spread)
    captions, alts = np.histogram(spread.captions, edges)[0], np.histogram(spread.alts, edges)[0]
    x = Axis(low=edges[0], high=edges[-1], start=48, end=width - 8)
    y = Axis(low=0, high=max(captions.max(), alts.max(), 1) * 1.05, start=height - 40, end=34)
    parts = [_grid(y, 48, width - 8, [f"{t:,.0f}" for t in y.ticks(4)], 4)]
    for left, right, count in zip(edges[:-1], edges[1:], captions):
        kind = "kept" if spread.threshold is None or left >= spread.threshold - 1e-9 else "dropped"
        parts.append(
            Markup('<rect class="fill-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                kind, x.at(left) + 0.5, y.at(count), max(0.5, x.at(right) - x.at(left) - 1), y.at(0) - y.at(count)
            )
        )
    if len(spread.alts):
        steps = [(x.at(e), y.at(c)) for left, right, c in zip(edges, edges[1:], alts) for e in (left, right)]
        parts.append(Markup('<polyline class="line-alt" points="{}"/>').format(_points(steps)))
    parts += [_x_label(x.at(t), height - 22, f"{t:.2g}") for t in x.ticks(10)]
    parts.append(_x_label((x.start + x.end) / 2, height - 4, "CLIP score (cosine of picture and text)"))
    for name, value, row in (("min_score", spread.threshold, 0), ("min_alt_score", spread.alt_threshold, 1)):
        if value is not None:
            parts.append(_threshold(name, x.at(value), value, row, height - 40, x.end))
    return _svg(width, height, "Histogram of CLIP scores", parts)


def loss_curve(log: TrainingLog, low: float, high: float) -> Markup:
    """Loss over samples: every line of the log faintly, a running mean on top; a vertical line where a phase begins."""
    width, height = 330, 210
    x = Axis(low=0, high=max(log.total, float(log.samples[-1])), start=46, end=width - 8)
    y = Axis(low=low, high=high, start=height - 36, end=24)
    parts = [_grid(y, 46, width - 8, [f"{t:.3g}" for t in y.ticks(4)], 4)]
    begin = 0.0
    for phase in sorted(set(log.phases.tolist())):
        here = log.phases == phase
        samples, losses = thin(log.samples[here], log.losses[here])
        for kind, values in (("raw", losses), ("mean", smooth(losses))):
            line = _points([(x.at(s), y.at(v)) for s, v in zip(samples, values)])
            parts.append(Markup('<polyline class="line-{}" points="{}"/>').format(kind, line))
        if begin:
            rule = Markup('<line class="phase" x1="{0:.1f}" x2="{0:.1f}" y1="12" y2="{1:.1f}"/>')
            parts.append(rule.format(x.at(begin), y.start))
        label = log.labels[phase] if phase < len(log.labels) else f"phase {phase + 1}"
        parts.append(_beside(x.at(begin), 18, label, near_end=x.at(begin) > x.end - 60))
        begin = float(log.samples[here][-1])
    parts += [_x_label(x.at(t), height - 20, short(t)) for t in x.ticks(4)]
    parts.append(_x_label((x.start + x.end) / 2, height - 4, "samples seen"))
    return _svg(width, height, f"Loss of {log.name}", parts)


def noise_bars(bins: Sequence[float | None]) -> Markup:
    """Loss by timestep bin, the least noise on the left."""
    width, height = 330, 118
    y = Axis(low=0, high=max((b for b in bins if b is not None), default=1.0) * 1.02, start=height - 20, end=18)
    step = (width - 54) / max(1, len(bins))
    parts = []
    for n, value in enumerate(bins):
        left = 46 + n * step
        if value is None:
            parts.append(_x_label(left + step / 2, y.start - 4, "–"))
            continue
        parts.append(
            Markup('<rect class="fill-bin" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5"/>').format(
                left + 2, y.at(value), step - 4, y.start - y.at(value)
            )
        )
        parts.append(_x_label(left + step / 2, y.at(value) - 4, f"{value:.2f}", "fine"))
    parts.append(Markup('<text x="46" y="{}">least noise</text>').format(height - 4))
    parts.append(Markup('<text x="{}" y="{}" text-anchor="end">most noise</text>').format(width - 8, height - 4))
    return _svg(width, height, "Loss by timestep bin", parts)


def whisker(middle: float, interval: Sequence[float], low: float, high: float, kind: str = "plain") -> Markup:
    """A value with its interval on an axis that its neighbours share; a fine line marks zero."""
    x = Axis(low=low, high=high, start=5, end=155)
    line = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>')
    left, right = x.at(interval[0]), x.at(interval[1])
    drawn = Markup(
        '<g class="axis">{}</g><g class="zero">{}</g><g class="whisker {}">{}{}{}<circle cx="{:.1f}" cy="9" r="4"/></g>'
    ).format(
        line.format(x.start, x.end, 9, 9),
        line.format(x.at(0.0), x.at(0.0), 1, 17),
        kind,
        line.format(left, right, 9, 9),
        line.format(left, left, 5, 13),
        line.format(right, right, 5, 13),
        x.at(middle),
    )
    return _svg(160, 18, f"{middle:.3f}, 95 % interval {interval[0]:.3f} to {interval[1]:.3f}", [drawn])


def loss_range(logs: Sequence[TrainingLog]) -> tuple[float, float]:
    """One axis for all trainings: from below the least loss to the 98th percentile, so early spikes do not flatten it."""
    losses = np.concatenate([log.losses for log in logs])
    low, high = float(losses.min()), float(np.quantile(losses, 0.98))
    margin = 0.06 * (high - low) or 0.5
    return max(0.0, low - margin), high + margin


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential running mean (L,), corrected for its start as Adam's moments are."""
    keep, mean, weight, out = 1 - 1 / max(4.0, len(values) / 12), 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * float(value), keep * weight + (1 - keep)
        out.append(mean / weight)
    return np.array(out)


def thin(samples: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve with neighbours averaged, so that it has at most POINTS points."""
    pieces = min(POINTS, len(losses))
    groups = [np.array_split(values, pieces) for values in (samples, losses)]
    return np.array([g[-1] for g in groups[0]]), np.array([g.mean() for g in groups[1]])


def short(number: float) -> str:
    """1200000 → 1.2M, 48000 → 48k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _edges(spread: ScoreSpread) -> np.ndarray:
    """Bin edges, one of which is the threshold, so that every bar is all kept or all dropped."""
    marks = [m for m in (spread.threshold, spread.alt_threshold) if m is not None]
    ends = [float(end) for v in (spread.captions, spread.alts) if len(v) for end in (v.min(), v.max())]
    low, high = min(ends + marks), max(ends + marks)
    step = max(float(high - low), 0.02) / BINS
    start = low
    if spread.threshold is not None:
        start = spread.threshold - math.ceil((spread.threshold - low) / step + 1e-6) * step
    return start + step * np.arange(math.ceil((high - start) / step + 1e-6) + 1)


def _threshold(name: str, x: float, value: float, row: int, bottom: float, right: float) -> Markup:
    top = 2 + 15 * row  # the words of two thresholds that lie close stand one below the other
    words = _beside(x, top + 10, f"{name} {value:g}", near_end=x > right - 130)
    return Markup(
        '<g class="threshold t{}" data-threshold="{}"><line x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>{}</g>'
    ).format(row, name, x, x, top, bottom, words)


def _grid(y: Axis, left: float, right: float, labels: Sequence[str], count: int) -> Markup:
    line = Markup(
        '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        '<text x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
    )
    places = [y.at(t) for t in y.ticks(count)]
    return Markup("").join(
        line.format(left, right, p, left - 6, p + 4, text) for p, text in zip(places, labels, strict=True)
    )


def _x_label(x: float, y: float, text: str, kind: str = "label") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(kind, x, y, text)


def _beside(x: float, y: float, text: str, *, near_end: bool) -> Markup:
    """Words to the right of a vertical line, or to its left where there is no room."""
    place, anchor = (x - 5, "end") if near_end else (x + 5, "start")
    return Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(place, y, anchor, text)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _svg(width: int, height: int, label: str, parts: Sequence[Markup | str]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, label, Markup("").join(parts)
    )
