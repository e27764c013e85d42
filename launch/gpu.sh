#!/usr/bin/env bash
# Trains on one GPU machine: this one, or --host by ssh.
#
#   launch/gpu.sh COMMAND [--host=HOST] [FLAG ...] [-- ARGUMENT ...]
#
#   install  into .venv of the checkout; on --host, copy the committed checkout there first
#   run      python -m latent_reasoning.main ARGUMENT ...; shows what it prints (kept in
#            runs/NAME.log) and outlives the connection or terminal: `run` again follows
#            it. It is started again when it was killed, --tries starts at most, and not
#            after two in a row without a new checkpoint
#   stop     SIGTERM: saves
#   fetch    copy the workdir among the ARGUMENTs from --host into --to
#
#   --name=train       of the log; one name runs once at a time
#   --tries=5
#   --extras=gpu,hf    of pyproject.toml
#   --env=NAME[=VALUE] a variable for main.py, such as HF_TOKEN, which has its value from here
#                      where none is given; may be repeated. Never part of a command line
#   --to=runs          folder here, for fetch
#   --dry_run          print the commands, run none
#
# A comparison (a config with sweep.runs) trains one run on each GPU at once with
# -- --per_gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

command=${1-}
[ $# -eq 0 ] || shift
host='' name=train tries=5 extras=gpu,hf to=runs
case $command in
  install | run | stop | fetch) ;;
  --help | -h) help; exit ;;
  *) fail "unknown command '$command'; known: install, run, stop, fetch" ;;
esac
parse 'host= name= tries= extras= to= env+' "$@"
need_name
need_number tries
[[ ! $host || $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.@-]*$ ]] || fail "--host=$host is no host name"

worker() {
  if [ "$host" ]; then
    run ssh "$host" "cd latent_reasoning && $(quote launch/worker.sh "$@")"
  else
    run launch/worker.sh "$@"
  fi
}

case $command in
  install)
    if [ "$host" ]; then
      archive
      run scp "build/$name.tar.gz" "$host:latent_reasoning.tar.gz"
      run ssh "$host" "$unpack"
    fi
    worker install "$extras"
    ;;
  run)
    need_config
    if [ ! "$host" ]; then
      export_env
    elif [ ${#env_names[@]} -gt 0 ]; then
      keep="cd latent_reasoning && umask 077 && mkdir -p runs && cat > runs/$name.env"
      # shellcheck disable=SC2029  # expanded here
      if [ "$dry_run" ]; then run ssh "$host" "$keep"; else env_pairs | ssh "$host" "$keep"; fi
    fi
    worker run "$name" "$tries" .venv/bin/python -m latent_reasoning.main "${args[@]}"
    ;;
  stop) worker stop "$name" ;;
  fetch)
    need host
    need_workdir
    run mkdir -p "$to"
    case $workdir in /*) ;; *) workdir=latent_reasoning/$workdir ;; esac
    run scp -r "$host:$workdir" "$to"
    ;;
esac
