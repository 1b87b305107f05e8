"""One rank of `python -m plsc.launch --log_dir=log`: runs the script with its output in workerlog.<local rank>."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys


def main() -> None:
    path = os.path.join(os.environ["PLSC_LOG_DIR"], f"workerlog.{os.environ['LOCAL_RANK']}")
    if os.environ["LOCAL_RANK"] == "0":  # the first rank is seen on the terminal too
        tee = subprocess.Popen(["tee", "-a", path], stdin=subprocess.PIPE)
        target = tee.stdin.fileno()
    else:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
