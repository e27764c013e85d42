#!/usr/bin/env bash
# Trains on a Cloud TPU VM of one or more hosts, asked for as a queued resource.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [FLAG ...] [-- ARGUMENT ...]
#
#   create   ask for the TPU
#   wait     until it is there
#   install  copy the committed checkout to all workers and install it there
#   run      python -m latent_reasoning.main --distributed ARGUMENT ... on all workers; it
#            outlives the connection, and `run` again follows it
#   resume   as much of the above as is needed; what a preemption left is deleted first
#   all      resume, again after each preemption, lost process or connection; ends when
#            main.py is done or its error is one that a restart does not mend (1, 2)
#   stop     SIGTERM on all workers: saves (end `all` first, or it resumes)
#   fetch    copy the workdir among the ARGUMENTs, of a bucket or worker 0, into --to
#   delete   delete the TPU
#
#   --project=ID            gcloud's own default otherwise
#   --type=v5litepod-16     accelerator type
#   --version=VERSION       of the TPU's software; known for v2 to v4, v5litepod, v5p, v6e
#   --spot, --reserved      what to ask for
#   --extras=tpu,hf,gcs     of pyproject.toml
#   --tries=100             of `all`
#   --poll=30               seconds between looks at the TPU's state
#   --to=runs               folder here, for fetch
#   --dry_run               print the commands of a first launch, run none
#
# A TPU's disk goes with it: several hosts, `resume` and `all` need a workdir in a bucket.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

command=${1-}
[ $# -eq 0 ] || shift
name='' zone='' project='' type='' version='' spot='' reserved=''
extras=tpu,hf,gcs tries=100 poll=30 to=runs
case $command in
  create | wait | install | run | resume | all | stop | fetch | delete) ;;
  --help | -h) help; exit ;;
  *) fail "unknown command '$command'; known: create, wait, install, run, resume, all," \
       'stop, fetch, delete' ;;
esac
parse 'name= zone= project= type= version= spot reserved extras= tries= poll= to=' "$@"
need name zone
need_name
need_number tries
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll=$poll: expected seconds"
case $command in create | resume | all)
  need type
  case $version-$type in
    -v[234]-*) version=tpu-ubuntu2204-base ;;
    -v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    -v5p-*) version=v2-alpha-tpuv5 ;;
    -v6e-*) version=v2-alpha-tpuv6e ;;
    -*) fail "--version=VERSION is needed for --type=$type" ;;
  esac ;;
esac
case $command in run | resume | all) need_config ;; fetch) need_workdir ;; esac
case $command in resume | all) need_bucket ;; esac

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
tpus() { run gcloud compute tpus "$@" "${where[@]}"; }
on_all() { tpus tpu-vm ssh "$name" --worker=all --command="$1"; }
worker() { on_all "cd latent_reasoning && $(quote launch/worker.sh "$@")"; }

assumed=NONE  # the state, in a dry run

# The TPU's state: the queued resource's, or NONE, or UNKNOWN where gcloud fails; of an
# active one also the node's, which is the first to know of a preemption.
state() {
  local now
  now=$(look queued-resources state.state) || now=UNKNOWN
  [ -z "$dry_run" ] || now=$assumed
  if [ "$now" = ACTIVE ]; then
    case $(look tpu-vm state) in PREEMPTED | TERMINATED | STOPPED) now=SUSPENDED ;; esac
  fi
  echo "${now:-NONE}"
}
look() {  # list, not describe: there a TPU that is not and a gcloud that fails look the same
  tpus "$1" list --format="value(name.basename(),$2)" |
    awk -v name="$name" '$1 == name {print $2}'
}

create() {
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+--spot} ${reserved:+--reserved} &&
    assumed=ACTIVE
}

delete() { tpus queued-resources delete "$name" --force --quiet; }

wait_active() {  # status 75: it is gone
  local now
  while now=$(state); [ "$now" != ACTIVE ]; do
    note "$name is $now"
    case $now in NONE | FAILED | SUSPEND* | DELETING) return 75 ;; esac
    sleep "$poll"
  done
}

install() {
  tpus tpu-vm scp "build/$name.tar.gz" "$name:latent_reasoning.tar.gz" --worker=all &&
    on_all "$unpack && cd latent_reasoning && $(quote launch/worker.sh install "$extras")"
}

train() {
  worker run "$name" 1 .venv/bin/python -m latent_reasoning.main --distributed "${args[@]}"
}

resume() {
  local now
  while now=$(state); [ "$now" = SUSPENDING ] || [ "$now" = DELETING ]; do sleep "$poll"; done
  case $now in
    SUSPENDED | FAILED) delete || exit; create || exit ;;
    NONE) create || exit ;;
  esac
  wait_active && install && train
}

all() {
  local try status
  for ((try = 1; try <= tries; try++)); do
    status=0
    resume || status=$?
    [ "$status" -ne 0 ] || return 0
    sleep "$poll"  # a preemption takes a while to be seen; gcloud's own failures are 1 too
    if ! resumes "$status" && [ "$status" -ne 255 ] && [ "$(state)" = ACTIVE ]; then
      return "$status"
    fi
    note "status $status at try $try of $tries"
  done
  return "$status"
}

fetch() {
  local here
  here=$to/$(basename "$workdir")
  run mkdir -p "$here"
  case $workdir in
    gs://*) run gcloud storage rsync --recursive "$workdir" "$here" ;;
    /*) tpus tpu-vm scp "$name:$workdir" "$to" --recurse --worker=0 ;;
    *) tpus tpu-vm scp "$name:latent_reasoning/$workdir" "$to" --recurse --worker=0 ;;
  esac
}

case $command in install | resume | all) archive ;; esac  # once: `all` keeps to one commit
case $command in
  wait) assumed=ACTIVE; wait_active ;;
  run) train ;;
  stop) worker stop "$name" ;;
  *) "$command" ;;
esac
