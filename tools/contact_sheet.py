"""A page of a data set's images: `python -m tools.contact_sheet --data_path=FOLDER --output=sheet.png`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import open_dataset
from data.images import contact_sheet
from runtime.log import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data_path", required=True, help="a training set of any known format")
    parser.add_argument("--output", required=True, help="the PNG to write")
    options = parser.parse_args()
    contact_sheet(open_dataset(options.data_path), options.output)


if __name__ == "__main__":
    run_command(main)
