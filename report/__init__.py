"""The model-zoo report of a run, from its metrics.jsonl alone: lines that tools read, JSON, and a page with plots."""

from __future__ import annotations

from pathlib import Path

from report import page
from report.metrics import NothingTrained, read_metrics, summarise
from report.text import case_log, final_lines, result_lines
from runtime.errors import ReportError
from runtime.files import write_json, write_text


def write_report(run_dir: Path, output: Path, case: str = "") -> dict:
    """Writes report.json, report.html and <case>.log into `output`; returns the report.

    Raises ReportError for metrics that are not there or damaged, and, after the JSON and the page, for a run that was
    stopped: it gets no log. Raises NothingTrained for a resumed run that had nothing left to do.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    report, curves = summarise(lines, case)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "report.json", report, ReportError)
    write_text(output / "report.html", page.render(report, curves, run_dir / "contact_sheet.png"), ReportError)
    if not report["complete"]:
        raise ReportError(f"the run was stopped ({report['reason']}): what ran of it is in {output / 'report.html'}")
    write_text(output / f"{report['case']}.log", case_log(report), ReportError)
    return report


def finish(run_dir: Path, output: Path | None = None, case: str = "") -> None:
    """Writes the report into `output` (run_dir when not given), prints its table and the `Final` lines."""
    output = Path(output or run_dir)
    try:
        report = write_report(Path(run_dir), output, case)
    except NothingTrained as nothing:
        print(nothing)
        return
    print("\n".join([*result_lines(report["verification"]), f"The report's page is {output / 'report.html'}"]))
    print("------------------ Final result ------------------")
    print("\n".join(final_lines(report)), flush=True)
