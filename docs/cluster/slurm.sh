#!/bin/bash
# Eight workers of a study on a SLURM cluster. Begin the study on the login node, where it waits for them:
#   python -m demo_lib tune --study night --trials 200 --workers 0
# then, in the repository's folder:  sbatch docs/cluster/slurm.sh night
#SBATCH --job-name=demo-tune
#SBATCH --array=1-8
#SBATCH --cpus-per-task=4
#SBATCH --mem=4G
#SBATCH --time=04:00:00
#SBATCH --output=tune-%A-%a.log
# Both come from the shell that calls sbatch, and are best set in a file that only you can read:
#   MLFLOW_TRACKING_URI, the tracking server, with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD
#   DEMO_STORAGE, the study's PostgreSQL
set -eu
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# exec: SLURM's SIGTERM at the end of the time must reach Python, which ends its trial.
exec .venv/bin/python -m demo_lib tune --join "$1"
