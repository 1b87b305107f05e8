"""The report as lines of text: those that model-zoo tools look for, the case's log, and the table of verification."""

from __future__ import annotations


# --- lines that tools read -------------------------------------------------------------------------------------------
def final_lines(report: dict) -> list[str]:
    """The last lines of a launcher's output, as model-zoo tools look for them."""
    if report["task"] == "evaluate":
        return [
            f"Final Eval Accuracy : {formatted(report['accuracy'], '.5f')}",
            f"E2E Eval Duration sec : {report['seconds']:.0f}",
        ]
    return [
        f"Final Performance images/sec : {formatted(report['images_per_s'], '.2f')}",
        f"Final Train Accuracy : {formatted(report['accuracy'], '.5f')}",
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
        fields.update(EvalAccuracy=formatted(report["accuracy"], ".5f"), E2EEvalTime=f"{report['seconds']:.0f}")
    else:
        fields.update(
            ActualFPS=formatted(report["images_per_s"], ".2f"),
            TrainingTime=formatted(report["ms_per_step"], ".2f"),
            TrainAccuracy=formatted(report["accuracy"], ".5f"),
            ActualLoss=formatted(report["loss"], ".6f"),
            E2ETrainingTime=f"{report['seconds']:.0f}",
        )
    return "".join(f"{key} = {value}\n" for key, value in fields.items())


def formatted(value, form: str) -> str:
    """The value, or "none" where there is none."""
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
        cells = [name, state, formatted(line.get("pairs"), "d"), formatted(line["accuracy"], ".4f") + spread]
        cells.append(formatted(line.get("threshold"), ".3f"))
        if line.get("caution"):  # then they mean nothing
            cells[-2:] = "-", "-"
        cells += [*("-" if rate is None else f"{rate:.4f}" for rate in rates)]
        rows.append((state, cells))
        if line.get("caution"):
            reasons[f"{name}: {line['caution']}"] = None
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
