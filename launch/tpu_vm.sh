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
#            main.py is done, its error is one that a restart does not mend (1, 2), or two
#            starts in a row saved no new checkpoint (a preemption is no such start)
#   stop     SIGTERM on all workers: saves (end `all` first, or it resumes)
#   fetch    copy the workdir among the ARGUMENTs, of a bucket or worker 0, into --to
#   delete   delete the TPU
#
#   --project=ID            gcloud's own default otherwise
#   --type=v5litepod-16     accelerator type
#   --version=VERSION       of the TPU's software; known for v2 to v4, v5litepod, v5p, v6e
#   --spot, --reserved      what to ask for
#   --service_account=EMAIL whose rights the TPU has; the project's default otherwise
#   --network=NAME, --subnetwork=NAME
#   --internal_ip           no external addresses: reached by the internal one, from inside
#   --tunnel_through_iap    reached through Identity-Aware Proxy; with --internal_ip from
#                           outside, too
#   --env=NAME[=VALUE]      a variable for main.py, such as HF_TOKEN, which has its value from
#                           here where none is given; may be repeated. It goes as a file of
#                           mode 600, never in a command line
#   --delete_when_done      delete the TPU when `run`, `resume` or `all` has ended; not after a
#                           lost connection. Otherwise it stays, and the end says so
#   --tasks=N               of all, stop and delete, for a comparison (a config with
#                           sweep.runs): N TPUs, NAME-0 and so on, each of which trains its
#                           share of the runs; what each prints is in runs/NAME-0.log here
#   --extras=tpu,hf,gcs     of pyproject.toml
#   --tries=100             of `all`
#   --poll=30               seconds between looks at the TPU's state
#   --to=runs               folder here, for fetch
#   --dry_run               print the commands of a first launch, run none
#
# A TPU's disk goes with it: several hosts, `resume` and `all` need a workdir in a bucket.
# Hosts meet at port 8476, which automatic networks open; jax's own default, 8482, they may
# not. Another one: --env=JAX_COORDINATOR_PORT=PORT.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

command=${1-}
[ $# -eq 0 ] || shift
name='' zone='' project='' type='' version='' spot='' reserved=''
service_account='' network='' subnetwork='' internal_ip='' tunnel_through_iap=''
delete_when_done='' tasks='' extras=tpu,hf,gcs tries=100 poll=30 to=runs
case $command in
  create | wait | install | run | resume | all | stop | fetch | delete) ;;
  --help | -h) help; exit ;;
  *) fail "unknown command '$command'; known: create, wait, install, run, resume, all," \
       'stop, fetch, delete' ;;
esac
parse "name= zone= project= type= version= spot reserved service_account= network= subnetwork= \
internal_ip tunnel_through_iap env+ delete_when_done tasks= extras= tries= poll= to=" "$@"
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
case $command$delete_when_done in resume* | all* | run1) need_bucket ;; esac
[ -z "$tasks" ] || need_number tasks
[[ ! $tasks || $command =~ ^(all|stop|delete)$ ]] || fail '--tasks is of all, stop and delete'

where=(--zone="$zone") reach=()
[ -z "$project" ] || where+=(--project="$project")
if [ "$tunnel_through_iap" ]; then
  reach=(--tunnel-through-iap)
elif [ "$internal_ip" ]; then
  reach=(--internal-ip)
fi
tpus() { run gcloud compute tpus "$@" "${where[@]}"; }
vm() { tpus tpu-vm "$@" ${reach[@]+"${reach[@]}"}; }
on_all() { vm ssh "$name" --worker=all --command="$1"; }
worker() { on_all "cd latent_reasoning && $(quote launch/worker.sh "$@")"; }
last_lines() {
  vm ssh "$name" --worker=0 --command="tail -n 20 latent_reasoning/runs/$name.log"
}

# What is left when this ends: a TPU that was seen goes on, and costs.
there='' secrets=''
at_end() {
  [ ! "$secrets" ] || rm -f "$secrets"
  [ ! "$there" ] || [ "$dry_run" ] ||
    note "$name still runs, and costs what its type costs (not known here) until:" \
      "launch/tpu_vm.sh delete $(quote --name="$name" --zone="$zone" \
        ${project:+--project="$project"})"
}
trap at_end EXIT

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
    --runtime-version="$version" ${spot:+--spot} ${reserved:+--reserved} \
    ${service_account:+--service-account="$service_account"} \
    ${network:+--network="$network"} ${subnetwork:+--subnetwork="$subnetwork"} \
    ${internal_ip:+--internal-ips} &&
    assumed=ACTIVE there=1
}

delete() { tpus queued-resources delete "$name" --force --quiet && there=''; }

wait_active() {  # status 75: it is gone
  local now
  while now=$(state); [ "$now" != ACTIVE ]; do
    note "$name is $now"
    case $now in NONE | FAILED | SUSPEND* | DELETING) return 75 ;; esac
    sleep "$poll"
  done
  there=1
}

install() {
  vm scp "build/$name.tar.gz" "$name:latent_reasoning.tar.gz" --worker=all &&
    on_all "$unpack && cd latent_reasoning && $(quote launch/worker.sh install "$extras")"
}

# The pairs of --env go as a file that only its owner reads, and that the worker removes.
send_env() {
  [ ${#env_names[@]} -gt 0 ] || return 0
  if [ "$dry_run" ]; then
    vm scp "build/$name.env" "$name:latent_reasoning/runs/$name.env" --worker=all
    return
  fi
  secrets=$(mktemp) && env_pairs > "$secrets" &&
    vm scp "$secrets" "$name:latent_reasoning/runs/$name.env" --worker=all && rm "$secrets"
}

train() {
  there=1
  send_env &&
    on_all "cd latent_reasoning && JAX_COORDINATOR_PORT=8476 $(quote launch/worker.sh run \
      "$name" 1 .venv/bin/python -m latent_reasoning.main --distributed "${args[@]}")"
}

# For `run`, `resume` and `all`: what follows their end.
then_delete() {
  local status=0
  "$@" || status=$?
  [ ! "$delete_when_done" ] || [ "$status" -eq 255 ] || delete
  return "$status"
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
  [ "$dry_run" ] || begin ''  # no Python here: gcloud lists the bucket
  for ((try = 1; try <= tries; try++)); do
    status=0
    resume || status=$?
    [ "$status" -ne 0 ] || return 0
    sleep "$poll"  # a preemption takes a while to be seen; gcloud's own failures are 1 too
    if [ "$status" -ne 255 ] && [ "$(state)" = ACTIVE ]; then again "$status" || break; fi
    note "status $status at try $try of $tries"
  done
  return "$status"
}

# This command for the TPU of each task, at once.
each_task() {
  local i flags=() waited=() status=0
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in --name=* | --tasks=* | --env=*) ;; *) flags+=("$1") ;; esac
    shift
  done
  export_env
  for i in ${env_names[@]+"${env_names[@]}"}; do flags+=("--env=$i"); done
  [ "$dry_run" ] || mkdir -p runs
  trap '[ ${#waited[@]} -eq 0 ] || kill "${waited[@]}"' EXIT
  for ((i = 0; i < tasks; i++)); do
    set -- launch/tpu_vm.sh "$command" --name="$name-$i" "${flags[@]}"
    [ ${#args[@]} -eq 0 ] || set -- "$@" -- "${args[@]}" --task="$i/$tasks"
    if [ "$dry_run" ]; then
      "$@"
    else
      "$@" >> "runs/$name-$i.log" 2>&1 &
      waited+=("$!")
      note "$name-$i: what it prints is in runs/$name-$i.log"
    fi
  done
  for i in ${waited[@]+"${!waited[@]}"}; do
    wait "${waited[i]}" || { status=$?; note "$name-$i ended with status $status"; }
  done
  trap - EXIT
  exit "$status"
}

fetch() {
  local here
  here=$to/$(basename "$workdir")
  run mkdir -p "$here"
  case $workdir in
    gs://*) run gcloud storage rsync --recursive "$workdir" "$here" ;;
    /*) vm scp "$name:$workdir" "$to" --recurse --worker=0 ;;
    *) vm scp "$name:latent_reasoning/$workdir" "$to" --recurse --worker=0 ;;
  esac
}

[ -z "$tasks" ] || each_task "$@"
case $command in install | resume | all) archive ;; esac  # once: `all` keeps to one commit
case $command in
  wait) assumed=ACTIVE; wait_active ;;
  run) then_delete train ;;
  resume | all) then_delete "$command" ;;
  stop) there=1; worker stop "$name" ;;
  *) "$command" ;;
esac
