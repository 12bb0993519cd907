# Shared setup of the scripts: a virtual environment with the package installed, and clear errors if that fails.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

die() { echo "error: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$candidate"; return; }
    done
    local found
    found=$(python3 --version 2>&1 || true)
    die "Python 3.11 or newer is required (found: ${found:-none}); install it, or set PYTHON=/path/to/python3.11"
}

need_space() { # megabytes
    local free
    free=$(df -Pm "$root" | awk 'NR == 2 {print $4}')
    [ "$free" -ge "$1" ] || die "$root needs $1 MB of free disk space, but has $free MB; free some space"
}

# make_environment EXTRAS: create .venv with an editable install of the package at the pinned versions
make_environment() {
    local python stamp
    python=$(find_python) || exit 1
    stamp=.venv/.installed
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$1" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then
        return
    fi
    need_space 3000
    echo "setting up .venv ($("$python" --version))"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || die "python -m venv failed; on Debian: apt install python3-venv"
    local log=.venv/install.log
    if ! .venv/bin/python -m pip install --constraint constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)" >"$log" 2>&1 ||
        ! .venv/bin/python -m pip install --constraint constraints.txt --editable ".$1" >>"$log" 2>&1; then
        tail -n 5 "$log" >&2
        grep -qiE 'connection|resolve|network|timed out|Temporary failure' "$log" && die "pip cannot reach a package index; check the network, or PIP_INDEX_URL"
        grep -qi 'No space left' "$log" && die "the disk is full; free some space"
        die "the installation failed; see $log"
    fi
    echo "$1" >"$stamp"
}
