"""The ROC plot, for tensorboard, the evaluation's folder and the report page."""

from __future__ import annotations

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d")


def roc_figure(curves, title: str = "ROC"):
    """A matplotlib figure of {label: (fpr, tpr)}, the false positive rate on a logarithmic axis.

    A curve that has no false positive anywhere, as of a set without different pairs, is left out. Labels that end in
    "untrained" are drawn dashed. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=150, constrained_layout=True)
    axes = figure.add_subplot()
    solid = 0
    lowest = 0.1
    for label, (fpr, tpr) in curves.items():
        points = [(f, t) for f, t in zip(fpr, tpr) if f > 0]
        if not points:
            continue
        lowest = min(lowest, points[0][0])
        untrained = label.endswith("untrained")
        colour = "#9ca3af" if untrained else COLOURS[solid % len(COLOURS)]
        solid += not untrained
        axes.plot(*zip(*points), "--" if untrained else "-", color=colour, linewidth=1.8, label=label)
    axes.set_xscale("log")
    axes.set_xlim(lowest * 0.9, 1.1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("false accept rate")
    axes.set_ylabel("true accept rate")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    return figure
