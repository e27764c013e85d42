#!/usr/bin/env bash
# On the machine that trains (Linux): installs, and runs a command that outlives its
# connection. The other scripts call it.
#
#   launch/worker.sh install EXTRAS
#   launch/worker.sh run NAME TRIES COMMAND [ARGUMENT ...]
#   launch/worker.sh stop NAME
#
# install  puts Python 3.12 and the package with EXTRAS (tpu,hf,gcs) into .venv, by uv: TPU VMs
#          come with 3.10, too old. Versions are those of launch/constraints.txt
# run      starts COMMAND, again while its status says that it resumes and the start before
#          saved something (TRIES starts at most); shows what it prints (kept in
#          runs/NAME.log), ends with its status. While it runs, another `run NAME` only
#          follows it: a lost connection costs nothing. Variables that --env sent are read
#          from runs/NAME.env, which is removed
# stop     SIGTERM: it saves and is not started again
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

command=${1-}
[ $# -eq 0 ] || shift

status() { cat "$file.status" 2>/dev/null || echo 137; }  # 137: nothing could be written

# Whether the job of $file runs: a number may be another process's by now, so what runs under
# it has to be this checkout's loop of this name.
running() {
  local pid
  pid=$(cat "$file.pid" 2>/dev/null) && [[ $pid =~ ^[0-9]+$ ]] &&
    [ "$(readlink "/proc/$pid/cwd")" = "$(pwd -P)" ] &&
    [[ $(tr '\0' ' ' 2>/dev/null < "/proc/$pid/cmdline") == *"launch/worker.sh loop ${file#runs/} "* ]]
}

case $command in
  install)
    PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --python 3.12 --allow-existing .venv
    uv pip install --python .venv -c launch/constraints.txt -e ".[$1]"
    ;;
  run)
    file=runs/$1
    mkdir -p runs && touch "$file.log"
    exec 9> "$file.lock"
    flock 9  # of two that start at once, the second follows the first
    if running; then
      note "$1 runs already: following it"
      from=-n20
    else
      if [ -f "$file.env" ]; then
        while IFS= read -r -d '' pair; do export "${pair?}"; done < "$file.env"
      fi
      rm -f "$file.status"
      from=-c+$(($(wc -c < "$file.log") + 1))
      setsid launch/worker.sh loop "$@" < /dev/null >> "$file.log" 2>&1 3>&1 9>&- &
      echo $! > "$file.pid"
      until running || ! kill -0 $! 2>/dev/null; do sleep 0.05; done
    fi
    rm -f "$file.env"
    exec 9>&-
    tail "$from" -f -s 0.2 --pid="$(cat "$file.pid")" "$file.log"
    exit "$(status)"
    ;;
  loop)  # in the background, leader of a process group: SIGTERM reaches COMMAND too
    file=runs/$1 tries=$2 stopped=''
    shift 2
    trap 'stopped=1' TERM
    for arg in "$@"; do [[ $arg != --workdir=* ]] || workdir=${arg#*=}; done
    last_lines() { tail -n 20 "$file.log"; }
    [ "$tries" -le 1 ] || begin "$1"
    for ((try = 1; ; try++)); do
      status=0
      "$@" || status=$?
      if [ "$stopped" ] || [ "$try" -ge "$tries" ] || ! again "$status" "$1"; then break; fi
      note "status $status: start $((try + 1)) of $tries"
    done
    echo "$status" > "$file.status"
    ;;
  stop)
    file=runs/$1
    running || { note "$1 does not run"; exit 0; }
    kill -TERM -- "-$(cat "$file.pid")" || true
    while running; do sleep 0.2; done
    note "$1 stopped with status $(status)"
    ;;
  --help | -h) help ;;
  *) fail "unknown command '$command'; known: install, run, stop" ;;
esac
