"""All pictures. Functions from plain numbers to matplotlib figures; nothing here reads files or runs."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from orchestrator.pictures import Lines, Panel, Picture, Points, Sheet

matplotlib.use("Agg", force=False)

# One colour-blind-safe set for everything (Okabe and Ito).
OURS, PUBLISHED, RIGHT, WRONG, MUTED = "#0072B2", "#D55E00", "#009E73", "#CC3311", "#999999"


def draw(picture: Picture) -> Figure:
    """The figure of a method's picture."""
    if isinstance(picture, Panel):
        return draw_panel(picture)
    if isinstance(picture, Lines):
        return draw_lines(picture)
    return draw_sheet(picture) if isinstance(picture, Sheet) else draw_points(picture)


def draw_sheet(sheet: Sheet) -> Figure:
    """Rows and columns of pictures, names above and at the left."""
    rows, columns, height, width = sheet.images.shape[:4]
    cell = 1.05 * max(1.0, height / width)
    figure = Figure(figsize=(0.6 + 1.15 * columns, 0.5 + cell * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for r in range(rows):
        for c in range(columns):
            _image(axes[r][c], sheet.images[r, c], MUTED, sheet.columns[c] if r == 0 else "")
        if sheet.rows:
            axes[r][0].set_ylabel(sheet.rows[r], fontsize=8)
    figure.suptitle(sheet.title, fontsize=10)
    return figure


def draw_lines(picture: Lines) -> Figure:
    """Curves in one panel."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    colours = itertools.cycle((OURS, PUBLISHED, RIGHT, "#CC79A7", "#E69F00", "#56B4E9", MUTED))
    for colour, (name, points) in zip(colours, picture.lines.items(), strict=False):
        _line(axis, points, name, colour)
    axis.set(title=picture.title, xlabel=picture.x_label, ylabel=picture.y_label)
    return figure


def draw_points(points: Points) -> Figure:
    """One map beside another; a colour for every label, a cross for marked points."""
    figure = Figure(figsize=(4.4 * len(points.maps), 4.3), layout="constrained")
    axes = figure.subplots(1, len(points.maps), squeeze=False)[0]
    colour = matplotlib.colormaps["tab20"](np.unique(points.label, return_inverse=True)[1] % 20)
    for axis, (name, at) in zip(axes, points.maps.items(), strict=True):
        for chosen, mark, what in ((~points.marked, "o", points.marks[0]), (points.marked, "X", points.marks[1])):
            axis.scatter(*at[chosen].T, c=colour[chosen], marker=mark, s=34, linewidths=0.4, edgecolors="white",
                         label=what)  # fmt: skip
        axis.set(title=name, xticks=[], yticks=[])
    axes[0].legend(fontsize=8)
    figure.suptitle(points.title, fontsize=10)
    return figure


def draw_panel(panel: Panel) -> Figure:
    """Queries on the left, their results in order, right framed green and wrong framed red (and crossed out)."""
    queries, results = panel.correct.shape
    figure = Figure(figsize=(1 + 0.95 * results, 0.4 + 1.05 * queries), layout="constrained")
    axes = figure.subplots(queries, results + 1, squeeze=False)
    for q in range(queries):
        _image(axes[q][0], panel.query[q], MUTED, "query" if q == 0 else "")
        for r in range(results):
            if (panel.results[q, r] == 255).all():  # a place without a picture
                axes[q][r + 1].axis("off")
                continue
            right = bool(panel.correct[q, r])
            _image(axes[q][r + 1], panel.results[q, r], RIGHT if right else WRONG, f"{r + 1}" if q == 0 else "")
            if not right:  # the colour alone would not tell everybody
                axes[q][r + 1].plot([0, 1], [0, 1], color=WRONG, lw=1.2, transform=axes[q][r + 1].transAxes)
    figure.suptitle(panel.title, fontsize=10)
    return figure


def curves(
    title: str, ours: Sequence[tuple[float, float]], x_label: str, metric: tuple[str, str],
    published: Mapping[str, Sequence[tuple[float, float]]], reference: float,
) -> Figure:  # fmt: skip
    """Our curve on the left; the published ones in a panel of their own, as differences to their value at
    ``reference``: other data sets live on other scales. ``metric`` is its title without and with its unit."""
    name, with_unit = metric
    figure = Figure(figsize=(9 if published else 5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if published else 1, squeeze=False)[0]
    _line(axes[0], ours, name, OURS)
    axes[0].set(title=title, xlabel=x_label, ylabel=with_unit)
    if published:
        for colour, (source, points) in zip((PUBLISHED, "#E69F00", "#CC79A7"), published.items(), strict=False):
            zero = dict(points).get(reference, 0.0)
            _line(axes[1], [(x, y - zero) for x, y in points], source, colour)
        axes[1].set(
            title="published (other data and nets)",
            xlabel=x_label,
            ylabel=f"{name} − {name} at {x_label} = {reference:g}",
        )
        axes[1].axhline(0, color=MUTED, lw=0.8)
    return figure


def heat_map(
    title: str, x_label: str, y_label: str, value_label: str, points: Sequence[tuple[float, float, float, str]]
) -> Figure:
    """Values over two tuned fields: coloured dots, stopped trials hollow; axes that span decades are logarithmic."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axis = figure.subplots()
    done = [p for p in points if p[3] == "completed"]
    stopped = [p for p in points if p[3] == "pruned"]
    if done:
        x, y, value, _ = zip(*done, strict=True)
        dots = axis.scatter(x, y, c=value, s=220, cmap="viridis", edgecolors="black", linewidths=0.6)
        figure.colorbar(dots, label=value_label)
        for px, py, pv, _ in done:
            axis.annotate(f"{pv:.1f}", (px, py), ha="center", va="center", fontsize=6.5, color="white",
                          path_effects=[_outline()])  # fmt: skip
    if stopped:
        x, y, _, _ = zip(*stopped, strict=True)
        axis.scatter(x, y, s=120, facecolors="none", edgecolors=MUTED, linewidths=1.5, label="stopped early")
        axis.legend(loc="best", fontsize=8)
    axis.set(xlabel=x_label, ylabel=y_label, title=title)
    for values, set_scale in (([p[0] for p in points], axis.set_xscale), ([p[1] for p in points], axis.set_yscale)):
        if values and max(values) > 5 * min(values) > 0:
            set_scale("log")
    return figure


def training(title: str, series: Mapping[str, Sequence[tuple[int, float]]], metric: Mapping[str, Sequence]) -> Figure:
    """Weighted loss terms on the left, evaluation on the right, over epochs."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in series.items():
        left.plot(*zip(*points, strict=True), label=name, lw=1.5)
    left.set(title=f"{title}: weighted loss terms", xlabel="epoch", ylabel="loss")
    left.set_yscale("log")
    left.legend(fontsize=8)
    for name, points in metric.items():
        right.plot(*zip(*points, strict=True), label=name, marker="o", ms=3, lw=1.5)
    right.set(title="evaluation", xlabel="epoch", ylabel="fraction", ylim=(0, None))
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def bars(title: str, rows: Sequence[tuple[str, list[float]]], label: str) -> Figure:
    """One bar per row with its mean, and a dot for every seed."""
    figure = Figure(figsize=(7, 0.6 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    names = [name for name, _ in rows]
    axis.barh(names, [np.mean(values) if values else 0 for _, values in rows], color=OURS, alpha=0.35)
    for at, (_, values) in enumerate(rows):
        axis.plot(values, [at] * len(values), "o", color=OURS, ms=5)
    axis.invert_yaxis()
    axis.set(title=title, xlabel=label)
    axis.grid(axis="x", alpha=0.3)
    return figure


def compromise(
    ours: Sequence[tuple[float, float, float, str]],
    published: Sequence[tuple[float, float, float, str]],
    y_label: str,
) -> Figure:
    """Accuracy over images per second: (images/s, score, spread of the score, name) of every point.

    Published points are in a panel of their own.
    """
    figure = Figure(figsize=(9.5 if published else 5.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 2 if published else 1, squeeze=False)[0]
    parts = [("ours", ours, OURS), ("published (other data, nets and device)", published, PUBLISHED)]
    for axis, (title, points, colour) in zip(axes, parts, strict=False):
        x, y, spread, names = zip(*sorted(points), strict=True)
        axis.errorbar(x, y, spread if any(spread) else None, fmt="o", color=colour, elinewidth=0.8, capsize=2)
        for place, top, name in zip(x, np.add(y, spread), names, strict=True):
            axis.annotate(name, (place, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7.5)
        axis.margins(x=0.22, y=0.12)
        axis.set(title=title, xlabel="images per second", ylabel=y_label)
        axis.grid(alpha=0.3)
    return figure


def _line(axis, points: Sequence[tuple[float, float]], label: str, colour: str) -> None:
    if points:
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, marker="o", label=label, color=colour, lw=1.5)
        if max(x) > 20 * min(x) > 0:
            axis.set_xscale("log")
        elif len(set(x)) <= 6:
            axis.set_xticks(sorted(set(x)))
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _image(axis, pixels: np.ndarray, frame: str, title: str) -> None:
    axis.imshow(pixels)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=frame, linewidth=3)
    if title:
        axis.set_title(title, fontsize=8)


def _outline():
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=1.5, foreground="black")
