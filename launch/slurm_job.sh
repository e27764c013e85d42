#!/usr/bin/env bash
# What slurm.sh submits: COMMAND once per GPU, and back to the queue while it resumes.
#
#   launch/slurm_job.sh TRIES COMMAND [ARGUMENT ...]
set -euo pipefail
# shellcheck source=launch/common.sh
. launch/common.sh  # Slurm starts a copy of this script in the folder of the submission

tries=$1 status=0 start=$((${SLURM_RESTART_COUNT:-0} + 1))
shift
for arg in "$@"; do [[ $arg != --workdir=* ]] || workdir=${arg#*=}; done
last_lines() {  # of what Slurm writes, above
  scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *StdOut=//p' |
    while read -r log; do tail -n 20 "$log"; done
}
# Over a requeue only files last: which start this was, and how many in a row saved nothing.
count=runs/.$SLURM_JOB_ID.fruitless
begin "$1"
read -r last in_a_row 2>/dev/null < "$count" || last=''
[ "$last" != $((start - 1)) ] || fruitless=$in_a_row
# A process that ends first must not have the others killed while they save.
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "$@" || status=$?
if [ "$start" -lt "$tries" ] && again "$status" "$1"; then
  echo "$start $fruitless" 2>/dev/null > "$count" || note "$count cannot be written"
  note "status $status: back to the queue after start $start of $tries"
  scontrol requeue "$SLURM_JOB_ID"
else
  rm -f "$count"
fi
exit "$status"
