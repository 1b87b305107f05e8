#!/bin/sh
# MS1MV3 with FresResNet50 on 8 devices, dynamic mode (eager). FresResNet100: CONFIG=ms1mv3_r100; MobileFaceNet_128:
# CONFIG=ms1mv3_mobileface. Edit what differs, or append options: sh scripts/train_dynamic.sh --sample_ratio 1.0
cd "$(dirname "$0")/.." || exit 1
[ -n "$PYTHON" ] || [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
: "${PYTHON:=python3}" "${CONFIG:=ms1mv3_r50}" "${GPUS:=0,1,2,3,4,5,6,7}"

exec "$PYTHON" -m plsc.launch --gpus="$GPUS" --log_dir="${LOG_DIR:-log}" tools/train.py \
    --config_file "configs/$CONFIG.py" \
    --is_static False \
    --sample_ratio 0.1 \
    --loss ArcFace \
    --fp16 True \
    --init_loss_scaling 27648.0 \
    --lr 0.1 \
    --lr_decay 0.1 \
    --weight_decay 5e-4 \
    --momentum 0.9 \
    --train_unit epoch \
    --warmup_num 0 \
    --train_num 25 \
    --decay_boundaries 10,16,22 \
    --data_dir MS1M_v3 \
    --num_classes 93431 \
    --batch_size 128 \
    --val_targets lfw,cfp_fp,agedb_30 \
    --log_interval_step 100 \
    --max_num_last_checkpoint 1 \
    --output "MS1M_v3_arcface_dynamic_128_fp16_0.1" "$@"
