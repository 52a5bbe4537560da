#!/usr/bin/env bash
# A private Docker engine out of Debian's packages: for a machine with root but no engine, no systemd and no registry.
#
#     engine.sh up DIR       starts it and prints the variables to export; about 10 s, 30 s the first time
#     engine.sh down DIR     ends it; what it built stays in DIR for the next time
#
# It leaves the host's network rules alone: builds use the host's network, and containers have no way out.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,7p' "$0"; exit 2; }
cmd=$1
D=$(realpath -m "$2")
mkdir -p "$D"

fetch() {
    # trixie's engine (26.1; bookworm's 20.10 has no BuildKit by default), unpacked beside the system and not installed.
    local uri
    uri=$(awk '/^URIs:/{print $2; exit} /^deb /{for(i=2;i<=NF;i++) if($i ~ /:\/\//){print $i; exit}}' \
        /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null)
    mkdir -p "$D"/{debs,root,state/lists/partial,cache/archives/partial,config/cli-plugins}
    cd "$D/debs"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri trixie main" >"$D/trixie.list"
    local own=(-o Dir::Etc::sourcelist="$D/trixie.list" -o Dir::Etc::sourceparts=- -o Dir::State="$D/state"
        -o Dir::Cache="$D/cache" -o APT::Sandbox::User=root)
    apt-get "${own[@]}" -qq update
    apt-get "${own[@]}" -qq download docker.io docker-cli docker-compose docker-buildx containerd tini
    # The host's own runc where there is one: trixie's needs a newer libc than bookworm has.
    apt-cache show runc >/dev/null 2>&1 || apt-get -qq update
    apt-get -o APT::Sandbox::User=root -qq download runc
    for deb in *.deb; do dpkg -x "$deb" "$D/root"; done
    ln -sf "$D"/root/usr/libexec/docker/cli-plugins/* "$D/config/cli-plugins/"
    touch "$D/root/.complete"
}

alive() { "$D/root/usr/bin/docker" -H "unix://$D/docker.sock" info >/dev/null 2>&1; }

down() {
    [ -f "$D/pid" ] || return 0
    local pid
    pid=$(cat "$D/pid")
    # The pid may be another process's by now: this file outlives the machine's processes.
    if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q "^$D/root/usr/sbin/dockerd"; then
        kill "$pid"
        for _ in $(seq 300); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
    fi
    rm -f "$D/pid"
}

case $cmd in
down) down ;;
up)
    [ -e "$D/root/.complete" ] || { rm -rf "$D/debs" "$D/root"; (fetch) >&2; }
    # Docker's own DNS needs it, inside the containers' namespaces.
    command -v iptables >/dev/null || (apt-get -qq update && apt-get -qq install -y iptables) >&2
    export PATH="$D/root/usr/sbin:$D/root/usr/bin:$PATH"
    if ! alive; then
        down
        # An engine that was killed leaves its mounts (namespaces of containers) and its socket.
        awk -v own="$D/exec/" 'index($2, own) == 1 {print $2}' /proc/mounts | xargs -r umount -l
        rm -rf "$D/exec" "$D/docker.sock"
        setsid "$D/root/usr/sbin/dockerd" --iptables=false --ip6tables=false --bridge=none --data-root "$D/data" \
            --exec-root "$D/exec" -H "unix://$D/docker.sock" -p "$D/pid" \
            --default-ulimit "nofile=$(ulimit -Hn):$(ulimit -Hn)" >"$D/dockerd.log" 2>&1 </dev/null &
        for _ in $(seq 300); do alive && break; sleep 0.1; done
        alive || { tail -20 "$D/dockerd.log" >&2; echo "engine.sh: the engine did not come up" >&2; exit 1; }
    fi
    echo "export DOCKER_HOST=unix://$D/docker.sock DOCKER_CONFIG=$D/config PATH=$D/root/usr/bin:\$PATH"
    ;;
*) echo "engine.sh: up or down, not $cmd" >&2; exit 2 ;;
esac
