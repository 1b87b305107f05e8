#!/usr/bin/env bash
# From a fresh machine to a face network that was trained, verified on people it never saw, and reported on.
#
#   bash quickstart.sh                       drawn faces, made here
#   bash quickstart.sh --data_path=FOLDER    your own set; any other option of train.py follows the same way
#
# Leaves .venv, data/drawn_faces, checkpoints in work_space/, and the report in test/output/quickstart*/report.html.
# Run again with the same options, it shows the finished report, or goes on where an interrupted training stood; other
# options are another run, in folders of its own.
set -eu
cd "$(dirname "$0")"
source scripts/environment.sh

data_path=data/drawn_faces
for word in "$@"; do
    case "$word" in --data_path=*|--data-path=*) data_path=${word#*=} ;; esac
done

use_environment requirements.txt

# A wrong option ends here, before anything is made.
"$PYTHON" -c '
import sys
import config
from configs import RECIPES
from runtime.log import run_command

def main():
    config.parse_arguments(sys.argv[1:], recipes=RECIPES)

run_command(main)' --recipe=quickstart "$@"
for word in "$@"; do
    case "$word" in --help | -h) exit ;; esac
done

name=quickstart
[ $# -eq 0 ] || name=quickstart_$(printf '%s\n' "$@" | cksum | cut -d " " -f 1)
run=test/output/$name
if [ -f "$run/done" ]; then
    echo "trained before with these options; remove $run and work_space/$name to train anew"
    exec "$PYTHON" report.py "$run"
fi
if [ "$data_path" = data/drawn_faces ]; then
    # Does nothing where the same faces are there already.
    "$PYTHON" -m data.synthetic --output "$data_path" --seed 0
    set -- "--data_path=$data_path" "$@"
fi
mkdir -p "$run"
"$PYTHON" -m tools.contact_sheet --data_path="$data_path" --output="$run/contact_sheet.png"
bash test/train_full_1p.sh --recipe=quickstart "--run_dir=$run" "--work_path=work_space/$name" --resume=auto "$@"
touch "$run/done"
echo "report: $run/report.html"
