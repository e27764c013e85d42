#!/usr/bin/env bash
# What slurm.sh submits: COMMAND once per GPU, and back to the queue while it resumes.
#
#   launch/slurm_job.sh TRIES COMMAND [ARGUMENT ...]
set -euo pipefail
# shellcheck source=launch/common.sh
. launch/common.sh  # Slurm starts a copy of this script in the folder of the submission

tries=$1 status=0
shift
# A process that ends first must not have the others killed while they save.
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "$@" || status=$?
start=$((${SLURM_RESTART_COUNT:-0} + 1))
if resumes "$status" && [ "$start" -lt "$tries" ]; then
  note "status $status: back to the queue after start $start of $tries"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
