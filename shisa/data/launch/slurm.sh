#!/bin/bash
# Runs a command on the first node of a Slurm allocation; whatever it trains, runs on all nodes (shisa.launch starts them through srun).
#
#   sbatch slurm.sh shisa run --profile a100x16 --only 31_pretrain
#   sbatch --nodes=4 --time=12:00:00 slurm.sh shisa run --profile a100x16 --only 51_sft
#   sbatch slurm.sh python -m shisa.launch shisa.dpo JOB.json 16 zero3
#
# Options on sbatch's command line, and SBATCH_* variables, go before those below. processes in the stage's config counts
# the GPUs of all nodes. Two minutes before its time is up the job ends its ranks and queues itself again; after a lost
# node or preemption Slurm does that. The command then runs again and goes on from its last checkpoint.
# A training that fails is not queued again.
#SBATCH --job-name=shisa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: sbatch slurm.sh COMMAND …, for instance: shisa run --profile a100x16 --only 31_pretrain" >&2; exit 2; }
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SHISA_LAUNCHER=slurm SHISA_MACHINES="$SLURM_JOB_NUM_NODES"
export SHISA_MAIN_ADDRESS="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))" # two jobs on a node: two ports
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it over (Slurm 22.05)
echo "shisa: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on" $hosts

"$@" &
command=$!
again() {
  echo "shisa: the time is nearly up; job $SLURM_JOB_ID goes back to the queue"
  kill -TERM "$command" || true
  wait "$command" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap again USR1
trap 'kill -TERM "$command"' TERM INT
status=0
wait "$command" || status=$?
while kill -0 "$command" 2>/dev/null; do wait "$command" || status=$?; done # a signal had only woken us
exit "$status"
