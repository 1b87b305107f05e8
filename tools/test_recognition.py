"""Detection and recognition demo: see deploy.demo.

python tools/test_recognition.py --det --rec --index=index.bin --input=friends2.jpg --output=./output
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, as its document says

from deploy.demo import main  # noqa: E402
from runtime.log import run_command  # noqa: E402

if __name__ == "__main__":
    run_command(main)
