"""Write the report of a run: `python report.py RUN_DIR`. The report itself is the package report/."""

from report.__main__ import main
from runtime.log import run_command

if __name__ == "__main__":
    run_command(main)
