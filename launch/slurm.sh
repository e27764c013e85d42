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
#          goes back to the queue; so it does after a lost process or node, and not after two
#          starts in a row without a new checkpoint
# stop     cancel the jobs of that name
#
#   --name=latent-reasoning
#   --time=24:00:00, --partition=NAME, --cpus_per_task=N, --account=NAME, --qos=NAME
#                  as sbatch has them
#   --array=0-17%4 a job for each run of a comparison (a config with sweep.runs), by its
#                  number from 0, here four at a time; the last to end makes the report
#   --env=NAME[=VALUE]  a variable for main.py, such as HF_TOKEN, which has its value from
#                  here where none is given; may be repeated. Never part of a command line
#   --tries=100    starts of one job at most
#   --python=.venv/bin/python
#   --dry_run      print the commands, run none
#
# What else a cluster wants goes into sbatch's own variables: SBATCH_CONSTRAINT, ...
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

command=${1-}
[ $# -eq 0 ] || shift
name=latent-reasoning nodes='' gpus_per_node='' time='' partition='' cpus_per_task=''
account='' qos='' array='' tries=100 python=.venv/bin/python extras=gpu,hf
case $command in
  install | run | stop) ;;
  --help | -h) help; exit ;;
  *) fail "unknown command '$command'; known: install, run, stop" ;;
esac
parse "name= nodes= gpus_per_node= time= partition= cpus_per_task= account= qos= array= env+ \
tries= python= extras=" "$@"
need_name

case $command in
  install) run launch/worker.sh install "$extras" ;;
  run)
    need_config
    need nodes gpus_per_node
    need_number nodes gpus_per_node tries
    [ -z "$cpus_per_task" ] || need_number cpus_per_task
    numbers='[0-9]+(-[0-9]+(:[0-9]+)?)?'
    [[ ! $array || $array =~ ^$numbers(,$numbers)*(%[0-9]+)?$ ]] ||
      fail "--array=$array: expected numbers of runs as sbatch has them, such as 0-17%4"
    run mkdir -p runs
    export_env
    IFS=,
    names=${env_names[*]-}
    unset IFS
    job=%j
    [ ! "$array" ] || job=%A_%a
    # TERM without B: goes to the processes, not to the job's shell: that one survives and
    # requeues. scancel ends the shell too, so a cancelled job stays cancelled.
    run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" \
      --gpus-per-node="$gpus_per_node" ${time:+--time="$time"} \
      ${partition:+--partition="$partition"} \
      ${cpus_per_task:+--cpus-per-task="$cpus_per_task"} ${account:+--account="$account"} \
      ${qos:+--qos="$qos"} ${array:+--array="$array"} ${names:+--export="ALL,$names"} \
      --requeue --signal=TERM@120 --open-mode=append \
      --output="runs/$name-$job.log" launch/slurm_job.sh "$tries" \
      "$python" -m latent_reasoning.main --distributed "${args[@]}"
    ;;
  stop) run scancel --user="$(id -un)" --name="$name" ;;
esac
