"""metrics.jsonl -> the report's numbers. What a line holds is checked once, here: the file may come from anywhere."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from pathlib import Path

from config import CASE
from runtime.errors import ReportError
from runtime.files import open_regular

COMPLETE = ("finished", "max_iter")
# A line a step of a run of years is far below this; what is larger is no metrics.jsonl.
MOST_BYTES = 1 << 30
DEEPEST = 20


class NothingTrained(Exception):
    """A run that resumed what was trained to its end already: no failure, and nothing to report."""


# --- what a line may hold --------------------------------------------------------------------------------------------
def number(value) -> bool:
    """a number"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def count(value) -> bool:
    """a whole number from 0"""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def moment(value) -> bool:
    """seconds since 1970"""
    return number(value) and 0 <= value < 2**40


def text(value) -> bool:
    """a text"""
    return isinstance(value, str)


def yes_or_no(value) -> bool:
    """true or false"""
    return isinstance(value, bool)


def rates(value) -> bool:
    """accept rates by false accept rate"""
    return isinstance(value, dict) and all(_is_float(k) and (v is None or number(v)) for k, v in value.items())


def _is_float(text) -> bool:
    try:
        return number(float(text))
    except ValueError:
        return False


# {kind: {name: rule}}; a rule is one of the functions above, [rule] a list of such, {name: rule} an object, where
# {"": rule} holds for every name, and {} for anything. What is not named here is not looked at, and null is allowed
# except in REQUIRED.
LINES = {
    "run": {
        "network": text, "world_size": count, "batch_size": count, "case": text, "task": text, "time": moment,
        "command": text, "commit": text, "num_classes": count, "images": count, "fast_paths": {}, "versions": {},
        "device": {"machine": text, "memory": number},
        "config": {"batch_size": count, "resume": text, "val_targets": [text]},
    },
    "step": {
        "step": count, "epoch": count, "loss": number, "lr": number, "accuracy": number, "images_per_s": number,
        "damaged": count, "time": moment,
    },
    "verify": {
        "step": count, "set": text, "accuracy": number, "std": number, "threshold": number, "pairs": count,
        "untrained": yes_or_no, "caution": text, "tar_at_far": rates, "tar_at_far_why_not": {"": text},
        "roc": {"fpr": [number], "tpr": [number]},
    },
    "window": {"images": count, "seconds": number, "steps": count},
    "end": {"seconds": number, "reason": text, "time": moment},
}  # fmt: skip
# What a line of each kind must hold; the loss and the accuracy may be null, as they are where they were not finite.
REQUIRED = {
    "run": ("network", "world_size", "batch_size"),
    "step": ("step", "loss"),
    "verify": ("step", "set", "accuracy"),
    "window": ("images", "seconds"),
    "end": ("seconds", "reason"),
}
NULL = {("step", "loss"), ("verify", "accuracy")}


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. Raises ReportError where it is missing, empty or damaged, naming the line.

    A torn line just before a `run` line is what a killed run left before the run was resumed, and is skipped.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                raise ReportError(
                    f"{path} has more than {MOST_BYTES:,} bytes: no run leaves so much, it is something else"
                )
            texts = file.read().decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}): is this the folder of a run?") from None
    numbered = [(place, _parse(line)) for place, line in enumerate(texts, 1) if line.strip()]
    following = [line for _, line in numbered[1:]] + [None]
    lines = []
    for (place, line), after in zip(numbered, following):
        if line is not None:
            problem = _problem_of_line(line)
            if problem:
                raise ReportError(f"{path} line {place}: the {line['kind']} line {problem}")
            lines.append(line)
        elif after is None or after.get("kind") != "run":
            raise ReportError(f"{path} line {place} is damaged: the file was cut off or written by something else")
    if not lines:
        raise ReportError(f"{path} is empty: the run ended before its first line")
    return lines


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _parse(line_of_text: str) -> dict | None:
    try:
        line = json.loads(line_of_text, parse_float=_finite, parse_constant=lambda _name: None)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _problem_of_line(line: dict) -> str:
    kind = line.get("kind")
    if not isinstance(kind, str) or kind not in LINES:
        return ""  # written by a newer version, and nothing that this report reads
    missing = [n for n in REQUIRED[kind] if line.get(n) is None and not (n in line and (kind, n) in NULL)]
    return f"lacks {', '.join(missing)}" if missing else _problem(line, LINES[kind], "")


def _problem(value, rule, name: str) -> str:
    """What is wrong with a value, in words that follow "the ... line"; nothing where it follows the rule."""
    if value is None:
        return ""
    if callable(rule):
        return "" if rule(value) else f"has a wrong {name} (it should be: {rule.__doc__})"
    if isinstance(rule, list):
        if not isinstance(value, list):
            return f"has a wrong {name} (it should be: a list)"
        return next(filter(None, (_problem(item, rule[0], name) for item in value)), "")
    if not isinstance(value, dict):
        return f"has a wrong {name} (it should be: an object)"
    if _too_deep(value, DEEPEST):
        return f"has a {name} with more than {DEEPEST} levels"
    rules = {key: rule[""] for key in value} if "" in rule else rule
    found = (_problem(value.get(key), inner, f"{name} {key}".strip()) for key, inner in rules.items())
    return next(filter(None, found), "")


def _too_deep(value, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return not levels or any(_too_deep(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


# --- from lines to numbers -------------------------------------------------------------------------------------------
def summarise(lines: list[dict], case: str = "") -> tuple[dict, dict]:
    """The report's numbers as plain values, and the lines that its curves are drawn from.

    Where a run was resumed in the same folder, curves and the untrained verification span all its parts; speed,
    duration and hardware are the last part's. Raises ReportError for a run without a beginning, a step or an end.
    """
    beginnings = [i for i, line in enumerate(lines) if line.get("kind") == "run"]
    if not beginnings:
        raise ReportError("metrics.jsonl holds no run line: it does not say what ran")
    parts = [lines[a:b] for a, b in zip(beginnings, [*beginnings[1:], len(lines)])]
    while len(parts) > 1 and _had_nothing_to_do(parts[-1]):
        parts.pop()
    last = parts[-1]
    run = last[0]
    evaluation = run.get("task") == "evaluate"
    history = _history(lines)
    steps = [line for line in history if line["kind"] == "step"]
    verifications = [line for line in history if line["kind"] == "verify"]
    ends = [line for line in last if line.get("kind") == "end"]
    if not ends:
        raise ReportError("the run has no end line: it was killed, or is still going")
    if evaluation and not verifications:
        raise ReportError("the evaluation had no verification set")
    if not evaluation and not steps:
        if _had_nothing_to_do(last):
            raise NothingTrained("nothing was left to train: raise --epochs to go on")
        raise ReportError("the run recorded no training step")

    config, device = run.get("config") or {}, run.get("device") or {}
    # the option of training counts all ranks together, an evaluation's line what one rank embeds at a time
    batch = (None if evaluation else config.get("batch_size")) or run["batch_size"] * run["world_size"]
    case = case or run.get("case") or f"{run['network']}_bs{batch}_{run['world_size']}p_acc"
    if not re.fullmatch(CASE, case):
        raise ReportError(f"case '{case}' cannot name a file: use letters, digits and _ . + -")
    report = {
        "case": case,
        "task": "evaluate" if evaluation else "train",
        "network": run["network"],
        "rank_size": run["world_size"],
        "batch_size": batch,
        "images": run.get("images"),
        "classes": run.get("num_classes"),
        "reason": ends[-1]["reason"],
        "complete": ends[-1]["reason"] in COMPLETE,
        "seconds": ends[-1]["seconds"],
        "ended": ends[-1].get("time"),
        "machine": device.get("machine") or platform.machine(),
        "device": device,
        "fast_paths": run.get("fast_paths") or {},
        "versions": run.get("versions") or {},
        "commit": run.get("commit"),
        "command": run.get("command"),
        "config": config,
        "verification": _verification(verifications, config.get("val_targets") or []),
    }
    trained = [entry for entry in report["verification"] if entry["trained"]]
    verified = next((entry for entry in trained if not entry["trained"].get("caution")), None)
    if evaluation:
        report["accuracy"] = verified["trained"]["accuracy"] if verified else None
        report["accuracy_is"] = (
            f"verification on {verified['set']}" if verified else f"not known: {trained[0]['trained']['caution']}"
        )
    else:
        report.update(_training(steps, last, batch, verified))
    return report, {"steps": steps, "verifications": verifications}


def _had_nothing_to_do(part: list[dict]) -> bool:
    """Whether this part of a run resumed what was trained to its end already."""
    given = part[0].get("config") or {}
    return (
        bool(given.get("resume") or given.get("pth_path"))
        and part[0].get("task") != "evaluate"
        and not any(line.get("kind") == "step" for line in part)
        and part[-1].get("reason") == "finished"
    )


def _history(lines: list[dict]) -> list[dict]:
    """The step and verify lines of the last run and of the parts that it resumed, each step once."""
    kept, first = [], False
    for line in lines:
        kind = line.get("kind")
        if kind == "run":
            first = True
            if not (line.get("config") or {}).get("resume"):
                kept = []
        if kind == "step" and first:
            first = False
            # a part that was killed went on after the checkpoint from which the next part started
            kept = [earlier for earlier in kept if earlier["step"] < line["step"]]
        if kind in ("step", "verify"):
            kept.append(line)
    return kept


def _training(steps: list[dict], last: list[dict], batch: int, verified: dict | None) -> dict:
    """Speed over the measured windows of the run's last part, accuracy with its meaning, last loss."""
    # each window line holds all that was measured before it
    windows = [line for line in last if line.get("kind") == "window" and line["seconds"] > 0]
    speed, speed_is = None, "not measured: the run was over before the window that leaves warm-up out began"
    if windows:
        images, seconds = windows[-1]["images"], windows[-1]["seconds"]
        speed = images / seconds
        speed_is = f"{images:,} training images of all ranks in {seconds:.2f} s, warm-up left out"
    if verified:
        accuracy, meaning = verified["trained"]["accuracy"], f"verification on {verified['set']}"
        meaning += f" after step {verified['trained']['step']}"
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
