"""One SLURM job that starts a whole run: servers, then the trainer on all of its nodes.

It has run on SLURM 22.05 with all nodes on one machine, and in tests against stand-ins of srun,
scontrol and curl.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from routing_replay.errors import ConfigError, writing
from routing_replay.files import atomic_write

from ..settings.config import RecipeConfig
from .commands import server_command, visible_devices

# The trainer's nodes come first; a server has a node of its own, or the first GPUs of node 0.
JOB = """\
#!/usr/bin/env bash
#SBATCH --job-name=minirl
#SBATCH --nodes={num_nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_per_node}
#SBATCH --exclusive
#SBATCH --output={logs}/slurm-%j.out
# Submit it from the folder of the repository: sbatch {job}
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${{#nodes[@]}} != {num_nodes})); then
  echo "error: the job has ${{#nodes[@]}} nodes, expected {num_nodes}" >&2
  exit 1
fi
trainer_nodes=("${{nodes[@]:0:{num_trainer_nodes}}}")
server_nodes=({server_nodes})

server_pids=()
trainer=()
# shellcheck disable=SC2329  # the trap calls it
stop() {{
  trap - EXIT
  if ((${{#server_pids[@]}})); then
    kill "${{server_pids[@]}}" "${{trainer[@]}}" 2>/dev/null || true
    wait "${{server_pids[@]}}" "${{trainer[@]}}" || true
  fi
}}
trap stop EXIT
trap 'exit 143' INT TERM

start_server() {{
  local node="${{server_nodes[$1]}}"
  srun --nodes=1 --ntasks=1 --overlap --cpu-bind=none --nodelist="$node" \\
    --output={logs}/"sglang-$node.log" --open-mode=append \\
    {server} &
  server_pids[$1]=$!
}}

urls=()
restarts=()
for i in "${{!server_nodes[@]}}"; do
  start_server "$i"
  urls+=("http://${{server_nodes[$i]}}:30000")
  restarts+=(0)
done

for i in "${{!urls[@]}}"; do
  until curl --silent --fail --max-time 10 --output /dev/null "${{urls[$i]}}/health"; do
    if ! kill -0 "${{server_pids[$i]}}" 2>/dev/null; then
      echo "error: the server of ${{server_nodes[$i]}} died; see its log in "{logs} >&2
      exit 1
    fi
    if ((SECONDS > {ready_timeout_s})); then
      echo "error: ${{urls[$i]}} is not ready after {ready_timeout_s} s (--ready-timeout-s)" >&2
      exit 1
    fi
    sleep {poll_s}
  done
done

srun --nodes={num_trainer_nodes} --ntasks={num_trainer_nodes} --overlap --cpu-bind=none \\
  --kill-on-bad-exit=1 --nodelist="$(IFS=,; echo "${{trainer_nodes[*]}}")" \\
  {trainer} --nnodes {num_trainer_nodes} \\
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${{trainer_nodes[0]}}:29500" \\
  --nproc-per-node {nproc} -m recipes.minirl.train {run_dir} --rollout-url "${{urls[@]}}" &
trainer=("$!")

# The trainer leaves a dead server out, and takes it back with the weights of the step.
while true; do
  status=0
  wait -n -p ended "${{server_pids[@]}}" "${{trainer[@]}}" || status=$?
  if [[ "$ended" == "${{trainer[0]}}" ]]; then
    exit "$status"
  fi
  for i in "${{!server_pids[@]}}"; do
    if [[ "$ended" != "${{server_pids[$i]}}" ]]; then
      continue
    fi
    message="the server of ${{server_nodes[$i]}} ended with status $status"
    if ((restarts[i] >= {server_restarts})); then
      echo "error: $message before the trainer; see its log in "{logs} >&2
      exit 1
    fi
    echo "$message; it is started again" >&2
    restarts[i]=$((restarts[i] + 1))
    start_server "$i"
  done
done
"""
FILE_NAME = "job.sbatch"
POLL_S = 5


def job_text(config: RecipeConfig, run_dir: Path, poll_s: float = POLL_S) -> str:
    """Return the job of a prepared run, for `sbatch`.

    Args:
        config: Resolved; `plan_server_nodes` and `plan_gpus_per_node` are its machines.
        run_dir: On a disk that all nodes see.
        poll_s: Seconds between two looks at a starting server.
    """
    nodes, servers = config.run.nnodes, config.plan.plan_server_nodes
    return JOB.format(
        num_nodes=nodes + servers,
        num_trainer_nodes=nodes,
        gpus_per_node=config.plan.plan_gpus_per_node,
        server_nodes=f'"${{nodes[@]:{nodes}}}"' if servers else '"${nodes[0]}"',
        server=_on_gpus(config.rollout.rollout_gpus, server_command(config)),
        trainer=_on_gpus(config.run.trainer_gpus, ["python", "-m", "torch.distributed.run"]),
        nproc=config.run.nproc,
        run_dir=shlex.quote(str(run_dir)),
        logs=shlex.quote(str(run_dir / "logs")),
        job=shlex.quote(str(run_dir / FILE_NAME)),
        ready_timeout_s=round(config.rollout.ready_timeout_s),
        poll_s=poll_s,
        server_restarts=config.rollout.server_restarts,
    )


def write_job(config: RecipeConfig, run_dir: Path) -> Path:
    """Write the job, and the folder of its logs; return its path.

    Raises:
        ConfigError: The folder cannot be written.
    """
    path = run_dir / FILE_NAME
    with writing(path, "the SLURM job", ConfigError):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(job_text(config, run_dir))
    return path


def _on_gpus(gpus: str, command: list[str]) -> str:
    """Return a command line that sees these GPUs only; all of the node, if none are named."""
    pairs = [f"{name}={value}" for name, value in visible_devices(gpus).items()]
    return shlex.join(["env", *pairs, *command] if pairs else command)
