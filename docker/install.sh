#!/bin/sh
# Part of the image build: puts one thing more into /opt/paramesh, out of /wheels if anything is there.
#
#     install.sh wheel       Paramesh as a wheel, into /dist
#     install.sh control     what coordinator and psctl load
#     install.sh serving     and what servers load; a second argument is the index that torch is taken from
#     install.sh training    and what the examples load
#     install.sh paramesh    the wheel of /dist
set -eu
venv=/opt/paramesh
heavy="torch numpy safetensors"

if [ -n "$(ls /wheels 2>/dev/null)" ]; then
    from="--no-index --find-links /wheels"
else
    from=""
fi
# The pip of the base image, for a venv that has none: images are made to run, not to install.
pip() { python -m pip --disable-pip-version-check --no-cache-dir "$@"; }
# With bytecode: the user that runs it cannot write any, and torch without takes seconds more to import.
into() { # shellcheck disable=SC2086
    pip --python "$venv/bin/python" install -q $from "$@"
}

case $1 in
wheel) # shellcheck disable=SC2086
    pip wheel -q --no-deps $from -w /dist .
    ;;
control)
    python -m venv --without-pip "$venv"
    light=$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' pyproject.toml | tr -d ' ' |
        grep -vE "^($(echo "$heavy" | tr ' ' '|'))>")
    # shellcheck disable=SC2086
    into -c constraints.txt $light
    ;;
serving)
    if [ -z "$from" ] && [ -n "${2:-}" ]; then
        into -c constraints.txt --index-url "$2" torch
    fi
    # shellcheck disable=SC2086
    into -c constraints.txt $heavy
    ;;
training) into -c constraints.txt scikit-learn ;;
paramesh) pip --python "$venv/bin/python" install -q --no-deps --no-index /dist/*.whl ;;
*) echo "install.sh: not $1" >&2; exit 2 ;;
esac
