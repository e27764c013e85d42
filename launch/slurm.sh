#!/usr/bin/env bash
# Trains on the GPU nodes of a Slurm cluster, one process per GPU. Called where jobs are
# submitted, in a checkout that the nodes see too.
#
#   launch/slurm.sh install [--extras=gpu,hf]
#   launch/slurm.sh run --nodes=N --gpus_per_node=N [FLAG ...] -- ARGUMENT ...
#   launch/slurm.sh stop [--name=NAME]
#
# install  into .venv of the checkout
# run      submit python -m latent_reasoning.main --distributed ARGUMENT ...; what it
#          prints is in runs/NAME-JOB.log. Two minutes before its time is up it saves, and
#          goes back to the queue; so it does after a lost process or node
# stop     cancel the jobs of that name
#
#   --name=latent-reasoning
#   --time=24:00:00, --partition=NAME, --cpus_per_task=N   as sbatch has them
#   --tries=100    starts of one job at most
#   --python=.venv/bin/python
#   --dry_run      print the commands, run none
#
# What else a cluster wants goes into sbatch's own variables: SBATCH_ACCOUNT, SBATCH_QOS, ...
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

command=${1-}
[ $# -eq 0 ] || shift
name=latent-reasoning nodes='' gpus_per_node='' time='' partition='' cpus_per_task=''
tries=100 python=.venv/bin/python extras=gpu,hf
case $command in
  install | run | stop) ;;
  --help | -h) help; exit ;;
  *) fail "unknown command '$command'; known: install, run, stop" ;;
esac
parse 'name= nodes= gpus_per_node= time= partition= cpus_per_task= tries= python= extras=' "$@"
need_name

case $command in
  install) run launch/worker.sh install "$extras" ;;
  run)
    need_config
    need nodes gpus_per_node
    need_number nodes gpus_per_node tries
    [ -z "$cpus_per_task" ] || need_number cpus_per_task
    run mkdir -p runs
    # TERM without B: goes to the processes, not to the job's shell: that one survives and
    # requeues. scancel ends the shell too, so a cancelled job stays cancelled.
    run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" \
      --gpus-per-node="$gpus_per_node" ${time:+--time="$time"} \
      ${partition:+--partition="$partition"} \
      ${cpus_per_task:+--cpus-per-task="$cpus_per_task"} --requeue --signal=TERM@120 \
      --open-mode=append --output="runs/$name-%j.log" launch/slurm_job.sh "$tries" \
      "$python" -m latent_reasoning.main --distributed "${args[@]}"
    ;;
  stop) run scancel --user="$(id -un)" --name="$name" ;;
esac
