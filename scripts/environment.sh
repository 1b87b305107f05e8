# Sourced, from the project's root, by quickstart.sh, run_tests.sh and test/legacy.sh.
#
#   find_python LOWEST HIGHEST           prints the first usable Python 3.LOWEST .. 3.HIGHEST
#   make_environment FOLDER PYTHON FILE...  a virtual environment with the requirement FILEs installed
#   use_environment FILE...              .venv of the best Python at hand; leaves its interpreter in $PYTHON

runs() {
    "$1" -c "" 2>/dev/null
}

find_python() {
    local lowest=$1 highest=$2 minor candidate
    local candidates=("${PYTHON:-}" python3)
    for ((minor = highest; minor >= lowest; minor--)); do
        candidates+=("python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python)
    done
    for candidate in "${candidates[@]}"; do
        # Run it rather than look for it: a pyenv shim exists for versions that cannot start,
        # and some distributions ship a Python that cannot make an environment.
        [ -n "$candidate" ] && "$candidate" - "$lowest" "$highest" 2>/dev/null <<'EOF' && return 0
import ensurepip, sys, venv
lowest, highest = int(sys.argv[1]), int(sys.argv[2])
if sys.version_info[0] != 3 or not lowest <= sys.version_info[1] <= highest:
    sys.exit(1)
print(sys.executable)
EOF
    done
    return 1
}

make_environment() {
    local folder=$1 python=$2
    shift 2
    local stamp=$folder/requirements.stamp file sum arguments=() sums=() site=()
    if ! runs "$folder/bin/python"; then
        # An Ascend or CUDA image brings its own torch: build on it rather than fetch another beside it.
        "$python" -c "import sys, importlib.util as u; sys.exit(u.find_spec('torch') is None)" &&
            site=(--system-site-packages)
        echo "making $folder with $python"
        "$python" -m venv --clear ${site[@]+"${site[@]}"} "$folder" || return 1
    fi
    # The stamp holds one checksum for each file that is installed, so that a second run needs no network.
    for file in "$@"; do
        sum=$(cksum "$file") || return 1
        grep -qxF "$sum" "$stamp" 2>/dev/null || { arguments+=(-r "$file"); sums+=("$sum"); }
    done
    [ "${#sums[@]}" -eq 0 ] && return 0
    echo "installing ${arguments[*]} into $folder"
    # The torch that is there stays, for torch_npu or CUDA belongs to it: pip would take the newest torchvision, and its
    # torch. One before 2.3, as an Ascend image may bring it, is built for NumPy 1.
    # shellcheck disable=SC2207  (words)
    arguments+=($("$folder/bin/python" -c "
from importlib.metadata import version
torch = version('torch').split('+')[0]
print('torch==' + torch, *['numpy<2'] * (tuple(map(int, torch.split('.')[:2])) < (2, 3)))" 2>/dev/null))
    if ! "$folder/bin/python" -m pip install --quiet "${arguments[@]}"; then
        echo "error: pip could not install ${arguments[*]} into $folder; what it wrote above says why" >&2
        return 1
    fi
    printf '%s\n' "${sums[@]}" >>"$stamp"
}

use_environment() {
    local python
    if runs .venv/bin/python; then
        python=.venv/bin/python
    elif ! python=$(find_python 9 13); then
        echo "error: no Python 3.9 to 3.13 with venv and ensurepip found; install one or set PYTHON to it" >&2
        return 1
    fi
    make_environment .venv "$python" "$@" || return 1
    PYTHON=$PWD/.venv/bin/python
    export PYTHON
}
