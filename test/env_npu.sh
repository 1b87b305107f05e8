#!/usr/bin/env bash
# Finds Ascend's CANN and sets what it, torch_npu and HCCL read from the environment: source test/env_npu.sh
# What is set already keeps its value. Where there is no CANN it says so in one line and ends with status 1.

find_cann() {
    local info=${CANN_INSTALL_INFO:-/etc/Ascend/ascend_cann_install.info} installed="" base product
    [ ! -r "$info" ] || installed=$(sed -n 's/^Install_Path=//p' "$info" | head -n 1)
    for base in "${ASCEND_HOME_PATH:-}" "$installed" /usr/local/Ascend "${HOME:-}/Ascend"; do
        for product in . .. ascend-toolkit cann nnae; do
            if [ -n "$base" ] && [ -r "$base/$product/set_env.sh" ]; then
                echo "$base/$product/set_env.sh"
                return 0
            fi
        done
    done
    return 1
}

set_up_npu() {
    local set_env strict=""
    if ! set_env=$(find_cann); then
        echo "error: no CANN found (/etc/Ascend/ascend_cann_install.info, ASCEND_HOME_PATH, /usr/local/Ascend):" \
            "install Ascend's CANN toolkit, or set ASCEND_HOME_PATH to where it is" >&2
        return 1
    fi
    case $- in *u*) strict=yes ;; esac
    set +u  # CANN's script reads variables that may not be set
    # shellcheck disable=SC1090
    source "$set_env"
    [ -z "$strict" ] || set -u

    export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
    export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}  # errors only
    export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}  # the host prepares operators beside the device
    export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-2}
    export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
    # HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT follow --dist_timeout, which has to be the longest: runtime/dist.py
    export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
    # read by the torch_npu of torch 1.8
    export COMBINED_ENABLE=${COMBINED_ENABLE:-1}
    export TRI_COMBINED_ENABLE=${TRI_COMBINED_ENABLE:-1}
    export PTCOPY_ENABLE=${PTCOPY_ENABLE:-1}
}

set_up_npu
