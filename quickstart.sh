#!/usr/bin/env bash
# From a fresh machine to a face network that was trained, verified on people it never saw, and reported on.
#
#   bash quickstart.sh                       synthetic faces, made here
#   bash quickstart.sh --data_path=FOLDER    your own set; any other option of train.py follows the same way
#
# Leaves .venv, data/synthetic_faces, checkpoints in work_space/, and the report in
# test/output/quickstart*/report.html (or --run_dir). Run again with the same options, it shows the finished report, or
# goes on where an interrupted training stood; other options are another run, in folders of its own.
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"  # as after: sh quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/test/common.sh" # goes to the root, and knows the paths from where the user stood
source scripts/environment.sh
set -e

use_environment requirements.txt
case " $* " in
*" --help "* | *" -h "*) exec "$PYTHON" train.py --help ;;
esac
find_paths "$@"
set -- ${with_paths[@]+"${with_paths[@]}"}

# A wrong option ends here, before anything is made. Prints what this file itself acts on, one a line.
settings=$("$PYTHON" -c '
import sys
import config
from configs import RECIPES
from runtime.log import run_command

def main():
    options = config.parse_arguments(["--recipe=quickstart", *sys.argv[1:]], recipes=RECIPES)
    ours = RECIPES["quickstart"]
    given = [v if v != getattr(ours, n) else "" for n, v in vars(options).items() if n in ("data_path", "work_path")]
    print(options.run_dir, *given, options.data_mode, sep="\n")

run_command(main)' "$@")
{ read -r run; read -r data_path; read -r work_path; read -r data_mode; } <<<"$settings"

name=quickstart
[ $# -eq 0 ] || name=quickstart_$(printf '%s\n' "$@" | cksum | cut -d " " -f 1)
run=${run:-test/output/$name}
if [ "$(cat "$run/done" 2>/dev/null)" = "$name" ]; then
    echo "trained before with these options; remove $run and ${work_path:-work_space/$name} to train anew"
    exec "$PYTHON" report.py "$run"
fi
[ -n "$work_path" ] || set -- "--work_path=work_space/$name" "$@"
mkdir -p "$run"
if [ "$data_mode" != synthetic ]; then  # that is images for measuring speed, made in memory
    if [ -z "$data_path" ]; then
        data_path=data/synthetic_faces
        # Does nothing where the same faces are there already.
        "$PYTHON" -m data.synthetic --output "$data_path" --seed 0
        set -- "--data_path=$data_path" "$@"
    fi
    "$PYTHON" -m tools.contact_sheet --data_path="$data_path" --output="$run/contact_sheet.png"
fi
bash test/train_full_1p.sh --recipe=quickstart "--run_dir=$run" --resume=auto "$@"
echo "$name" >"$run/done"
echo "report: $run/report.html"
