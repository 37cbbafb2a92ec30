#!/bin/bash
# Pre-training of a100x16 on two nodes of eight GPUs. Make the earlier artifacts first: shisa run --profile a100x16 --only …
# Every node runs the workers of one training; --kill-on-bad-exit ends all of them when one fails.
#SBATCH --job-name=shisa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
set -euo pipefail
config=${1:?usage: sbatch slurm.sh CONFIG.json (written by the stage into its work folder)}
SHISA_MAIN_ADDRESS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500"
export SHISA_MAIN_ADDRESS SHISA_MACHINES="$SLURM_JOB_NUM_NODES"
srun --kill-on-bad-exit bash -c '
  export SHISA_MACHINE_RANK=$SLURM_NODEID
  exec python -c "import sys, pathlib, shisa.launch as l; l.launch(\"shisa.pretrain\", pathlib.Path(sys.argv[1]), 16, zero3=True, line=print)" "$0"
' "$config"
