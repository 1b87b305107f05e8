"""The report as one HTML file, with its plots inside it and nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import time
from itertools import accumulate
from pathlib import Path
from string import Template

from report.text import formatted, result_rows
from runtime.files import open_regular
from verify.plot import COLOURS, roc_figure

TEMPLATE = Path(__file__).with_name("page.html")
_MOST_PICTURE_BYTES = 64 << 20


def plots(report: dict, curves: dict) -> dict[str, str]:
    """{title: data URL of a PNG}. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    steps = curves["steps"]
    drawn = {}

    def panel(title, unit, lines, **axis):
        """lines: (label, xs, ys, style). A panel without a value is not drawn."""
        lines = [(label, *_known(xs, ys), style) for label, xs, ys, style in lines]
        if not any(xs for _, xs, _, _ in lines):
            return
        figure = Figure(figsize=(6, 3.6), dpi=150, constrained_layout=True)
        axes = figure.add_subplot()
        for label, xs, ys, style in lines:
            axes.plot(xs, ys, label=label, **style)
        axes.set(xlabel="step", ylabel=unit, **axis)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(True, color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        drawn[title] = _png_of(figure)

    def column(name):
        return [line["step"] for line in steps], [line.get(name) for line in steps]

    xs, losses = column("loss")
    raw = {"color": COLOURS[0], "linewidth": 1.8, "marker": "o" if len(xs) < 15 else None, "markersize": 3}
    if len(xs) > 50:
        panel(
            "Loss",
            "loss",
            [
                ("each step", xs, losses, {**raw, "alpha": 0.3, "linewidth": 0.8}),
                ("running mean", *_running_mean(*_known(xs, losses)), raw),
            ],
        )
    else:
        panel("Loss", "loss", [("loss", xs, losses, raw)])

    accuracies = [("training images, top-1", *column("accuracy"), {"color": "#9ca3af", "linewidth": 1.0})]
    for entry, colour in zip(report["verification"], COLOURS * 2):
        results = [line for line in curves["verifications"] if line["set"] == entry["set"]]
        style = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 4}
        accuracies.append(
            (
                _label(f"verification, {entry['set']}"),
                [r["step"] for r in results],
                [r["accuracy"] for r in results],
                style,
            )
        )
    if steps:
        panel("Accuracy", "fraction", accuracies, ylim=(-0.02, 1.02))

    rocs = {}
    for entry in report["verification"]:
        for state in ("untrained", "trained"):
            roc = (entry[state] or {}).get("roc") or {}
            fpr, tpr = _known(*_known(roc.get("fpr") or [], roc.get("tpr") or [])[::-1])[::-1]
            if any(fpr):
                rocs[_label(f"{entry['set']}, {state}")] = (fpr, tpr)
    if rocs:
        drawn["ROC"] = _png_of(roc_figure(rocs))

    panel("Learning rate", "learning rate", [("lr", *column("lr"), {**raw, "marker": None})])
    panel("Throughput", "images/s, all ranks", [("images/s", *column("images_per_s"), raw)], ylim=(0, None))
    return drawn


def _known(xs, ys):
    pairs = [(x, y) for x, y in zip(xs, ys) if y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _label(text):
    return text.replace("$", r"\$")  # else matplotlib reads mathematics between two of them


def _running_mean(xs, ys):
    width = max(2, len(ys) // 50)
    sums = [0.0, *accumulate(ys)]
    return xs[width - 1 :], [(end - start) / width for start, end in zip(sums, sums[width:])]


def _png_of(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _data_url(buffer.getvalue())


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def render(report: dict, curves: dict, contact_sheet: Path) -> str:
    """report.html: one self-contained file. What is missing is said in its place."""
    try:
        images = plots(report, curves)
        no_plots = ""
    except ImportError:
        images = {}
        no_plots = "matplotlib is not installed here, so the curves are not drawn: pip install matplotlib, report again"
    figures = "".join(f'<figure><img src="{url}" alt="{html.escape(name)}"></figure>' for name, url in images.items())

    missing = [no_plots] if no_plots else []
    sheet = ""
    png = _picture(contact_sheet)
    if png:
        sheet = f'<h2>Data</h2><img class="sheet" src="{_data_url(png)}" alt="contact sheet">'
    elif report["task"] == "train":
        missing.append("no contact sheet of the data was made for this run")
    if not report["verification"]:
        missing.append("nothing was verified")
    elif "ROC" not in images and not no_plots:
        missing.append("no ROC: the sets hold pairs of one kind only")

    state = (
        ""
        if report["complete"]
        else (
            f'<p class="stopped">This run was stopped before its end ({html.escape(str(report["reason"]))}). '
            "Its numbers are those of the part that ran.</p>"
        )
    )
    values = {
        "title": html.escape(report["case"]),
        "subtitle": html.escape(
            f"{'Training' if report['task'] == 'train' else 'Evaluation'} of {report['network']} on "
            f"{report['rank_size']} rank{'s' if report['rank_size'] > 1 else ''}, "
            f"batch {report['batch_size']}{_data(report)}, ended {_date(report['ended'])}"
        ),
        "state": state,
        "tiles": "".join(
            f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
            f"<small>{html.escape(meaning)}</small></div>"
            for name, value, meaning in _tiles(report)
        ),
        "results": _results_table(report["verification"]),
        "figures": f'<h2>Curves</h2><div class="grid">{figures}</div>' if figures else "",
        "sheet": sheet,
        "missing": "".join(f"<li>{html.escape(text)}</li>" for text in missing),
        "machine": _pairs_table({**_device(report["device"]), **report["versions"], "commit": report["commit"]}),
        "fast": _pairs_table(report["fast_paths"]),
        "command": html.escape(report["command"] or "not recorded"),
        "config": _pairs_table(report["config"]),
    }
    values["missing"] = f"<h2>What is not here</h2><ul>{values['missing']}</ul>" if missing else ""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _picture(path: Path) -> bytes:
    """A PNG file's bytes; empty where there is none that can be shown."""
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_PICTURE_BYTES + 1)
    except OSError:
        return b""
    return data if data[:4] == b"\x89PNG" and len(data) <= _MOST_PICTURE_BYTES else b""


def _tiles(report: dict):
    if report["task"] == "train":
        yield "images/s", formatted(report["images_per_s"], ",.1f"), report["images_per_s_is"]
    yield "accuracy", formatted(report["accuracy"], ".4f"), report["accuracy_is"]
    if report["task"] == "train":
        yield "last loss", formatted(report["loss"], ".4f"), report["loss_is"]
    yield "seconds", f"{report['seconds']:,.0f}", "from start to end, everything included"


def _results_table(verification: list[dict]) -> str:
    head, rows, reasons = result_rows(verification)
    if not rows:
        return ""
    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f'<tr class="{state}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for state, cells in rows
    )
    table = f"<table class='results'><tr>{header}</tr>{body}</table>"
    notes = "<br>".join(map(html.escape, reasons))
    return f"<h2>Verification</h2><div class='wide'>{table}</div><p class='note'>{notes}</p>"


def _pairs_table(pairs: dict) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(_text(value))}</td></tr>" for key, value in pairs.items()
    )
    return f"<table>{rows}</table>" if rows else "<p>not recorded</p>"


def _device(device: dict) -> dict:
    memory = device.get("memory")
    return {**device, "memory": f"{memory / 2**30:.1f} GiB"} if memory else device


def _data(report: dict) -> str:
    counts = ((report["images"], "images"), (report["classes"], "classes"))
    return "".join(f", {count:,} {name}" for count, name in counts if count is not None)


def _date(seconds) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else "at an unknown time"


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else "none" if value is None else str(value)
