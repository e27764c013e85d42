# shellcheck shell=bash
# Shared by the scripts of this folder: flags, quoting, dry runs. Sourced from the
# repository's root, never run. Works in the bash 3.2 of macOS.

dry_run='' name='' workdir='' args=()
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

# parse 'FLAG= SWITCH ...' "$@": --FLAG=VALUE sets $FLAG, --SWITCH sets $SWITCH to 1.
# What stands behind -- is for main.py: $args, and $workdir if it is among them.
parse() {
  local known=" $1 dry_run " key arg
  shift
  for arg in "$@"; do
    [[ $arg != *[[:cntrl:]]* ]] || fail 'an argument has a line break, tab or the like'
  done
  while [ $# -gt 0 ]; do
    [ "$1" != -- ] || { shift; args=("$@"); break; }
    key=${1%%=*} key=${key#--}
    case $1 in
      --*=*) [[ $known == *" $key= "* ]] || unknown "$1"; printf -v "$key" %s "${1#*=}" ;;
      --*) [[ $known == *" $key "* ]] || unknown "$1"; printf -v "$key" 1 ;;
      *) fail "unexpected '$1'; expected --flag=value, and main.py's arguments behind --" ;;
    esac
    shift
  done
  for arg in ${args[@]+"${args[@]}"}; do
    [[ $arg != --workdir=* ]] || workdir=${arg#*=}
  done
}

unknown() { local all=${known% }; fail "unknown flag $1; known:${all// / --}"; }

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

# The committed checkout as a file, build/NAME.tar.gz: what is not committed stays here.
archive() {
  [ "$dry_run" ] || [ -z "$(git status --porcelain)" ] || note 'uncommitted changes stay here'
  run mkdir -p build
  run git archive --format=tar.gz --output="build/$name.tar.gz" HEAD
}

# On the other machine, in its home: what becomes of that file.
# shellcheck disable=SC2034  # read by the scripts
unpack='mkdir -p latent_reasoning && tar -xzf latent_reasoning.tar.gz -C latent_reasoning'
