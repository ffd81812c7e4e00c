"""Write the part of a batch script that starts Ray on all nodes of a task, for vLLM, and takes it down."""

import shlex
from pathlib import Path

from pipeline.common.exit_status import ExitStatus
from pipeline.config.schema import SubmitConfig

PATIENCE_SEC = 300  # for all nodes to join: the first start of Python from a network disk is slow
START = r"""
# One Ray over the {nodes} nodes, for vLLM: its head is here, where this script runs, which is the first of them.
export vllm_python={python}
address() {{ # address NODE: where Slurm reaches it
    local name=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    getent ahostsv4 "$name" | sed -n '1s/ .*//p'
}}
export node_addresses=$(for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do address "$node"; done)
export VLLM_HOST_IP=${{node_addresses%%$'\n'*}}
export RAY_ADDRESS=$VLLM_HOST_IP:$((20000 + SLURM_JOB_ID % 10000)) # no two tasks of a node share a port
ray_log={logs}/$task.ray.log
export ray_folder=$(mktemp -d /tmp/ray-XXXXXX) # a short path, for its sockets; ours alone
export RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n') # for nobody else

# It runs until its input ends: when `down` closes it, or when this script is no more.
coproc RAY {{
    trap '' TERM
    exec srun --export=ALL --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit bash -c '
        trap "" TERM # of a requeue: the job is to finish its step first
        exec 3<&0
        mkdir -p -m 700 "$ray_folder"
        addresses=($node_addresses)
        export VLLM_HOST_IP=${{addresses[SLURM_NODEID]}}
        if [ "$SLURM_NODEID" = 0 ]; then
            part=(--head --port "${{RAY_ADDRESS##*:}}" --temp-dir "$ray_folder" --include-dashboard false)
        else
            part=(--address "$RAY_ADDRESS")
            until (: </dev/tcp/${{RAY_ADDRESS/://}}) 2>/dev/null || ((SECONDS > {patience_sec})); do sleep 1; done
        fi
        "$vllm_python" -m ray.scripts.scripts start "${{part[@]}}" --node-ip-address "$VLLM_HOST_IP" \
            --num-cpus {cpus} --num-gpus {gpus} --min-worker-port 0 --max-worker-port 0 --block </dev/null &
        ray=$!
        cat <&3 >/dev/null &
        wait -n # for the end of the input, or of Ray
        kill "$ray" 2>/dev/null; ended=$?
        wait "$ray"
        rm -rf "$ray_folder"
        exit "$ended" # 1 where Ray had ended by itself
    ' >>"$ray_log" 2>&1
}}
ray=$RAY_PID ray_input=${{RAY[1]}}
down() {{ # take Ray down on all nodes
    [ -n "$ray_input" ] || return 0
    {{ exec {{ray_input}}>&-; }} 2>/dev/null
    ray_input=
    wait "$ray"
    rm -rf "$ray_folder"
}}
trap down EXIT

"$vllm_python" -c '
import time, ray
end = time.monotonic() + {patience_sec}
while not ray.is_initialized():
    try:
        ray.init(log_to_driver=False)
    except Exception:
        if time.monotonic() > end:
            raise
        time.sleep(1)
while sum(node["Alive"] for node in ray.nodes()) < {nodes}:
    if time.monotonic() > end:
        raise SystemExit("not all nodes have joined")
    time.sleep(0.5)
print("Ray is up on {nodes} nodes", flush=True)
' &
run=$!
if ! wait -n "$run" "$ray" && [ -z "$signalled" ]; then
    kill "$run" 2>/dev/null
    echo "Error: Ray has not started on {nodes} nodes: $ray_log has what it said, with $vllm_python" >&2
    note ended '"status": {failed}'
    exit {failed}
fi
run=
"""


def start_ray(config: SubmitConfig, folder: Path, python: str) -> str:
    """Write the lines that start it, and that define `down`.

    Args:
        folder: of the submission; what Ray says goes there.
        python: that of vLLM's environment.
    """
    return START.format(
        nodes=config.nodes,
        cpus=config.cpus,
        gpus=config.gpus,
        python=shlex.quote(python),
        logs=shlex.quote(str(folder)),
        patience_sec=PATIENCE_SEC,
        failed=int(ExitStatus.FAILED),
    )
