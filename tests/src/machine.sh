# Starts a machine: a network, mounts, processes and cgroups of its own. usage: bash machine.sh NAME
#
# Everything in it ends with this process; the cgroups named NAME are left for the caller to remove.
set -eu
name=$1
while read -r _ at kind _; do
    case $kind in cgroup | cgroup2) ;; *) continue ;; esac
    group=$at/$name
    mkdir -p "$group"
    if [ $kind = cgroup ] && [ -e "$group/cpuset.mems" ]; then
        # A new v1 cpuset is empty, and takes no process before it has these.
        for file in cpuset.cpus cpuset.mems; do cat "$at/$file" >"$group/$file"; done
    fi
    echo $$ >"$group/cgroup.procs"
done </proc/mounts
exec unshare --net --mount --pid --uts --ipc --cgroup --fork --kill-child --mount-proc --propagation private bash -euc '
    # The same hierarchies again, seen from our groups.
    while read -r _ at kind options _; do
        case $kind in
            cgroup)
                options=${options#rw,}
                umount "$at"
                mount -t cgroup -o "${options#relatime,}" cgroup "$at"
                ;;
            cgroup2)
                umount "$at"
                mount -t cgroup2 cgroup2 "$at"
                # v2 hands controllers down only from groups without processes.
                mkdir "$at/init" && echo $$ >"$at/init/cgroup.procs"
                ;;
        esac
    done < <(cat /proc/mounts)
    mkdir -p /var/lib/cni
    mount -t tmpfs tmpfs /var/lib/cni
    mount -t tmpfs tmpfs /run
    mkdir /run/lock
    hostname "$1"
    ip link set lo up
    ip link add eth0 type veth peer name eth0-peer
    ip link set eth0-peer up
    ip addr add 192.0.2.10/24 dev eth0
    ip link set eth0 up
    ip route add default via 192.0.2.1
    echo ready
    exec >&2
    # The first process: bash reaps what is left to it.
    while :; do sleep 1000 & wait $!; done
' init "$name"
