#!/usr/bin/env bash
# What image builds need where no registry of images can be reached, made once and kept in a cache.
#
#     images.sh base DIR          DIR/base.tar: Debian with Python 3.11, pip and tini, in place of python:3.11-slim
#     images.sh etcd DIR          DIR/etcd.tar: Debian with etcd, in place of an etcd image
#     images.sh wheelhouse DIR    DIR/wheels-...: the wheels of everything in constraints.txt that an image holds
#
# Each prints the path of what it made, or found.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,8p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")/../.." && pwd)
what=$1
mkdir -p "$2"
D=$(realpath "$2")

root() { # NAME PACKAGES: a tar of a Debian root with these packages
    local tar=$D/$1.tar
    if [ ! -s "$tar" ]; then
        command -v mmdebstrap >/dev/null || (apt-get -qq update && apt-get -qq install -y mmdebstrap) >&2
        local mirror
        mirror=$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null || true)
        mmdebstrap --quiet --variant=minbase --include="$2" \
            --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
            --dpkgopt='path-exclude=/usr/share/locale/*' \
            --customize-hook='rm -rf "$1"/etc/apt/sources.list* "$1"/etc/resolv.conf "$1"/etc/hostname' \
            --customize-hook='rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED' \
            --customize-hook='[ ! -e "$1"/usr/bin/python3 ] || ln -sf python3 "$1"/usr/bin/python' \
            bookworm "$D/part-$1.tar" $mirror >&2
        mv "$D/part-$1.tar" "$tar"
    fi
    echo "$tar"
}

wheelhouse() {
    # Named by what it is made from: another constraints.txt makes another one.
    local key wheels
    key=$(cat "$here/constraints.txt" "$here/pyproject.toml" | sha256sum | cut -c1-12)
    wheels=$D/wheels-$key
    if [ ! -d "$wheels" ]; then
        local python=$here/.venv/bin/python part=$wheels.part
        rm -rf "$part" "$D"/wheels-*
        # torch by its name first, as `make install` does: what else asks for it finds it then.
        "$python" -m pip download -q --no-deps -d "$part" -c "$here/constraints.txt" torch >&2
        "$python" -m pip download -q --find-links "$part" -d "$part" -c "$here/constraints.txt" \
            $(sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' "$here/pyproject.toml" | tr -d ' ') \
            scikit-learn hatchling editables >&2
        mv "$part" "$wheels"
    fi
    echo "$wheels"
}

case $what in
base) root base "python3,python3-venv,python3-pip,tini,ca-certificates,media-types" ;;
etcd) root etcd "etcd-server" ;;
wheelhouse) wheelhouse ;;
*) echo "images.sh: base, etcd or wheelhouse, not $what" >&2; exit 2 ;;
esac
