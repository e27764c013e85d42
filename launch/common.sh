# shellcheck shell=bash
# Shared by the scripts of this folder: flags, quoting, dry runs. Sourced from the
# repository's root, never run. Works in the bash 3.2 of macOS.

dry_run='' name='' workdir='' args=() env=() env_names=() env_values=()
exec 3>&1  # where dry runs print, also from inside $(...)

# One line on standard error, status 2; called before anything has run.
fail() { echo "error: $* (see launch/$(basename "$0") --help)" >&2; exit 2; }

note() { echo "$*" >&2; }

# The comment at the head of the script is its help.
help() {
  awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "launch/$(basename "$0")"
}

# quote WORD ...: the words as one line for any POSIX shell.
quote() {
  local word line=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%,+-]*)
        word=$(printf '%s\n' "$word" | sed "s/'/'\\\\''/g; s/^/'/; s/\$/'/") ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run WORD ...: runs the command; in a dry run prints it instead.
run() { if [ "$dry_run" ]; then quote "$@" >&3; else "$@"; fi; }

# parse 'FLAG= LIST+ SWITCH ...' "$@": --FLAG=VALUE sets $FLAG, --LIST=VALUE is added to the
# array LIST, --SWITCH sets $SWITCH to 1; dashes in their names are underscores.
# What stands behind -- is for main.py: $args, and $workdir if it is among them.
parse() {
  local known=" $1 dry_run " key arg
  shift
  for arg in "$@"; do
    [[ $arg != *[[:cntrl:]]* ]] || fail 'an argument has a line break, tab or the like'
  done
  while [ $# -gt 0 ]; do
    [ "$1" != -- ] || { shift; args=("$@"); break; }
    key=${1%%=*} key=${key#--} key=${key//-/_}
    case $1 in
      --*=*)
        [[ $known == *" $key= "* || $known == *" $key+ "* ]] || unknown "$1"
        [ "${1#*=}" ] || fail "--$key= is empty; expected --$key=VALUE"
        if [[ $known == *" $key+ "* ]]; then
          eval "$key+=(\"\${1#*=}\")"
        else
          printf -v "$key" %s "${1#*=}"
        fi ;;
      --*)
        [[ $known != *" $key= "* && $known != *" $key+ "* ]] ||
          fail "unknown flag $1 without a value; expected $1=VALUE"
        [[ $known == *" $key "* ]] || unknown "$1"
        printf -v "$key" 1 ;;
      *) fail "unexpected '$1'; expected --flag=value, and main.py's arguments behind --" ;;
    esac
    shift
  done
  for arg in ${args[@]+"${args[@]}"}; do
    [[ $arg != --workdir=* ]] || workdir=${arg#*=}
  done
  for arg in ${env[@]+"${env[@]}"}; do take_env "$arg"; done
}

unknown() {
  local all=${known% } flag=$1
  case $flag in --env* | --secret*) flag=${flag%%=*} ;; esac  # a secret stays unsaid
  all=${all//= / } all=${all//+ / } all=${all%[=+]}
  fail "unknown flag $flag; known:${all// / --}"
}

# take_env NAME[=VALUE]: of --env; NAME alone has the value that it has here.
take_env() {
  local key=${1%%=*}
  [[ $key =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "--env=$key: expected NAME or NAME=VALUE"
  if [[ $1 == *=* ]]; then
    env_values+=("${1#*=}")
  else
    printenv "$key" > /dev/null ||
      fail "--env=$key: $key is not set here; export it, or give --env=$key=VALUE"
    env_values+=("${!key}")
  fi
  env_names+=("$key")
}

# The pairs of --env for a pipe or a file of mode 600, never for a command line: each ends
# in a null character.
env_pairs() {
  local i
  for ((i = 0; i < ${#env_names[@]}; i++)); do
    printf '%s=%s\0' "${env_names[i]}" "${env_values[i]}"
  done
}

# For what is started from here.
export_env() {
  local i
  for ((i = 0; i < ${#env_names[@]}; i++)); do
    export "${env_names[i]}=${env_values[i]}"
  done
}

# Checks of flags by name; each ends with one error.
need() {
  local flag
  for flag in "$@"; do [ "${!flag}" ] || fail "--$flag=VALUE is needed"; done
}
need_number() {
  local flag
  for flag in "$@"; do
    [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--$flag=${!flag}: expected a whole number from 1"
  done
}
need_name() {
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$name: expected at most 40 of a-z, 0-9 and -, beginning with a letter"
}
need_config() {
  [[ " ${args[*]-}" == *' --config='* ]] || fail 'expected -- --config=FILE, for main.py'
}
need_bucket() {
  [[ $workdir == gs://* ]] ||
    fail "--workdir=$workdir would not last; expected -- --workdir=gs://..."
}
need_workdir() {  # that can be named to scp
  [[ $workdir =~ ^[A-Za-z0-9_./:=@%+-]+$ ]] ||
    fail "--workdir=$workdir: expected -- --workdir=DIR, of letters, digits and _./:=@%+-"
}

# resumes STATUS: main.py's statuses after which the same command goes on: 75, another
# process was lost; 143, stopped by SIGTERM and saved; aborted, killed or crashed.
resumes() { case $1 in 75 | 134 | 137 | 139 | 143) ;; *) false ;; esac; }

# saved [PYTHON]: what is safe in $workdir (without one, in any run here): checkpoints and
# results, one a line; also of a comparison's runs. Status 1 where a bucket cannot be listed.
saved() {
  local found workdir=${workdir%/}
  case $workdir in
    *://*)
      if found=$(gcloud storage ls "$workdir/checkpoints/" "$workdir/*/checkpoints/" \
          "$workdir/*/results.json" 2>&1) || [[ $found == *'matched no objects'* ]]; then
        printf '%s\n' "$found" | grep -E '/(checkpoints/[0-9]+/|results\.json)$' || true
      else
        "${1:-false}" -m latent_reasoning.cli.restarts "$workdir" 2>/dev/null
      fi ;;
    *)
      if [ "$workdir" ]; then set -- "${workdir/#\~/$HOME}"; else set -- runs/*; fi
      for found in "$@"; do
        printf '%s\n' "$found"/checkpoints/* "$found"/*/checkpoints/* "$found"/*/results.json
      done | grep -E '/(checkpoints/[0-9]+|results\.json)$' || true ;;
  esac
}

# A restart needs progress. `begin [PYTHON]` before the first start; then, when one ended,
# `again STATUS [PYTHON]`: whether there is to be another. Two in a row that saved nothing
# new end the job with the last lines of its log (last_lines prints them), and so does a
# status that a restart does not mend.
before='' fruitless=0 listed=''
begin() { listed=''; ! before=$(saved "$@") || listed=1; }
again() {
  local status=$1 now lines
  shift
  resumes "$status" || return 1
  now=$(saved "$@") || { note 'what is saved cannot be listed: no look at progress'; return 0; }
  if [ ! "$listed" ] || printf '%s\n' "$now" |
      grep -vxF -e "$before" -e '' > /dev/null; then  # not -q: that one closes the pipe
    fruitless=0
  else
    fruitless=$((fruitless + 1))
  fi
  before=$now listed=1
  [ "$fruitless" -ge 2 ] || return 0
  lines=$(last_lines)  # before this one is among them
  note "error: status $status, and $fruitless starts in a row saved no new checkpoint in" \
    "${workdir:-runs/}: not started again. Save sooner (--config.train.save_every), or mend" \
    'what its last lines say:'
  note "$lines"
  return 1
}

# The committed checkout as a file, build/NAME.tar.gz: what is not committed stays here.
archive() {
  [ "$dry_run" ] || [ -z "$(git status --porcelain)" ] || note 'uncommitted changes stay here'
  run mkdir -p build
  run git archive --format=tar.gz --output="build/$name.tar.gz" HEAD
}

# On the other machine, in its home: what becomes of that file.
# shellcheck disable=SC2034  # read by the scripts
unpack='mkdir -p latent_reasoning/runs && tar -xzf latent_reasoning.tar.gz -C latent_reasoning'
