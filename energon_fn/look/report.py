"""Where the time goes: a loader's sums as plain numbers, as a table, and what to try."""

from __future__ import annotations

import html
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from energon_fn.look.values import counted, size
from energon_fn.meters import percentile, steps_of

OWN = "energon_fn"
"""The row of what no stage takes: the order, the streams and their states."""
NO_STAGES = ("wait", "drawn")
"""What else comes in front of a slash and may have "share" behind it."""
KEEPS_UP = 0.05
"""The share of its time that a loop may wait for batches before the loader is called slow."""


class Report(dict[str, float]):
    """What a loader did, as plain floats for a logger; printed, or in a notebook, a table.

    Of each stage: ``STAGE/in`` and ``STAGE/out`` (items), ``STAGE/skipped``, ``STAGE/failed``,
    ``STAGE/mean_us`` and ``STAGE/p95_us`` (microseconds of a call), and ``STAGE/share`` of all the
    time spent on making batches; ``energon_fn/share`` is what no stage took. Seeding counts to the
    stage it is for. In threads, and in workers, the time of all of them is added up.

    ``batches``, ``bytes_read``: delivered and read. ``wait/share``: of the loop's time, waiting for
    batches; ``wait/mean_ms``: for one; ``wait/start_s``: for the first ones after a start.
    With workers ``workers/busy``: the share of their time in which they make batches, and
    ``queue/fill``: how many batches wait to be taken, on average.

    ``drawn/PATH``: samples of each dataset. ``packs``, ``fill``: packs that the selectors of
    :mod:`energon_fn.packing` made, and how full they are, 0 to 1, on average.
    """

    @property
    def stages(self) -> list[str]:
        """Those that did something, in the data's order, and what no stage took."""
        parts = [key.split("/") for key in self]  # a dataset's path, behind drawn, may be anything
        return [first for first, *rest in parts if rest == ["share"] and first not in NO_STAGES]

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def text(self, width: int = 79) -> str:
        """The table and the advice, in lines of at most ``width`` columns as far as they go."""
        columns = _columns(self)
        while len(columns) > 3 and sum(column.width + 2 for column in columns) - 2 > width:
            least = max(columns[1:], key=lambda column: column.dispensable)
            columns.remove(least)
        rows = zip(*(column.cells for column in columns), strict=True)
        heads = [column.head for column in columns]
        lines = [
            "  ".join(
                cell.rjust(column.width) if n else cell.ljust(column.width)
                for n, (cell, column) in enumerate(zip(row, columns, strict=True))
            ).rstrip()
            for row in [heads, *rows]
        ]
        return "\n".join(
            [*lines, *textwrap.wrap(totals(self), width), *textwrap.wrap(advice(self), width)]
        )

    def _repr_html_(self) -> str:
        cell = '<td style="text-align:{}">{}</td>'
        columns = _columns(self)
        rows = "".join(
            "<tr>"
            + "".join(cell.format("right" if n else "left", text) for n, text in enumerate(row))
            + cell.format("left", _bar(self[f"{row[0]}/share"]))
            + "</tr>"
            for row in zip(*(map(html.escape, column.cells) for column in columns), strict=True)
        )
        heads = "".join(f"<th>{column.head}</th>" for column in columns)
        return (
            f"<table><thead><tr>{heads}<th></th></tr></thead><tbody>{rows}</tbody></table>"
            f"<p>{html.escape(totals(self))}<br>{html.escape(advice(self))}</p>"
        )


def make_report(
    stages: Iterable[str],
    sums: Mapping[str, float],
    drawn: Mapping[str, int],
    workers: int,
    threads: int,
) -> Report:
    """The report of what was summed up, see :class:`~energon_fn.meters.Meters` and the loader.

    stages: all that there are, in the data's order.
    """
    # Seconds of a call, of those that stand for others, and so of all.
    means = {
        name: sums[f"{name}/ns"] / 1e9 / sum(number for _, number in steps)
        for name in stages
        if (steps := steps_of(name, sums))
    }
    work = {name: mean * sums[f"{name}/calls"] for name, mean in means.items()}
    # What threads do is not done while batches are made; waiting for them is.
    here = sum(s for name, s in work.items() if not (threads and name in ("load", "decode")))
    own = max(sums.get("busy", 0) - sums.get("waiting", 0) - here, 0)
    whole = sum(work.values()) + own or 1
    report = Report()
    for name, seconds in work.items():
        for what in ("in", "out", "skipped", "failed"):
            report[f"{name}/{what}"] = sums.get(f"{name}/{what}", 0)
        report[f"{name}/mean_us"] = 1e6 * means[name]
        report[f"{name}/p95_us"] = percentile(0.95, steps_of(name, sums)) / 1e3
        report[f"{name}/share"] = seconds / whole
    report[f"{OWN}/share"] = own / whole
    batches, waited, used = (sums.get(name, 0) for name in ("batches", "waited", "used"))
    measured = sum(number for _, number in steps_of("load", sums))
    read = sums.get("bytes", 0) * sums.get("load/calls", 0) / (measured or 1)
    report |= {"batches": batches, "bytes_read": read}
    report |= {"workers": workers, "threads": threads}
    report["wait/share"] = waited / (waited + used or 1)
    report["wait/mean_ms"] = 1e3 * waited / (batches or 1)
    report["wait/start_s"] = sums.get("starting", 0)
    if workers:
        busy = sums.get("busy", 0)
        report["workers/busy"] = busy / (busy + sums.get("idle", 0) or 1)
        report["queue/fill"] = sums.get("queued", 0) / (waited + used or 1)
    report |= {f"drawn/{path}": n for path, n in drawn.items()}
    if packs := sums.get("packs"):
        report |= {"packs": packs, "fill": sums["fill"] / packs}
    return report


def totals(report: Report) -> str:
    """What was done in all, in a line."""
    said = [
        f"{report['batches']:,.0f} batches",
        f"{size(int(report['bytes_read']))} read",
    ]
    if workers := int(report["workers"]):
        said.append(f"{counted(workers, 'worker')} busy {_percent(report['workers/busy'])}")
    if threads := int(report["threads"]):
        said.append(counted(threads, "thread") + " each" * (workers > 1))
    if workers:
        said.append(f"{report['queue/fill']:.1f} batches ready on average")
    return ", ".join([*said, f"{report['wait/start_s']:.1f} s to start"])


def advice(report: Report) -> str:
    """Whether the loop waits for the loader or the loader for the loop, where, and what to try."""
    if report["batches"] < 3:
        return "Too few batches to tell what takes long."
    wait, workers = report["wait/share"], int(report["workers"])
    waited = f"The loop waited {_percent(wait)} of its time for batches"
    if wait < KEEPS_UP:
        return f"{waited}: the loader keeps up, what is done with the batches takes the time."
    if workers and report["workers/busy"] < 0.7:
        return (
            f"{waited}, though workers had time left: batches come unevenly. Try a larger "
            "prefetch_factor."
        )
    top = max(report.stages, key=lambda name: report[f"{name}/share"])
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    more = f"more workers (WorkerConfig(num_workers={max(2, 2 * workers)}))"
    tries = [*([more] if workers < processors else []), *CURES.get(top, ("larger batches",))]
    if report["threads"] or workers >= processors:
        tries = [one for one in tries if "threads" not in one]
    at = f"{top} ({_percent(report[f'{top}/share'])})" if top != OWN else "the loader's own work"
    return f"{waited}: the loader is the bottleneck, most of all {at}. Try {' or '.join(tries)}."


CURES: Mapping[str, Sequence[str]] = {
    "load": ("threads that read ahead (get_loader(threads=4))", "faster storage"),
    "decode": (
        "smaller pictures (min_size=... scales JPEGs while they are decoded)",
        "threads (get_loader(threads=4))",
    ),
    "cook": ("a cheaper cooker",),
    "preencode_sample": (
        "a cheaper preencode_sample, marked @stateless if nothing in it is random",
    ),
    "encode_sample": ("a cheaper encode_sample, marked @stateless if nothing in it is random",),
    "postencode_sample": (
        "a cheaper postencode_sample, marked @stateless if nothing in it is random",
    ),
    "select_samples_to_pack": ("a smaller packing_buffer_size",),
    "pack_selected_samples": ("a cheaper pack_selected_samples",),
    "batch": ("a cheaper batch, or less padding",),
    "encode_batch": ("a cheaper encode_batch, or doing that on the GPU",),
}


class _Column(NamedTuple):
    head: str
    cells: list[str]
    dispensable: int
    """Columns with more of it are left out first."""

    @property
    def width(self) -> int:
        return max(map(len, (self.head, *self.cells)))


def _columns(report: Report) -> list[_Column]:
    names = report.stages

    def cells(what: str, shown: Callable[[float], str]) -> list[str]:
        return [
            shown(value) if (value := report.get(f"{name}/{what}")) is not None else ""
            for name in names
        ]

    def number(value: float) -> str:
        return f"{value:,.0f}"

    return [
        _Column("stage", names, 0),
        _Column("in", cells("in", number), 5),
        _Column("out", cells("out", number), 1),
        _Column("skipped", cells("skipped", number), 3),
        _Column("failed", cells("failed", number), 2),
        _Column("mean", cells("mean_us", _time), 0),
        _Column("p95", cells("p95_us", _time), 4),
        _Column("share", cells("share", _percent), 0),
    ]


def _time(microseconds: float) -> str:
    """
    >>> _time(3.14159), _time(31415.9), _time(3.1e6)
    ('3.1 µs', '31.4 ms', '3.1 s')
    """
    if microseconds < 1e3:
        return f"{microseconds:.1f} µs"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.1f} s"


def _percent(share: float) -> str:
    """
    >>> _percent(0.5), _percent(0.0123), _percent(0)
    ('50%', '1.2%', '0%')
    """
    return f"{100 * share:.0f}%" if share >= 0.095 or not share else f"{100 * share:.1f}%"


def _bar(share: float) -> str:
    width = round(120 * share)
    return f'<div style="width:{width}px;height:0.8em;background:#4c8bf5;opacity:0.7"></div>'
