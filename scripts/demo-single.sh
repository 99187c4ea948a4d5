#!/bin/bash
# Starts a cluster on this machine and shows what it does, or takes it away.
#
# usage: scripts/demo-single.sh up|down
#   SEAWALL_BIN   a binary to use instead of building one
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/steps.sh

data=/var/lib/seawall
run=/run/seawall
log=/var/log/seawall.log
pid_file=/run/seawall.pid
containerd=$run/containerd/containerd.sock
manifest=examples/web.yaml
binary="${SEAWALL_BIN:-$PWD/target/release/seawall}"

export PATH="$PWD/.venv/bin:$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"
export KUBECONFIG=$data/admin.kubeconfig

watchers=()
stop_watchers() {
    [ ${#watchers[@]} -eq 0 ] || kill "${watchers[@]}" 2>/dev/null || true
    watchers=()
}
# Shows how pods come and go until the step is over.
watch_pods() {
    stdbuf -oL kubectl get pods -l app=web --watch-only --no-headers 2>/dev/null |
        stdbuf -oL uniq | stdbuf -oL sed "s/^/   $dim/; s/\$/$plain/" &
    watchers+=("$(pgrep -P $$ -n -f 'get pods -l app=web' || true)" $!)
}

on_exit() {
    local code=$?
    stop_watchers
    [ -n "${asker:-}" ] && kill "$asker" 2>/dev/null || true
    [ -n "${scratch:-}" ] && rm -rf "$scratch"
    if [ $code != 0 ] && [ -n "$current" ]; then
        printf '\n%sThe demo failed at: %s%s\n' "$red" "$current" "$plain" >&2
        [ -n "$started_server" ] || exit $code
        printf '  the server'\''s log: %s; its last lines:\n' "$log" >&2
        tail -n 15 "$log" 2>/dev/null | sed 's/^/    /' >&2
        printf '  the cluster, if it is up:  export KUBECONFIG=%s PATH=%s/.venv/bin:$PATH\n' "$KUBECONFIG" "$PWD" >&2
        printf '  to take it away:  make demo-single-down\n' >&2
    fi
}

# --- The server ------------------------------------------------------------------------------------------------------

# The pid of the demo's server, if it runs.
server_pid() {
    local pid
    pid="$(cat $pid_file 2>/dev/null)" || return 1
    # The shell opens the file, and complains itself when the process is gone.
    [[ "$({ tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null)" == *"seawall server"*"--data-dir $data"* ]] || return 1
    echo "$pid"
}

stop_server() {
    local pid
    pid="$(server_pid)" || return 0
    note "stopping the server (process $pid)"
    kill "$pid"
    for _ in $(seq 150); do
        [ -d "/proc/$pid" ] || break
        sleep 0.1
    done
    [ ! -d "/proc/$pid" ] || kill -9 "$pid"
    rm -f $pid_file
}

start_server() {
    local pid
    setsid "$binary" server --data-dir $data --run-dir $run </dev/null >>$log 2>&1 &
    pid=$!
    echo $pid >$pid_file
    disown
    for _ in $(seq 600); do
        [ -d "/proc/$pid" ] || fail "the server ended at once; its log ($log) says:" "$(tail -n 5 $log)"
        if [ -f $KUBECONFIG ] && kubectl get --raw /readyz >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    fail "the server is not ready after a minute; see $log"
}

down() {
    [ "$(id -u)" = 0 ] || fail "root is needed: run  sudo make demo-single-down"
    if [ ! -x "$binary" ]; then
        [ -d $data ] || [ -d $run ] || { note "nothing is there"; return; }
        fail "$binary is missing, and it is what cleans up: run  make build  first"
    fi
    title "Taking the cluster away"
    stop_server
    "$binary" --log warn clean --data --data-dir $data --run-dir $run
    rm -f $log
    note "pods, containerd, mounts, network, rules and data are gone"
}

# --- Asking the service ----------------------------------------------------------------------------------------------

fetch() { curl -fsS --max-time 5 --noproxy '*' "http://$1/"; }

# Asks an address again and again, and writes down each answer: the page, or FAILED and why.
ask() {
    local answer
    for _ in $(seq 5000); do
        answer="$(fetch "$1" 2>&1)" && echo "$answer" || echo "FAILED $answer"
        sleep 0.01
    done
}

# --- The demo --------------------------------------------------------------------------------------------------------

up() {
    local started
    started=$(now)
    trap on_exit EXIT
    # Interrupted is failed.
    trap 'exit 130' INT TERM

    step "Install what is needed"
    scripts/setup.sh
    saw "packages, kubectl $(kubectl version --client -o json | sed -n 's/.*"gitVersion": "\(.*\)".*/\1/p'), $(cargo --version 2>/dev/null | cut -d' ' -f1-2)"

    if [ -z "${SEAWALL_BIN:-}" ]; then
        step "Build"
        cargo build --release --locked -p seawall
        saw "$("$binary" --version), $(du -h "$binary" | cut -f1)"
    fi

    step "Start the server"
    started_server=yes
    local pid=''
    if pid="$(server_pid)"; then
        if [ "/proc/$pid/exe" -ef "$binary" ]; then
            kubectl get --raw /readyz >/dev/null
            saw "runs already, process $pid"
        else
            note "it runs an older binary: it is started again, its pods live on"
            stop_server
            start_server
            saw "/readyz says ok, process $(cat $pid_file)"
        fi
    else
        start_server
        saw "/readyz says ok, process $(cat $pid_file)"
    fi

    step "The node becomes Ready"
    a_node() { [ -n "$(kubectl get nodes -o name)" ]; }
    wait_for 30 "the node agent registers this machine" a_node
    show kubectl wait --for=condition=Ready node --all --timeout=60s
    show kubectl get nodes -o wide
    saw "$(kubectl get nodes -o jsonpath='{.items[0].metadata.name}: {.items[0].status.capacity.cpu} CPUs, {.items[0].status.capacity.memory}, {.items[0].status.nodeInfo.containerRuntimeVersion}')"
    node_ip="$(kubectl get nodes -o jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}')"

    step "Make the images, without a registry"
    scratch="$(mktemp -d)"
    # The first process of a container ignores signals that it does not handle; this one ends at once when told to.
    local serve='trap "exit 0" TERM; echo "$POD_NAME serves"; httpd -f -v -p 8080 -h /www & wait $!'
    for version in v1 v2; do
        mkdir -p "$scratch/$version"
        echo "Hello from Seawall, $version" >"$scratch/$version/index.html"
        note "seawall.local/web:$version from Debian's busybox"
        "$binary" --log warn image build --busybox -t "seawall.local/web:$version" --copy "$scratch/$version:/www" \
            --socket $containerd -- sh -c "$serve"
    done
    saw "seawall.local/web:v1 and v2 are in containerd"

    step "Apply $manifest: a Deployment of 3 and a Service"
    kubectl delete -f $manifest --ignore-not-found --wait --timeout=60s >/dev/null
    kubectl wait --for=delete pod -l app=web --timeout=60s >/dev/null 2>&1 || true
    watch_pods
    show kubectl apply -f $manifest
    show kubectl rollout status deployment/web --timeout=120s
    stop_watchers
    show kubectl get pods -l app=web -o wide
    three_endpoints() {
        [ "$(kubectl get endpointslices -l kubernetes.io/service-name=web -o jsonpath='{.items[*].endpoints[*].conditions.ready}')" = "true true true" ]
    }
    wait_for 30 "the Service has three ready endpoints" three_endpoints
    show kubectl get endpointslices -l kubernetes.io/service-name=web
    saw "3 of 3 pods are Ready, 3 endpoints"

    step "Fetch the page"
    local cluster_ip node_port
    cluster_ip="$(kubectl get service web -o jsonpath='{.spec.clusterIP}')"
    node_port="$(kubectl get service web -o jsonpath='{.spec.ports[0].nodePort}')"
    show kubectl get service web
    # The rules follow the endpoints within milliseconds, but not within none.
    wait_for 5 "an answer from the ClusterIP $cluster_ip" fetch "$cluster_ip"
    note "ClusterIP $cluster_ip: $(fetch "$cluster_ip")"
    note "NodePort $node_ip:$node_port: $(fetch "$node_ip:$node_port")"
    saw "by ClusterIP $cluster_ip and by NodePort $node_port"

    step "Scale to 5"
    watch_pods
    show kubectl scale deployment/web --replicas=5
    show kubectl rollout status deployment/web --timeout=120s
    stop_watchers
    saw "$(kubectl get deployment web -o jsonpath='{.status.readyReplicas}') of 5 are Ready"

    step "Rolling update to v2, while a client keeps asking"
    ask "$cluster_ip" >"$scratch/answers" &
    asker=$!
    watch_pods
    show kubectl set image deployment/web web=seawall.local/web:v2
    show kubectl rollout status deployment/web --timeout=180s
    stop_watchers
    # The old pods serve on until they are gone.
    five_pods() { [ "$(kubectl get pods -l app=web -o name | wc -l)" = 5 ]; }
    wait_for 60 "the old pods are gone" five_pods
    kill $asker
    wait $asker 2>/dev/null || true
    asker=''
    local old new failed
    old=$(grep -c 'v1$' "$scratch/answers" || true)
    new=$(grep -c 'v2$' "$scratch/answers" || true)
    failed=$(grep -c '^FAILED' "$scratch/answers" || true)
    note "answers: $old of v1, then $new of v2; failed: $failed"
    [ "$failed" = 0 ] || fail "$failed requests failed during the rolling update:" "$(grep '^FAILED' "$scratch/answers" | sort | uniq -c)"
    [ "$old" -gt 0 ] && [ "$new" -gt 0 ] || fail "the client did not see both versions"
    [ "$(fetch "$cluster_ip")" = "Hello from Seawall, v2" ] || fail "the page is not the new one"
    saw "$((old + new)) requests, 0 failed"

    step "Kill a container: it is restarted"
    local pod id
    pod="$(kubectl get pods -l app=web -o jsonpath='{.items[0].metadata.name}')"
    id="$(kubectl get pod "$pod" -o jsonpath='{.status.containerStatuses[0].containerID}')"
    show ctr --address $containerd --namespace k8s.io tasks kill --signal SIGKILL "${id#containerd://}"
    kubectl wait --for='jsonpath={.status.containerStatuses[0].restartCount}=1' "pod/$pod" --timeout=60s >/dev/null
    kubectl wait --for=condition=Ready "pod/$pod" --timeout=60s >/dev/null
    show kubectl get pod "$pod"
    saw "$pod runs again, after 1 restart"

    step "Delete a pod: it is replaced"
    kubectl get pods -l app=web -o name | sort >"$scratch/before"
    show kubectl delete pod "$pod" --wait=false
    kubectl wait --for=delete "pod/$pod" --timeout=60s >/dev/null
    kubectl rollout status deployment/web --timeout=60s >/dev/null
    kubectl get pods -l app=web -o name | sort >"$scratch/after"
    local replacement
    replacement="$(comm -13 "$scratch/before" "$scratch/after" | sed 's|^pod/||')"
    [ -n "$replacement" ] || fail "no new pod took the place of $pod"
    show kubectl get pods -l app=web
    saw "$replacement took its place"

    step "Read a log"
    show kubectl logs "$replacement" --tail=3
    local first
    first="$(kubectl logs "$replacement" | head -1)"
    [ "$first" = "$replacement serves" ] || fail "the log of $replacement begins with ${first:-nothing}"
    saw "$first"

    step "Run a command in a pod"
    show kubectl exec "$replacement" -- cat /www/index.html /proc/loadavg
    local inside
    inside="$(kubectl exec "$replacement" -- hostname)"
    [ "$inside" = "$replacement" ] || fail "hostname in $replacement says $inside"
    saw "hostname says $inside"

    step "Forward a port"
    kubectl port-forward service/web :80 >"$scratch/forward" 2>&1 &
    watchers+=($!)
    local port
    forwarded() { grep -q '^Forwarding from 127.0.0.1' "$scratch/forward"; }
    wait_for 10 "kubectl port-forward says where it listens" forwarded
    port="$(sed -n 's/^Forwarding from 127.0.0.1:\([0-9]*\) .*/\1/p' "$scratch/forward")"
    note "127.0.0.1:$port: $(fetch "127.0.0.1:$port")"
    stop_watchers
    saw "127.0.0.1:$port leads into a pod"

    table "$started"
    title "The cluster stays up. To use it:"
    printf '   export KUBECONFIG=%s PATH=%s/.venv/bin:$PATH\n' "$KUBECONFIG" "$PWD"
    printf '   kubectl get pods -A\n   curl http://%s:%s/\n' "$node_ip" "$node_port"
    printf '   %s  (the server'\''s log)\n   make demo-single-down  (takes everything away)\n' "$log"
}

case "${1:-}" in
    up) up ;;
    down) down ;;
    *) fail "usage: scripts/demo-single.sh up|down" ;;
esac
