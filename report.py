"""The model-zoo report of a run, from its metrics.jsonl alone: lines that tools read, JSON, and a page with plots.

    python report.py RUN_DIR [--case CaseName] [--output DIR]

Prints the `Final ...` lines and writes <CaseName>.log, report.json and report.html (one file, nothing loaded from
elsewhere; matplotlib draws its plots). A run that was stopped gets its JSON and page, but no `Final` line and no log.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import platform
import re
import time
from itertools import accumulate
from pathlib import Path
from string import Template

from runtime.errors import ReportError
from runtime.log import run_command
from verify.plot import COLOURS, roc_figure

# What a line of each kind must hold for the report to use it.
NEEDED = {
    "run": ("network", "world_size", "batch_size"),
    "step": ("step", "loss"),
    "verify": ("step", "set", "accuracy"),
    "window": ("images", "seconds"),
    "end": ("seconds", "reason"),
}
COMPLETE = ("finished", "max_iter")


class NothingTrained(Exception):
    """A run that resumed what was trained to its end already: no failure, and nothing to report."""


# --- from lines to numbers -------------------------------------------------------------------------------------------
def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. Raises ReportError where it is missing, empty or damaged, naming the line.

    A torn line just before a `run` line is what a killed run left before the run was resumed, and is skipped.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}): is this the folder of a run?") from None
    numbered = [(number, _parse(text)) for number, text in enumerate(texts, 1) if text.strip()]
    following = [line for _, line in numbered[1:]] + [None]
    lines = []
    for (number, line), after in zip(numbered, following):
        if line is not None:
            missing = [name for name in NEEDED.get(line.get("kind"), ()) if name not in line]
            if missing:
                raise ReportError(f"{path} line {number}: the {line['kind']} line lacks {', '.join(missing)}")
            lines.append(line)
        elif after is None or after.get("kind") != "run":
            raise ReportError(f"{path} line {number} is damaged: the file was cut off or written by something else")
    if not lines:
        raise ReportError(f"{path} is empty: the run ended before its first line")
    return lines


def _parse(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def summarise(lines: list[dict], case: str = "") -> tuple[dict, dict]:
    """The report's numbers as plain values, and the lines that its curves are drawn from.

    Where a run was resumed in the same folder, curves and the untrained verification span all its parts; speed,
    duration and hardware are the last part's. Raises ReportError for a run without a beginning, a step or an end.
    """
    beginnings = [i for i, line in enumerate(lines) if line.get("kind") == "run"]
    if not beginnings:
        raise ReportError("metrics.jsonl holds no run line: it does not say what ran")
    run, last = lines[beginnings[-1]], lines[beginnings[-1] :]
    evaluation = run.get("task") == "evaluate"
    history = _history(lines)
    steps = [line for line in history if line["kind"] == "step"]
    verifications = [line for line in history if line["kind"] == "verify"]
    ends = [line for line in last if line.get("kind") == "end"]
    if not ends:
        raise ReportError("the run has no end line: it was killed, or is still going")
    if evaluation and not verifications:
        raise ReportError("the evaluation judged no verification set")
    if not evaluation and not steps:
        if ends[-1].get("reason") == "finished" and run.get("config", {}).get("resume"):
            raise NothingTrained("nothing was left to train: raise --epochs to go on")
        raise ReportError("the run recorded no training step")

    config = run.get("config", {})
    # the option of training counts all ranks together, an evaluation's line what one rank embeds at a time
    batch = (None if evaluation else config.get("batch_size")) or run["batch_size"] * run["world_size"]
    case = case or run.get("case") or f"{run['network']}_bs{batch}_{run['world_size']}p_acc"
    if not re.fullmatch(r"\w[\w.+-]*", case):
        raise ReportError(f"case '{case}' cannot name a file: use letters, digits and _ . + -")
    report = {
        "case": case,
        "task": "evaluate" if evaluation else "train",
        "network": run["network"],
        "rank_size": run["world_size"],
        "batch_size": batch,
        "reason": ends[-1]["reason"],
        "complete": ends[-1]["reason"] in COMPLETE,
        "seconds": ends[-1]["seconds"],
        "ended": ends[-1].get("time"),
        "machine": run.get("device", {}).get("machine", platform.machine()),
        "device": run.get("device", {}),
        "fast_paths": run.get("fast_paths", {}),
        "versions": run.get("versions", {}),
        "commit": run.get("commit"),
        "command": run.get("command"),
        "config": config,
        "verification": _verification(verifications, config.get("val_targets") or []),
    }
    judged = next((entry for entry in report["verification"] if entry["trained"]), None)
    if evaluation:
        report["accuracy"] = judged["trained"]["accuracy"]
        report["accuracy_is"] = f"verification on {judged['set']}"
    else:
        report.update(_training(steps, last, batch, judged))
    return report, {"steps": steps, "verifications": verifications}


def _history(lines: list[dict]) -> list[dict]:
    """The step and verify lines of the last run and of the parts that it resumed, each step once."""
    kept, first = [], False
    for line in lines:
        kind = line.get("kind")
        if kind == "run":
            first = True
            if not line.get("config", {}).get("resume"):
                kept = []
        if kind == "step" and first:
            first = False
            # a part that was killed went on after the checkpoint from which the next part started
            kept = [earlier for earlier in kept if earlier["step"] < line["step"]]
        if kind in ("step", "verify"):
            kept.append(line)
    return kept


def _training(steps: list[dict], last: list[dict], batch: int, judged: dict | None) -> dict:
    """Speed over the measured windows of the run's last part, accuracy with its meaning, last loss."""
    # each window line holds all that was measured before it
    windows = [line for line in last if line.get("kind") == "window" and line["seconds"] > 0]
    speed, speed_is = None, "not measured: the run was over before the window that leaves warm-up out began"
    if windows:
        images, seconds = windows[-1]["images"], windows[-1]["seconds"]
        speed = images / seconds
        speed_is = f"{images:,} training images of all ranks in {seconds:.2f} s, warm-up left out"
    if judged:
        accuracy, meaning = judged["trained"]["accuracy"], f"verification on {judged['set']}"
        meaning += f" after step {judged['trained']['step']}"
    else:
        accuracy = steps[-1].get("accuracy")
        meaning = f"top-1 on the training images of step {steps[-1]['step']} (no set was verified)"
    return {
        "images_per_s": speed,
        "images_per_s_is": speed_is,
        "ms_per_step": batch * 1000 / speed if speed else None,
        "accuracy": accuracy,
        "accuracy_is": meaning,
        "loss": steps[-1]["loss"],
        "loss_is": f"step {steps[-1]['step']}",
        "steps": steps[-1]["step"],
        "damaged_images": max(line.get("damaged") or 0 for line in steps),
        "steps_with_a_loss_that_is_not_finite": sum(line["loss"] is None for line in steps),
    }


def _verification(verifications: list[dict], order: list[str]) -> list[dict]:
    """For each set, in the order of the run's targets, the untrained and the last trained result."""
    sets = list(dict.fromkeys(line["set"] for line in verifications))
    sets.sort(key=lambda name: order.index(name) if name in order else len(order))
    table = []
    for name in sets:
        results = [line for line in verifications if line["set"] == name]
        before = [line for line in results if line.get("untrained")]
        after = [line for line in results if not line.get("untrained")]
        table.append({"set": name, "untrained": before[0] if before else None, "trained": after[-1] if after else None})
    return table


# --- lines that tools read -------------------------------------------------------------------------------------------
def final_lines(report: dict) -> list[str]:
    """The last lines of a launcher's output, as model-zoo tools look for them."""
    if report["task"] == "evaluate":
        return [
            f"Final Eval Accuracy : {_number(report['accuracy'], '.5f')}",
            f"E2E Eval Duration sec : {report['seconds']:.0f}",
        ]
    return [
        f"Final Performance images/sec : {_number(report['images_per_s'], '.2f')}",
        f"Final Train Accuracy : {_number(report['accuracy'], '.5f')}",
        f"E2E Training Duration sec : {report['seconds']:.0f}",
    ]


def case_log(report: dict) -> str:
    """The content of <CaseName>.log. BatchSize counts all ranks together, TrainingTime is milliseconds a step."""
    fields = {
        "Network": report["network"],
        "RankSize": report["rank_size"],
        "BatchSize": report["batch_size"],
        "DeviceType": report["machine"],
        "CaseName": report["case"],
    }
    if report["task"] == "evaluate":
        fields.update(EvalAccuracy=_number(report["accuracy"], ".5f"), E2EEvalTime=f"{report['seconds']:.0f}")
    else:
        fields.update(
            ActualFPS=_number(report["images_per_s"], ".2f"),
            TrainingTime=_number(report["ms_per_step"], ".2f"),
            TrainAccuracy=_number(report["accuracy"], ".5f"),
            ActualLoss=_number(report["loss"], ".6f"),
            E2ETrainingTime=f"{report['seconds']:.0f}",
        )
    return "".join(f"{key} = {value}\n" for key, value in fields.items())


def _number(value, form: str) -> str:
    return "none" if value is None else format(value, form)


# --- the table of verification ------------------------------------------------------------------------------------
def result_rows(verification: list[dict]) -> tuple[list[str], list[tuple[str, list[str]]], list[str]]:
    """(head, rows of (state, cells), why rates are missing) of entries {"set", "untrained", "trained"}, whose results
    are `verify` lines or None."""
    lines = [(entry["set"], state, entry[state]) for entry in verification for state in ("untrained", "trained")]
    lines = [(name, state, line) for name, state, line in lines if line]
    fars = sorted({far for _, _, line in lines for far in line.get("tar_at_far") or {}}, key=float, reverse=True)
    head = ["set", "net", "pairs", "accuracy", "threshold", *(f"TAR at FAR {far}" for far in fars)]
    rows, reasons = [], {}
    for name, state, line in lines:
        spread = f" ± {line['std']:.4f}" if line.get("std") is not None else ""
        rates = [(line.get("tar_at_far") or {}).get(far) for far in fars]
        cells = [name, state, _number(line.get("pairs"), "d"), _number(line["accuracy"], ".4f") + spread]
        cells += [_number(line.get("threshold"), ".3f"), *("-" if rate is None else f"{rate:.4f}" for rate in rates)]
        rows.append((state, cells))
        for far, reason in (line.get("tar_at_far_why_not") or {}).items():
            reasons[f"{name}: TAR at FAR {far} {reason}"] = None
    return head, rows, list(reasons)


def result_lines(verification: list[dict]) -> list[str]:
    """The table as aligned lines of text, and below it why rates are missing."""
    head, rows, reasons = result_rows(verification)
    if not rows:
        return []
    cells = [head, *(cells for _, cells in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells] + reasons


# --- the page --------------------------------------------------------------------------------------------------------
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
            (f"verification, {entry['set']}", [r["step"] for r in results], [r["accuracy"] for r in results], style)
        )
    if steps:
        panel("Accuracy", "fraction", accuracies, ylim=(-0.02, 1.02))

    rocs = {}
    for entry in report["verification"]:
        for state in ("untrained", "trained"):
            roc = (entry[state] or {}).get("roc")
            if roc and any(roc["fpr"]):
                rocs[f"{entry['set']}, {state}"] = (roc["fpr"], roc["tpr"])
    if rocs:
        drawn["ROC"] = _png_of(roc_figure(rocs))

    panel("Learning rate", "learning rate", [("lr", *column("lr"), {**raw, "marker": None})])
    panel("Throughput", "images/s, all ranks", [("images/s", *column("images_per_s"), raw)], ylim=(0, None))
    return drawn


def _known(xs, ys):
    pairs = [(x, y) for x, y in zip(xs, ys) if y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


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


def page(report: dict, curves: dict, contact_sheet: Path) -> str:
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
    if contact_sheet.is_file() and contact_sheet.read_bytes()[:4] == b"\x89PNG":
        sheet = f'<h2>Data</h2><img class="sheet" src="{_data_url(contact_sheet.read_bytes())}" alt="contact sheet">'
    elif report["task"] == "train":
        missing.append("no contact sheet of the data was made for this run")
    if not report["verification"]:
        missing.append("no verification set was judged")
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
            f"batch {report['batch_size']}, ended {_date(report['ended'])}"
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
    return Template(PAGE).substitute(values)


def _tiles(report: dict):
    if report["task"] == "train":
        yield "images/s", _number(report["images_per_s"], ",.1f"), report["images_per_s_is"]
    yield "accuracy", _number(report["accuracy"], ".4f"), report["accuracy_is"]
    if report["task"] == "train":
        yield "last loss", _number(report["loss"], ".4f"), report["loss_is"]
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


def _date(seconds) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else "at an unknown time"


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else "none" if value is None else str(value)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { --ink: #111827; --soft: #6b7280; --line: #e5e7eb; --blue: #2563eb }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; margin: 0 }
body { color: var(--ink); background: #f9fafb }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem }
.subtitle { color: var(--soft); margin: .2rem 0 1.5rem }
.stopped { background: #fef3c7; border-left: 4px solid #d97706; padding: .6rem 1rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 1rem }
.tile, figure, table, pre, .sheet { background: #fff; border: 1px solid var(--line); border-radius: 8px }
.tile { padding: .9rem 1.1rem } .tile b { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--blue) }
.tile span { font-weight: 600 } .tile small { display: block; color: var(--soft); line-height: 1.35 }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1rem }
figure { margin: 0; padding: .5rem } img { width: 100%; display: block } .sheet { padding: .5rem }
table { border-collapse: separate; border-spacing: 0; width: 100% }
th, td { text-align: left; vertical-align: top }
td { overflow-wrap: anywhere }
th, td { padding: .45rem .8rem; border-bottom: 1px solid var(--line) }
tr:last-child td { border-bottom: 0 } th { color: var(--soft); font-weight: 600; font-size: .85rem }
.results th, .results td { white-space: nowrap; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
.results .untrained td, .note { color: var(--soft) } .note { font-size: .85rem; margin: .5rem .2rem }
.results .trained td:nth-child(4) { font-weight: 700 }
pre { padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
summary { cursor: pointer; margin: 1rem 0 .5rem }
</style></head><body><main>
<h1>$title</h1><p class="subtitle">$subtitle</p>$state
<div class="tiles">$tiles</div>
$results
$figures
$sheet
$missing
<h2>Hardware and versions</h2>$machine
<h2>Fast paths</h2>$fast
<h2>Command</h2><pre>$command</pre>
<details><summary>All options</summary>$config</details>
</main></body></html>
"""


# --- the command -----------------------------------------------------------------------------------------------------
def write_report(run_dir: Path, output: Path, case: str = "") -> dict:
    """Write everything into `output`; returns the report. Raises ReportError, having written no success, otherwise."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    report, curves = summarise(lines, case)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "report.html").write_text(page(report, curves, run_dir / "contact_sheet.png"), encoding="utf-8")
    if not report["complete"]:
        raise ReportError(f"the run was stopped ({report['reason']}): what ran of it is in {output / 'report.html'}")
    (output / f"{report['case']}.log").write_text(case_log(report), encoding="utf-8")
    return report


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="the folder that holds metrics.jsonl")
    parser.add_argument("--case", default="", help="CaseName; the run's own when not given")
    parser.add_argument("--output", type=Path, help="folder of the report; RUN_DIR when not given")
    options = parser.parse_args(argv)
    output = options.output or options.run_dir
    try:
        report = write_report(options.run_dir, output, options.case)
    except NothingTrained as nothing:
        print(nothing)
        return
    print("\n".join([*result_lines(report["verification"]), f"The report's page is {output / 'report.html'}"]))
    print("------------------ Final result ------------------")
    print("\n".join(final_lines(report)))


if __name__ == "__main__":
    run_command(main)
