"""Plots of the results files: the time of each step, memory over resolution, the warp's time over N."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import import_extra
from ..files import atomic_path
from .runner import Row, read_rows
from .tables import WARPS, grouped, is_plain, label

SIZE, DPI = (7.2, 4.0), 110
# distinct in grays and for the color-blind (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def draw_plots(results: Path, folder: Path) -> list[Path]:
    """Draw the plots of the CPU's results into `folder`; returns the files. `BackendError` without matplotlib."""
    figures = import_extra("matplotlib.figure", "plots need matplotlib", "bench")
    paths = []
    for name, groups, plot in PLOTS:
        rows = [row for group in groups for row in read_rows(results / f"{group}.jsonl")]
        if not rows:
            continue
        figure = figures.Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        plot(axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
        with atomic_path(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, metadata={"Software": None})
        paths.append(folder / f"{name}.png")
    return paths


def ablation(axes: Any, rows: Sequence[Row]) -> None:
    """A bar for each step, its time and PSNR beside it."""
    timed = [row for row in rows if row["status"] == "timed"][::-1]
    values = [row["ms"]["median"] / 1e3 for row in timed]
    colors = [COLORS[0] if row["parameters"]["method"] == "runtime" else "#999999" for row in timed]
    bars = axes.barh([label(row) for row in timed], values, color=colors)
    texts = [
        f"{value:.2f} s" + (f", {row['quality']['psnr_db']:.0f} dB" if "psnr_db" in row["quality"] else "")
        for value, row in zip(values, timed, strict=True)
    ]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.margins(x=0.3)
    axes.set_xlabel("seconds a translation, PSNR against the first row")


def memory(axes: Any, rows: Sequence[Row]) -> None:
    """Peak memory over the side of the picture; hollow marks, not joined, are matrices that did not fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    methods = {"eager", "eager-tiled", "naive", "runtime"}

    def key(row: Row) -> str:
        parameters = {"dtype": "float32", "backend": "onnxruntime", **row["parameters"]}
        shown = parameters["method"] in methods
        return (
            label(row) if shown and (parameters["dtype"], parameters["backend"]) == ("float32", "onnxruntime") else ""
        )

    for style, series in _series(rows, key):
        points = sorted(
            (row["parameters"]["size"], row["peak_mib"] / 1024) for row in series if row["status"] == "timed"
        )
        axes.plot(*zip(*points, strict=True), label=key(series[0]), **style) if points else None
        needed = [(row["parameters"]["size"], row["needed_mib"] / 1024) for row in series if "needed_mib" in row]
        if needed:
            axes.plot(*zip(*needed, strict=True), **{**style, "linestyle": "none", "markerfacecolor": "white"})
    _log_log(axes, "side of the picture, pixels; hollow: ended by memory, its matrices alone", "peak memory, GiB")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks([256, 512, 768, 1024], ["256", "512", "768", "1024"])
    axes.set_xticks([], minor=True)


def warp(axes: Any, rows: Sequence[Row]) -> None:
    """Median time of the plain forward pass over the number of positions."""
    plain = [row for row in rows if is_plain(row) and row["status"] == "timed"]
    for style, series in _series(plain, lambda row: row["parameters"]["method"]):
        points = sorted((row["parameters"]["size"] ** 2, row["ms"]["median"]) for row in series)
        axes.plot(*zip(*points, strict=True), label=WARPS[series[0]["parameters"]["method"]], **style)
    _log_log(axes, "positions N", "milliseconds")
    counts = sorted({row["parameters"]["size"] ** 2 for row in plain})
    axes.set_xticks(counts, [grouped(count) for count in counts])


PLOTS: tuple[tuple[str, tuple[str, ...], Callable[[Any, Sequence[Row]], None]], ...] = (
    ("ablation", ("ablation",), ablation),
    ("memory", ("ablation", "resolution"), memory),
    ("warp", ("warp",), warp),
)


def _series(rows: Sequence[Row], key: Callable[[Row], str]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Rows by `key`, none for an empty one, each with a line style of its own."""
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        if name := key(row):
            by_key.setdefault(name, []).append(row)
    styles = [{"color": color, "marker": marker} for color, marker in zip(COLORS, MARKERS, strict=True)]
    return [(styles[place % len(styles)], series) for place, series in enumerate(by_key.values())]


def _log_log(axes: Any, across: str, up: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(which="major", color="#dddddd")
    axes.legend(fontsize=8, frameon=False)
