# What the launchers beside this file share: each sources it, in bash 3.2 or newer, and says
#
#   launch PROGRAM RANKS RECIPE BATCH_PER_RANK "$@"
#
# Options: --device_type=npu|cuda|gpu|cpu (else the first of npu, cuda, cpu that is there), --device_id= of the first
# rank, --data_path=, --pth_path=, and every other option of config.py in either spelling. They win over the recipe.
# Environment: RANK_SIZE ranks on this machine (1p launchers: always 1); NNODES NODE_RANK MASTER_ADDR MASTER_PORT for
# several machines; MAX_RESTARTS how often torchrun starts all ranks again after one died (0; give --resume=auto,
# --checkpoint=sharded and --save_every with it); OMP_NUM_THREADS threads of a rank (else its share of the cores);
# PYTHON the interpreter.
# Leaves metrics.jsonl, rank_N.log and the report in test/output/RUN/ or --run_dir. Ends with the status of the rank
# that failed first.
set -u
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
    echo "error: $*" >&2
    exit 1
}

launch() {
    local program=$1 ranks=$2 recipe=$3 batch_per_rank=$4
    shift 4
    [ "$ranks" -eq 1 ] || ranks=${RANK_SIZE:-$ranks}
    local nodes=${NNODES:-1} node=${NODE_RANK:-0}
    need_number RANK_SIZE "$ranks" 1
    need_number NNODES "$nodes" 1
    need_number NODE_RANK "$node" 0
    need_number MAX_RESTARTS "${MAX_RESTARTS:-0}" 0
    need_number MASTER_PORT "${MASTER_PORT:-29500}" 1 65535
    [ "$node" -lt "$nodes" ] || fail "NODE_RANK=$node does not exist among NNODES=$nodes machines; they count from 0"
    [ "$nodes" -eq 1 ] || [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$nodes needs MASTER_ADDR, the address of machine 0"
    choose_python
    # A recent torch loads torch_npu at `import torch`, and ends in a traceback where CANN is missing.
    export TORCH_DEVICE_BACKEND_AUTOLOAD=0

    case " $* " in
    *" --help "* | *" -h "*) exec "$PYTHON" "$program" --help ;;
    *" --list_configs "*) exec "$PYTHON" "$program" --list_configs ;;
    *" --recipe"* | *" --config"*) ;;
    *) [ -z "$recipe" ] || set -- "--recipe=$recipe" "--batch_size=$((batch_per_rank * ranks * nodes))" "$@" ;;
    esac
    find_paths "$@"
    set -- ${with_paths[@]+"${with_paths[@]}"}  # bash 4.3 takes an empty array for unset
    # Before anything starts: an option that does not exist, a device that is not there, more ranks than devices.
    local settings device_type device_id run_dir cores
    settings=$("$PYTHON" -c "$READ_OPTIONS" "$program" $((ranks * nodes)) "$@") || exit
    { read -r device_type; read -r device_id; read -r cores; read -r run_dir; } <<<"$settings"
    set_npu_environment "$device_type"
    # Alone, and free to take what is there, a rank finds its device without being told.
    if [ "$device_type" != cpu ] && { [ "$ranks" -gt 1 ] || [ "$device_type" != auto ]; }; then
        "$PYTHON" -m runtime.device "$device_type" --index="$device_id" --ranks="$ranks" >/dev/null || exit
    fi

    [ -n "$run_dir" ] || run_dir=$(new_run_dir) || exit
    mkdir -p "$run_dir" || exit
    state=$(mktemp -d) || exit
    trap 'rm -rf "$state"' EXIT
    local share=$((cores / ranks))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 1 ? share : 1))}
    # A rank's output goes through tee, which is no terminal: its progress bar goes to this one.
    [ ! -t 2 ] || PROGRESS_TERMINAL=$(tty <&2) && export PROGRESS_TERMINAL
    echo "$(basename "$0"): $((ranks * nodes)) rank(s), output in $run_dir"
    set -- bash test/common.sh one_rank "$run_dir" "$state" "$PYTHON" "$program" "$@" "--run_dir=$run_dir"
    if [ $((ranks * nodes)) -eq 1 ]; then
        unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
        supervise "$@"
    else
        set -- --no_python --nnodes="$nodes" --node_rank="$node" --nproc_per_node="$ranks" \
            --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$(master_port "$nodes")" "$@"
        # shellcheck disable=SC2046  (words)
        supervise "$PYTHON" -m $(starter) "$@" 2>"$run_dir/launcher.log"
    fi
    local status=$?
    end_stragglers
    explain_failure "$status" "$run_dir" $((node * ranks))
    [ "$node" -eq 0 ] || echo "the ranks of machine $node are done; machine 0 has the report"
}

# The options that a launcher itself acts on, one a line; ends with config.py's own line for a wrong one.
READ_OPTIONS='
import contextlib
import io
import sys
import config
import configs
from runtime.host import allowed_cores
from runtime.log import run_command, run_folder

def main():
    with contextlib.redirect_stderr(io.StringIO()):  # its notes come from the program itself
        argv, recipes = configs.take_config(sys.argv[3:], int(sys.argv[2]))
    training = sys.argv[1] == "train.py"
    options = config.parse_arguments(argv, training=training, recipes=recipes)
    folder = run_folder(options.work_path, bool(options.resume)) if training and options.output else ""
    print(options.device_type, options.device_id, len(allowed_cores()), options.run_dir or folder, sep="\n")

run_command(main)
'

need_number() {  # NAME VALUE LOWEST [HIGHEST]
    case "$2" in
    "" | *[!0-9]* | 0?* | ??????????*) fail "$1='$2' is not a number such as 8" ;;
    esac
    [ "$2" -ge "$3" ] || fail "$1=$2: must be at least $3"
    [ "$2" -le "${4:-$2}" ] || fail "$1=$2: must be at most $4"
}

choose_python() {
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=python3
        [ ! -x .venv/bin/python ] || PYTHON=$PWD/.venv/bin/python
    fi
    "$PYTHON" -c "" 2>/dev/null || fail "no Python at '$PYTHON': bash quickstart.sh makes .venv, or set PYTHON"
}

# Sets with_paths to the options, each file or folder that lies where the caller stood by its whole path: from here on
# the root is the current folder. What is not there is looked for under the root, as from ./data/faces_emore; a folder
# that is yet to be made is made where the caller stood.
find_paths() {
    local word option="" value
    with_paths=("$@")
    [ "$called_from" != "$PWD" ] || return 0
    with_paths=()
    for word in "$@"; do
        case "$word" in
        --*=*) option=${word%%=*} value=${word#*=} ;;
        --*) option=$word value="" ;;
        *) value=$word ;;
        esac
        case "$value" in
        "" | /*) ;;
        *)
            case "$option" in
            --output | --run[_-]dir | --work[_-]path)
                [ -e "$value" ] && [ ! -e "$called_from/$value" ] || word=${word%"$value"}$called_from/$value ;;
            --*path | --rec | --data[_-]dir | --resume | --plugin)
                [ ! -e "$called_from/$value" ] || word=${word%"$value"}$called_from/$value ;;
            esac ;;
        esac
        with_paths+=("$word")
    done
}

set_npu_environment() {  # DEVICE_TYPE
    case "$1" in
    npu*) ;;
    auto) "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('torch_npu'))" || return 0 ;;
    *) return 0 ;;
    esac
    # Where there is no CANN the program says so when it opens the device.
    source test/env_npu.sh 2>/dev/null
}

new_run_dir() {
    local name n=1 folder
    name=$(basename "$0" .sh)_$(date +%Y%m%d-%H%M%S)
    mkdir -p test/output || return
    folder=test/output/$name
    until mkdir "$folder" 2>/dev/null; do  # another run may have started in the same second
        n=$((n + 1))
        [ "$n" -lt 100 ] || fail "test/output/ cannot be written to"
        folder=test/output/$name.$n
    done
    echo "$folder"
}

master_port() {  # NODES: machines agree on a fixed port, runs on one machine must not
    if [ -n "${MASTER_PORT:-}" ]; then
        echo "$MASTER_PORT"
    elif [ "$1" -gt 1 ]; then
        echo 29500
    else
        "$PYTHON" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
    fi
}

starter() {  # torch.distributed.run, and before torch 1.9 its forerunner
    "$PYTHON" -c "
import importlib.util, os
folder = os.path.join(importlib.util.find_spec('torch').submodule_search_locations[0], 'distributed')
new = os.path.exists(os.path.join(folder, 'run.py'))
print('torch.distributed.run --max_restarts=${MAX_RESTARTS:-0}' if new else 'torch.distributed.launch --use_env')"
}

# Runs COMMAND..., hands signals on to it, and returns its status.
supervise() {
    local child status
    set -m  # a process group of its own: Ctrl-C reaches it once, through here, and does not end what writes the log
    "$@" &
    child=$!
    set +m
    trap 'kill -INT "$child" 2>/dev/null' INT
    trap 'kill -TERM "$child" 2>/dev/null' TERM HUP
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ended the wait, not the child
        wait "$child"
        status=$?
    done
    trap - INT TERM HUP
    return $status
}

# What the starter runs on each rank: COMMAND... with its output in rank_N.log, the first rank's on the screen too.
one_rank() {
    local folder=$1 state=$2 rank=${RANK:-0} status screen=""
    shift 2
    if [ "${LOCAL_RANK:-0}" -eq 0 ]; then
        local pipe=$state/screen.$$
        mkfifo "$pipe" || exit
        # what writes the log outlives the signals that the rank, or its whole group, gets
        (trap "" INT TERM HUP; exec tee -a "$folder/rank_$rank.log" <"$pipe") &
        screen=$!
        exec >"$pipe" 2>&1
        rm "$pipe"
    else
        exec >>"$folder/rank_$rank.log" 2>&1
    fi
    supervise as_rank "$state/$rank.pid" "$@"
    status=$?
    rm -f "$state/$rank.pid"
    [ "$status" -eq 0 ] || echo "$rank $status" >>"$state/failed"
    exec >&- 2>&-
    [ -z "$screen" ] || wait "$screen"
    exit "$status"
}

as_rank() {  # PID_FILE COMMAND...
    # bash 3.2 does not tell a subshell its own number, but sh does
    exec sh -c 'echo $$ >"$0" && exec "$@"' "$@"
}

# The starter kills those that do not leave in time, but only the shell around a rank.
end_stragglers() {
    local file
    for file in "$state"/*.pid; do
        [ ! -e "$file" ] || kill -KILL "$(cat "$file")" 2>/dev/null
    done
}

explain_failure() {  # STATUS RUN_DIR FIRST_RANK: returns only where every rank ended well
    local rank status log
    [ "$1" -ne 0 ] || return 0  # a rank that failed before a restart is no failure
    if read -r rank status 2>/dev/null <"$state/failed"; then
        log=$2/rank_$rank.log
        if grep -qxF -e "$(tail -n 1 "$log")" "$2/rank_$3.log"; then  # it stands on the screen already
            echo "rank $rank ended with status $status; its output is in $log" >&2
            exit "$status"
        fi
        echo "error: rank $rank ended with status $status; the end of $log:" >&2
    else
        status=$1 log=$2/launcher.log
        echo "error: the ranks could not be started (status $status); the end of $log:" >&2
    fi
    [ ! -e "$log" ] || tail -n 15 "$log" >&2
    exit "$status"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then  # the starter runs `bash test/common.sh one_rank ...`
    "$@"
fi
