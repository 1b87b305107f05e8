"""Write the report of a run: `python report.py RUN_DIR [--case NAME] [--output DIR]`, or `python -m report RUN_DIR`.

Prints the table and the `Final ...` lines, and writes NAME.log, report.json and report.html (one file, nothing loaded
from elsewhere; matplotlib draws its plots). A run that was stopped gets its JSON and page, no `Final` line and no log.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
from runtime.log import Parser, run_command


def main(argv=None) -> None:
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the folder that holds metrics.jsonl, or a training's --work_path")
    parser.add_argument("--case", default="", help="CaseName; the run's own when not given")
    parser.add_argument("--output", type=Path, help="folder of the report; RUN_DIR when not given")
    options = parser.parse_args(argv)
    if not (options.run_dir / "metrics.jsonl").exists() and (options.run_dir / "log" / "metrics.jsonl").exists():
        options.run_dir /= "log"  # of a training's work_path
    report.finish(options.run_dir, options.output, options.case)


if __name__ == "__main__":
    run_command(main)
