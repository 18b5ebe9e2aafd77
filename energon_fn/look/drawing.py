"""What is said of a pipeline, and how it is shown: a text, or in a notebook a drawing (SVG).

The drawing has no background of its own and writes in the colour of the text around it, so that it
fits light and dark pages; its other colours stand out on both.
"""

from __future__ import annotations

import html
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from energon_fn.look.values import one_line, shorten

WIDTH = 80
"""Columns of the text where the terminal has as many."""
NARROW = 60
"""With fewer, labels stand above what they are of."""


@dataclass(frozen=True)
class Part:
    """A source, or several that are put together."""

    name: str
    """Its path; or how the parts are put together."""
    notes: tuple[str, ...] = ()
    amount: str = ""
    """The weight, or how often an epoch has it."""
    share: float | None = None
    """Of all samples that are drawn, 0 to 1; None where that changes, and inside of joins."""
    parts: tuple[Part, ...] = ()
    joined: bool = False
    """One sample is made of one of each of the parts."""


@dataclass(frozen=True)
class Row:
    """What there is to say of one thing."""

    label: str
    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Description:
    """What :func:`~energon_fn.describe` gives: printed, a text; shown by a notebook, a drawing."""

    title: str
    sources: Part
    order: tuple[Row, ...]
    stages: tuple[tuple[str, tuple[Row, ...]], ...]
    """The functions that are called, with the name of what comes of them."""
    running: tuple[Row, ...]
    lanes: int
    rank_lanes: tuple[int, ...]

    def __str__(self) -> str:
        return self.text(min(WIDTH, shutil.get_terminal_size().columns))

    __repr__ = __str__

    def text(self, width: int = WIDTH) -> str:
        """The text, in lines of at most ``width`` columns (30 or more)."""
        stages = [row for _, rows in self.stages for row in rows]
        tables = {"order": self.order, "stages": stages, "running": self.running}
        labels = max(len(row.label) for rows in tables.values() for row in rows)
        lines = [shorten(self.title, width), "sources", *_source_lines(self.sources, width)]
        for name, table in tables.items():
            lines += [name, *(line for row in table for line in _row_lines(row, labels, width))]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return _draw(self)


def ending(text: str, width: int) -> str:
    """The text on one line of at most ``width`` columns, cut at its beginning: for paths.

    >>> ending("/data/captions/train", 18), ending("/data/captions/train", 12)
    ('…/captions/train', '…tions/train')
    """
    text = one_line(text)
    short = shorten(text[::-1], width)[::-1]
    whole = "…" + short[max(short.find("/"), 1) :]  # only whole names, if that is not far less
    return short if short == text or len(whole) < 0.7 * len(short) else whole


def share_text(share: float | None) -> str:
    """
    >>> share_text(0.7512), share_text(None)
    ('75.1 %', '')
    """
    return "" if share is None else f"{100 * share:.1f} %"


def lines_of(part: Part, depth: int = 0) -> Iterator[tuple[int, Part]]:
    """It and all that is in it, each with its depth, before what is inside of it."""
    yield depth, part
    for one in part.parts:
        yield from lines_of(one, depth + 1)


# ------------------------------------------------------------------------------------------- text


def _source_lines(sources: Part, width: int) -> Iterator[str]:
    parts = [*lines_of(sources)]
    amounts = [shorten(part.amount, 20) for _, part in parts]
    widest = max(map(len, amounts))
    for (depth, part), amount in zip(parts, amounts, strict=True):
        start, notes = "  " + "  " * depth, [*part.notes]
        share = share_text(part.share) if depth else ""
        if width < NARROW:
            notes[:0] = filter(None, (share, amount))
        elif len(parts) > 1:
            start = f"  {share:>7}  {amount:<{widest}}" + "  " * (depth + bool(widest))
        room = width - len(start)
        if part.parts:
            yield start + shorten(", ".join([part.name, *notes]), room)
        else:
            yield start + ending(part.name, room)
            yield " " * len(start) + "  " + shorten(", ".join(notes), room - 2)


def _row_lines(row: Row, labels: int, width: int) -> Iterator[str]:
    if width < NARROW:
        yield f"  {row.label}"
        start = behind = "    "
    else:
        start, behind = f"  {row.label:<{labels}}  ", " " * (labels + 4)
    room = width - len(behind)
    words = ", ".join(text for text in (shorten(row.name, room - 1), *row.notes) if text)
    for line in textwrap.wrap(one_line(words), room, break_on_hyphens=False) or [""]:
        yield start + line
        start = behind


# ---------------------------------------------------------------------------------------- drawing

PAGE, LEFT, RIGHT = 780, 400, 300
"""Widths in pixels: of all, of the sources, and of the stages. Between them the samples flow."""
COLOURS = ("#4c8bf5", "#e8833a", "#2fa876", "#b066d6", "#d4a017", "#e0567a", "#2ba3b5")
"""One for each source, in turn."""
SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
MONO_LETTER, SANS_LETTER = 0.605, 0.56
"""How wide a letter is, in sizes of the font; of SANS on average, where it is a wide one."""
MOST = 12
"""Parts of one blend that are drawn one by one ..."""
MOST_LANES = 60
"""... and lanes."""


def _draw(said: Description) -> str:
    top = 30
    sources, flows, low = _draw_sources(_folded(said.sources), top)
    stages, entry, high = _draw_stages(said, top)
    running, size = _draw_running(said)
    at = max(low + 24, high - size)
    height = max(high, at + size)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 {PAGE + 2} {height + 2:g}" '
        f'width="{PAGE + 2}" style="max-width:100%;height:auto" role="img" fill="currentColor" '
        f'font-family="{SANS}">'
        + _words(0, 14, said.title, PAGE, size=13, bold=True)
        + _draw_flows(flows, top + 8, entry - 16)
        + sources
        + f'<g transform="translate({PAGE - RIGHT},0)">{stages}</g>'
        + f'<g transform="translate(0,{at:g})">{running}</g></svg>'
    )


def _draw_sources(sources: Part, top: float) -> tuple[str, list[_Flow], float]:
    """The tree, what flows from it, and where it ends."""
    drawn: list[str] = []
    flows: list[_Flow] = []

    def draw(part: Part, x: float, y: float, around: str = "") -> float:
        """around: the colour of the join that it is a part of."""
        share, notes = share_text(part.share) if x else "", ", ".join(part.notes)
        amount = shorten(part.amount, 16)
        room = LEFT - 8 - x
        if part.parts and not part.joined:
            name = f"{part.name}, {notes}" if notes else part.name
            drawn.append(_words(x, y + 15, name, room - 150, bold=True))
            drawn.append(_words(LEFT - 8, y + 15, share, 60, size=11, bold=True, end=True))
            drawn.append(_words(LEFT - 64, y + 15, amount, 120, size=11, faint=True, end=True))
            end = y + 24
            for one in part.parts:
                last, end = end, draw(one, x + 16, end, around)
            drawn.append(_line(x + 5, y + 22, last + 14))
            return end
        colour = around or COLOURS[len(flows) % len(COLOURS)]
        if not around:
            flows.append(_Flow(y + 20, part.share, colour))
        place, columns = len(drawn), int((room - 12 - 55 * bool(share)) / (12 * MONO_LETTER))
        aside = 10 + len(amount) * 11 * SANS_LETTER
        drawn.append(_words(x + 12, y + 17, ending(part.name, columns), room, mono=True))
        drawn.append(_words(LEFT - 8, y + 17, share, 60, bold=True, end=True))
        drawn.append(_words(x + 12, y + 33, notes, room - 12 - aside, size=11, faint=True))
        drawn.append(_words(LEFT - 8, y + 33, amount, 120, size=11, faint=True, end=True))
        end = y + 42
        for one in part.parts:
            end = draw(one, x + 16, end, colour)
        if around:
            return end
        card = _box(x, y, LEFT - x, end - y, colour, 0.13, radius=5)
        drawn[place:place] = [card, _box(x, y, 4, end - y, colour, 1, radius=2)]
        return end + 8

    end = draw(sources, 0, top)
    return "".join(drawn), flows, end - 8


def _folded(part: Part) -> Part:
    """The part, with those of its parts that are too many to be drawn as one."""
    parts = [_folded(one) for one in part.parts]
    if len(parts) > MOST:
        rest = parts[MOST - 1 :]
        shares = [one.share for one in rest if one.share is not None]
        share = sum(shares) if len(shares) == len(rest) else None
        parts[MOST - 1 :] = [Part(f"and {len(rest)} more", share=share)]
    return replace(part, parts=tuple(parts))


class _Flow(NamedTuple):
    """What is drawn from a source."""

    y: float
    share: float | None
    colour: str


def _draw_flows(flows: Sequence[_Flow], top: float, height: float) -> str:
    """Bands as thick as the shares, from the sources to the order."""
    left, right, drawn = LEFT, PAGE - RIGHT, []
    shares = [flow.share for flow in flows if flow.share is not None]
    rest = (1 - sum(shares)) / max(len(flows) - len(shares), 1)  # of each that is not known

    def curve(start: float, end: float) -> str:
        return f"C440,{start:.1f} 440,{end:.1f}"

    for y, share, colour in flows:
        thick = max(height * (rest if share is None else share), 1.5)
        above, below = y - min(thick, 30) / 2, y + min(thick, 30) / 2
        drawn.append(
            f'<path d="M{left},{above:.1f}{curve(above, top)} {right},{top:.1f}'
            f'V{top + thick:.1f}{curve(top + thick, below)} {left},{below:.1f}Z" '
            f'fill="{colour}" fill-opacity="0.4"/>'
        )
        top += thick
    return "".join(drawn)


def _draw_stages(said: Description, top: float) -> tuple[str, float, float]:
    """The order and the stages, one below the other; the order's height; and where they end."""
    drawn, y, heights = [], top, []
    for name, rows in (("keys", said.order), *said.stages):
        inside, height = _draw_rows(rows, 12, y + 6, RIGHT - 24)
        heights.append(height + 12)
        drawn += [_box(0, y, RIGHT, height + 12), inside]
        y += height + 12
        drawn.append(_line(24, y, y + 16))
        drawn.append(f'<path d="M19,{y + 13:g}h10l-5,7z" fill-opacity="0.5"/>')
        drawn.append(_words(36, y + 14, name, RIGHT, size=11, faint=True))
        y += 24
    return "".join(drawn), heights[0], y


def _draw_running(said: Description) -> tuple[str, float]:
    """The lanes, this rank's in colour, and who runs them; and how high that is."""
    drawn, y = [], 10.0
    if said.lanes <= MOST_LANES:
        for lane in range(said.lanes):
            x, y = 12 + lane % 20 * 19, 10 + lane // 20 * 19
            own = lane in said.rank_lanes
            drawn.append(_box(x, y, 15, 15, *((COLOURS[0], 0.75) if own else ()), radius=3))
        y += 22
    inside, height = _draw_rows(said.running, 12, y, LEFT - 24)
    return _box(0, 0, LEFT, y + height + 6) + "".join(drawn) + inside, y + height + 6


def _draw_rows(rows: Sequence[Row], x: float, y: float, width: float) -> tuple[str, float]:
    """Label, name and notes of each; and how high all are."""
    drawn, top = [], y
    for row in rows:
        label, before, behind = row.label, "", row.name
        if row.name.endswith(label):
            before, behind = row.name.removesuffix(label), ""
        room = int(width / (12 * MONO_LETTER)) - len(label)
        before, behind = shorten(before, room), shorten(behind, room - 1)
        words = f'{html.escape(before)}<tspan font-weight="bold">{label}</tspan>'
        words += f'<tspan dx="8">{html.escape(behind)}</tspan>' if behind else ""
        drawn.append(
            f'<text x="{x:g}" y="{y + 15:g}" font-size="12" font-family="{MONO}">{words}</text>'
        )
        notes = one_line(", ".join(row.notes))
        used = (len(label) + len(before) + len(behind)) * 12 * MONO_LETTER + 16
        if used + len(notes) * 11 * SANS_LETTER < width:
            at = x + width if row.name else x + used - 6
            end = bool(row.name)
            drawn.append(_words(at, y + 15, notes, width, size=11, faint=True, end=end))
            y += 22
            continue
        y += 20
        for line in textwrap.wrap(notes, int(width / (11 * SANS_LETTER))):
            drawn.append(_words(x, y + 11, line, width, size=11, faint=True))
            y += 15
        y += 2
    return "".join(drawn), y - top


def _words(
    x: float,
    y: float,
    words: str,
    width: float,
    *,
    size: int = 12,
    mono: bool = False,
    bold: bool = False,
    faint: bool = False,
    end: bool = False,
) -> str:
    """A line of text that begins, or ends, at x; cut where it is wider than ``width`` pixels."""
    options = f' font-family="{MONO}"' * mono + ' font-weight="bold"' * bold
    options += ' fill-opacity="0.7"' * faint + ' text-anchor="end"' * end
    short = html.escape(
        shorten(words, int(width / (size * (MONO_LETTER if mono else SANS_LETTER))))
    )
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{options}>{short}</text>' if short else ""


def _box(
    x: float,
    y: float,
    width: float,
    height: float,
    colour: str = "",
    opacity: float = 0.05,
    *,
    radius: int = 6,
) -> str:
    """A box of a colour; without one, that of the text, with a frame."""
    frame = "" if colour else ' stroke="currentColor" stroke-opacity="0.3"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
        f'fill="{colour or "currentColor"}" fill-opacity="{opacity}"{frame}/>'
    )


def _line(x: float, y: float, end: float) -> str:
    return f'<path d="M{x:g},{y:g}V{end:g}" stroke="currentColor" stroke-opacity="0.4"/>'
