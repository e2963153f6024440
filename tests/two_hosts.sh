#!/bin/sh
# Runs a command of cli.py with torchrun on two "hosts": network namespaces of this machine, joined by a cable, that
# see nothing else. Needs root and iproute2.
#     tests/two_hosts.sh PYTHON fit --config configs/gpt2.yaml --trainer.num_nodes 2 --trainer.devices 1 ...
# Both hosts share the file system. The exit code is that of the first host whose command failed, else 0.
set -eu
python=$1
shift
cli=$(dirname "$0")/../cli.py
name=dpo$$
cleanup() {
    for host in 1 2; do
        ip netns pids $name-$host 2>/dev/null | xargs -r kill 2>/dev/null || true
        ip netns del $name-$host 2>/dev/null || true
    done
}
trap cleanup EXIT
trap 'exit 143' TERM
ip netns add $name-1
ip netns add $name-2
ip link add ${name}a netns $name-1 type veth peer name ${name}b netns $name-2
ip -n $name-1 address add 10.77.0.1/24 dev ${name}a
ip -n $name-2 address add 10.77.0.2/24 dev ${name}b
ip -n $name-1 link set ${name}a up
ip -n $name-2 link set ${name}b up
ip -n $name-1 link set lo up
ip -n $name-2 link set lo up

# Both have this machine's name, so torchrun must be told their addresses and which of them is the first.
start() {
    host=$1 interface=$2
    shift 2
    GLOO_SOCKET_IFNAME=$interface ip netns exec $name-$host "$python" -m torch.distributed.run \
        --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint 10.77.0.1:29500 --rdzv_id $name \
        --rdzv_conf is_host=$((2 - host)) --local_addr 10.77.0.$host "$cli" "$@" &
}
start 1 ${name}a "$@"
first=$!
start 2 ${name}b "$@"
second=$!
code=0
wait $first || code=$?
wait $second || [ $code -ne 0 ] || code=1
exit $code
