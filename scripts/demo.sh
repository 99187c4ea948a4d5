#!/bin/bash
# Makes five machines out of this one, brings up a cluster of three servers and two nodes on them, and cuts the power of
# the server that leads, and then of a node; or takes all of it away.
#
# usage: scripts/demo.sh up|down
#   SEAWALL_BIN   a binary to use instead of building one
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/steps.sh

lab=demo
labs=/var/lib/seawall-lab
manifest=examples/web.yaml
binary="${SEAWALL_BIN:-$PWD/target/release/seawall}"

export PATH="$PWD/.venv/bin:$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"
export SEAWALL_LAB=$lab SEAWALL_LAB_DIR=$labs
export KUBECONFIG=$labs/$lab/kubeconfig

seawall() { "$binary" --log warn "$@"; }

on_exit() {
    local code=$?
    [ -n "${scratch:-}" ] && rm -rf "$scratch"
    if [ $code != 0 ] && [ -n "$current" ]; then
        printf '\n%sThe demo failed at: %s%s\n' "$red" "$current" "$plain" >&2
        if [ -d $labs/$lab ]; then
            printf '  the machines are left for a look:  SEAWALL_LAB=%s %s lab status\n' "$lab" "$binary" >&2
            printf '  to take them away:  make demo-down\n' >&2
        fi
    fi
}

down() {
    [ "$(id -u)" = 0 ] || fail "root is needed: run  sudo make demo-down"
    [ -d $labs/$lab ] || { note "nothing is there"; return; }
    [ -x "$binary" ] || fail "$binary is missing, and it is what cleans up: run  make build  first"
    title "Taking the machines away"
    seawall lab down 2>&1 | sed 's/^/   /'
}

fetch() { curl -fsS --max-time 5 --noproxy '*' "http://$1/"; }

up() {
    local started
    started=$(now)
    trap on_exit EXIT
    trap 'exit 130' INT TERM

    step "Install what is needed"
    scripts/setup.sh
    saw "packages, kubectl $(kubectl version --client -o json | sed -n 's/.*"gitVersion": "\(.*\)".*/\1/p'), $(cargo --version 2>/dev/null | cut -d' ' -f1-2), etcd $(etcd --version | sed -n 's/^etcd Version: //p')"

    if [ -z "${SEAWALL_BIN:-}" ]; then
        step "Build"
        cargo build --release --locked -p seawall
        saw "$("$binary" --version), $(du -h "$binary" | cut -f1)"
    fi

    step "Boot five machines: three servers with etcd, two nodes"
    # What an earlier demo left is of an older binary, or half gone.
    [ ! -d $labs/$lab ] || seawall lab down 2>&1 | sed 's/^/   /'
    seawall lab up --servers 3 --agents 2 2>&1 | sed -u 's/^/   /'
    show kubectl get nodes -o wide
    show kubectl get endpoints kubernetes
    saw "$(kubectl get nodes --no-headers | grep -c ' Ready ') of 5 machines are Ready"

    step "Make an image, without a registry, and apply $manifest"
    scratch="$(mktemp -d)"
    # The first process of a container ignores signals that it does not handle; this one ends at once when told to.
    local serve='trap "exit 0" TERM; echo "$POD_NAME serves"; httpd -f -v -p 8080 -h /www & wait $!'
    echo "Hello from Seawall, v1" >"$scratch/index.html"
    seawall image build --busybox -t seawall.local/web:v1 --copy "$scratch:/www" --output "$scratch/web.tar" -- sh -c "$serve"
    seawall lab import "$scratch/web.tar" a1 a2 >/dev/null 2>&1
    show kubectl apply -f $manifest
    show kubectl rollout status deployment/web --timeout=120s
    show kubectl get pods -l app=web -o wide
    local node_ip
    node_ip="$(kubectl get node a1 -o jsonpath='{.status.addresses[?(@.type=="InternalIP")].address}')"
    wait_for 5 "an answer from $node_ip:30080" fetch "$node_ip:30080"
    note "$node_ip:30080: $(fetch "$node_ip:30080")"
    saw "3 of 3 pods are Ready on two machines, and answer"

    step "Who leads"
    show kubectl get lease -n kube-system
    show seawall lab shell s1 -- seawall --log warn member list
    saw "controllers and scheduler: $(kubectl get lease -n kube-system kube-controller-manager -o jsonpath='{.spec.holderIdentity}' | cut -d_ -f1)"

    step "Cut the power of the server that leads etcd and the controllers, while clients read, write and watch"
    "$binary" --log error drill power-off-etcd-leader --lab $lab 2>&1 | tee "$scratch/report" | sed -u 's/^/   /' ||
        fail "what must hold did not hold; the report is above"
    felt() { sed -n "s/^ *$1  *\([0-9.]* s\).*/\1/p" "$scratch/report" | head -1; }
    saw "felt at most: reads $(felt 'read, a1 by its balancer'), writes $(felt 'write, a1 by its balancer'), controllers $(felt controllers), the web $(felt 'workload, a1')"

    step "Cut the power of a node, with a web and a stateful pod on it, while clients connect, talk and wait"
    "$binary" --log error drill node-power-off --lab $lab 2>&1 | tee "$scratch/nodes" | sed -u 's/^/   /' ||
        fail "what must hold did not hold; the report is above"
    cost() { sed -n "s/^ *$1  *\([0-9.]* s\).*/\1/p" "$scratch/nodes" | head -1; }
    saw "noticed in $(cost 'not ready, a2'); new connections failed for $(cost 'new connections fail, host a1, nftables'), by the relay for $(cost 'new connections fail, host a1, relay'); replaced in $(cost 'web replaced'), the stateful pod in $(cost 'stateful replaced')"

    step "The web goes on, and the machine is back"
    note "$node_ip:30080: $(fetch "$node_ip:30080")"
    show kubectl get endpoints kubernetes
    show kubectl get lease -n kube-system
    saw "$(kubectl get lease -n kube-system kube-controller-manager -o jsonpath='{.spec.holderIdentity}' | cut -d_ -f1) leads now"

    table "$started"
    title "The machines stay up. To use them:"
    printf '   export KUBECONFIG=%s SEAWALL_LAB=%s PATH=%s/.venv/bin:%s:$PATH\n' "$KUBECONFIG" "$lab" "$PWD" "$(dirname "$binary")"
    printf '   kubectl get pods -A -o wide\n   curl http://%s:30080/\n' "$node_ip"
    printf '   seawall lab power-off s2      (and power-on; freeze, thaw, partition, heal …)\n'
    printf '   seawall drill list             (and all, or one of them: what clients feel)\n'
    printf '   make demo-down                (takes everything away)\n'
}

case "${1:-}" in
    up) up ;;
    down) down ;;
    *) fail "usage: scripts/demo.sh up|down" ;;
esac
