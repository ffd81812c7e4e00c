#!/bin/sh
# Make a virtual environment with the first Python that is new enough.
#
#   scripts/setup_venv.sh .venv               PYTHON=python3.12 chooses one
set -eu
venv=$1

for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "${python:-}" ]; then
    echo 'Python 3.11 or newer is needed: install it, or set PYTHON='
    exit 1
fi

echo "Setting up $venv with $python: some minutes the first time, for torch is large"
[ ! -x "$venv/bin/pip" ] || exit 0
"$python" -m venv "$venv" || {
    rm -rf "$venv"
    echo "$python cannot make virtual environments (on Debian: apt install python3-venv)"
    exit 1
}
