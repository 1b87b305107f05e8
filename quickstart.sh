#!/usr/bin/env bash
# From a fresh machine to a face network that was trained, verified on people it never saw, and reported on.
#
#   bash quickstart.sh                       drawn faces, made here
#   bash quickstart.sh --data_path=FOLDER    your own set; any other option of train.py follows the same way
#
# Leaves .venv, data/drawn_faces, checkpoints in work_space/, and the report in test/output/quickstart*/report.html.
# Run again, it shows the finished report, or goes on where an interrupted training stood.
set -eu
cd "$(dirname "$0")"
source scripts/environment.sh

data_path=data/drawn_faces
for word in "$@"; do
    case "$word" in --data_path=*|--data-path=*) data_path=${word#*=} ;; esac
done

use_environment requirements.txt

name=quickstart
if [ "$data_path" = data/drawn_faces ]; then
    # Does nothing where the same faces are there already.
    "$PYTHON" -m data.synthetic --output "$data_path" --seed 0
    set -- "--data_path=$data_path" "$@"
else
    name=quickstart_$(basename "$data_path")
fi
run=test/output/$name
mkdir -p "$run"

printf '%s\n' "$*" >"$run/options.new"
if [ -f "$run/done" ] && cmp -s "$run/options" "$run/options.new"; then
    rm "$run/options.new"
    echo "trained before with these options; remove $run to train anew"
    exec "$PYTHON" report.py "$run"
fi
resume=()
if [ -f "$run/options" ] && cmp -s "$run/options" "$run/options.new"; then
    [ -z "$(ls "work_space/$name/models/"model_*.pth 2>/dev/null)" ] || resume=(--resume=auto)
else
    rm -rf "$run" "work_space/$name"  # what other options left behind would mix with this run's numbers
    mkdir -p "$run"
    printf '%s\n' "$*" >"$run/options.new"
fi
mv "$run/options.new" "$run/options"

"$PYTHON" -m tools.contact_sheet --data_path="$data_path" --output="$run/contact_sheet.png"
bash test/train_full_1p.sh --recipe=quickstart "--run_dir=$run" "--work_path=work_space/$name" \
    ${resume[@]+"${resume[@]}"} "$@"
touch "$run/done"
echo "report: $run/report.html"
