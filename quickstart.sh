#!/usr/bin/env bash
# From a fresh machine to a face network that was trained, verified on people it never saw, and reported on.
#
#   bash quickstart.sh                       synthetic faces, made here
#   bash quickstart.sh --data_path=FOLDER    your own set; any other option of train.py follows the same way
#   bash quickstart.sh --data_path=photos    photos as they were taken, a folder a person: they are aligned and packed,
#                                            and the model is given a threshold; the photos stay as they are
#   bash quickstart.sh --data_path=photos --pth_path=model.pth    the same from a trained network: better by far
#
# Leaves .venv, data/synthetic_faces or data/photos_*, checkpoints in work_space/, and the report in
# test/output/quickstart*/report.html (or --run_dir). Run again with the same options, it shows the finished report, or
# goes on where an interrupted training stood; other options are another run, in folders of its own.
# Environment: DET_MODEL, an ONNX detector for photos (else MTCNN).
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
from deploy.photo_set import unaligned
from runtime.log import run_command

def main():
    options = config.parse_arguments(["--recipe=quickstart", *sys.argv[1:]], recipes=RECIPES)
    ours = RECIPES["quickstart"]
    given = [v if v != getattr(ours, n) else "" for n, v in vars(options).items() if n in ("data_path", "work_path")]
    photos = "photos" if given[0] and unaligned(given[0]) else ""
    print(options.run_dir, *given, photos, options.pth_path, options.data_mode or "-", sep="\n")  # the last is never empty

run_command(main)' "$@")
{ read -r run; read -r data_path; read -r work_path; read -r photos; read -r pth_path; read -r data_mode; } <<<"$settings"

checksum() {
    cksum | cut -d " " -f 1
}

# FOLDER of photos: sets $aligned and $set. Does again only what is new.
prepare_photos() {
    local place=data/photos_$(printf '%s' "$1" | checksum) partial
    aligned=$place/aligned
    use_environment requirements.txt requirements-serve.txt
    [ ! -e "$called_from/${DET_MODEL:-}" ] || DET_MODEL=${DET_MODEL:+$called_from/$DET_MODEL}
    echo "1 of 4: the faces of $1, aligned, into $aligned"
    "$PYTHON" -m tools.align --input="$1" --output="$aligned" ${DET_MODEL:+"--det_model=$DET_MODEL"}
    set=$place/set_$(find "$aligned" -name '*.jpg' -exec cksum {} + | sort | checksum)  # of other faces, another set
    echo "2 of 4: packed into $set, one of five people apart to verify with"
    [ -e "$set" ] && return
    partial=$set.partial  # ours: a run that was interrupted left it
    rm -rf "$partial"
    "$PYTHON" -m tools.images_2_recordio --image_path="$aligned" --output_dir="$partial" --val_share=0.2
    mv "$partial" "$set"
}

name=quickstart
[ $# -eq 0 ] || name=quickstart_$(printf '%s\n' "$@" | checksum)
launcher=train_full_1p
if [ -n "$photos" ]; then
    prepare_photos "$data_path"
    name=${name}_${set##*_}
    data_path=$set
    # A small set fills no batch of 32 and needs more epochs; what was trained before needs few, at a lower rate.
    images=$("$PYTHON" -c 'import sys, data; print(len(data.open_dataset(sys.argv[1])))' "$set")
    epochs=$((9600 / images + 6))
    epochs=$((epochs < 40 ? epochs : 40))
    small=("--batch_size=$((images < 32 ? images : 32))")
    if [ -n "$pth_path" ]; then
        launcher=train_finetune_1p small+=(--is_finetune=true --lr=0.01 --lr_decay_by_part=0.5 --epochs=5 --milestones=3)
    else
        small+=("--epochs=$epochs" "--milestones=$((epochs * 2 / 3)),$((epochs * 5 / 6))")
    fi
    set -- "${small[@]}" --val_targets=val "$@" "--data_path=$set"
fi
run=${run:-test/output/$name}
if [ "$(cat "$run/done" 2>/dev/null)" = "$name" ]; then
    echo "trained before with these options; remove $run and ${work_path:-work_space/$name} to train anew"
    exec "$PYTHON" report.py "$run"
fi
work_path=${work_path:-work_space/$name}
set -- "--work_path=$work_path" "$@"
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
[ -z "$photos" ] || echo "3 of 4: training, ${pth_path:+from $pth_path, }on $images images"
bash test/$launcher.sh --recipe=quickstart "--run_dir=$run" --resume=auto "$@"
if [ -n "$photos" ]; then
    echo "4 of 4: a threshold, from the people apart"
    "$PYTHON" -m tools.calibrate --model="$work_path/models" --pairs="$aligned" --people="$set/val_people.txt" \
        --far 0.001 0.01 0.05 ||
        echo "not calibrated (the line above says why): the model keeps the threshold of its verification"
    [ -n "$pth_path" ] || echo "a network that saw only these people knows few faces: --pth_path=WEIGHTS starts from a trained one"
    echo "to use it: python -m deploy.server --model $work_path/models"
fi
echo "$name" >"$run/done"
echo "report: $run/report.html"
