#!/usr/bin/env bash
# Makes the pages of .github/results again, by the commit that is checked out.
#
#   launch/results.sh [PAGE ...] [FLAG ...]
#
# Pages, all of them where none is named, with hours on two cores of an AMD EPYC:
#   default      rim_arithmetic: trained, evaluated, analyzed, intervened on, verbalized   0.4
#   comparison   chains of four operations, every method, three seeds                      1.5
#   mixed        chains of two to four, every method, three seeds                          0.9
#   depth        K blocks in L passes on chains of eight, three seeds, asked otherwise     1.5
#   lengths      the same arms on chains of two to eight, asked up to twelve  (one seed: 0.6)
#   variables    the same on assignments to four variables that are all asked   (one seed: 0.3)
#   permutations the same on words over S5                                      (not run yet)
#   memory       the implicit memory on characters, every write policy, three seeds        1.0
#   speed        rows, memory, layer, torch, decode: speed beside references               0.3
#   plans        training steps by the compilers of TPUs and GPUs                          0.5
#   robustness   the slow tests of meshes, processes, kills and damage                     0.8
#
#   --text=FILE          the text of `memory`; without it, from the hub
#   --runs=runs/results  where runs are trained; a second start goes on there
#   --out=.github/results
#   --per_core           of comparisons, a run on each core of a CPU at once
#   --short              few steps, to see that all of it runs; its numbers mean nothing
#   --dry_run            print the commands, run none
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

known='default comparison mixed depth lengths variables permutations memory speed plans robustness' pages=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
  [[ " $known " == *" $1 "* ]] || fail "unknown page '$1'; known: $known"
  pages+=("$1")
  shift
done
[[ ${1-} != --help && ${1-} != -h ]] || { help; exit; }
text='' runs='' out='' short='' per_core=''
parse 'text= runs= out= short per_core' "$@"
[ "${#pages[@]}" -gt 0 ] || read -ra pages <<< "$known"
[ ! "$short" ] || : "${runs:=build/results/runs}" "${out:=build/results}"
: "${runs:=runs/results}" "${out:=.github/results}"
[ ! "$text" ] || [ -f "$text" ] || fail "--text=$text is no file"
if [ ! "$dry_run$short" ] && [ -n "$(git status --porcelain -- latent_reasoning configs)" ]; then
  fail 'the package or configs have changes that are not committed: pages are of a commit'
fi

main() { run python -m latent_reasoning.main "$@"; }

# page NAME DIR ...: the runs of these folders as NAME/report.md and its figures.
page() { main --mode=report "${@:2}" --markdown --workdir="$out/$1"; }

# heading FILE TITLE: what every page that is no report begins with.
# shellcheck disable=SC2016  # backquotes of Markdown
heading() {
  printf '# %s\n\nBy `launch/results.sh %s`, commit %s, %s.\n\n' "$2" "$(basename "$1" .md)" \
    "$(git describe --always --dirty=+ '--exclude=*')" "$(date +%F)"
}

# into FILE TITLE COMMAND: what COMMAND prints as a page, once it is done.
into() {
  if [ "$dry_run" ]; then "$3"; return; fi
  mkdir -p "$out"
  { heading "$1" "$2"; "$3"; } > "$1.part"
  mv "$1.part" "$1"
  note "written to $1"
}

few=() one=() # what a short run changes
if [ "$short" ]; then
  few=(--config.optim.stage1.steps=6 --config.optim.stage2.steps=4 --config.train.eval_every=5
    --config.eval.valid_problems=20 --config.eval.test_problems=20)
  one=('--config.sweep.seeds=(0,)')
fi

default() {
  local dir=$runs/rim_arithmetic mode
  main --config=configs/rim_arithmetic.py --workdir="$dir" ${few[@]+"${few[@]}"}
  for mode in check_leakage latency analyze intervene; do
    main --workdir="$dir" --mode="$mode"
  done
  main --workdir="$dir" --mode=verbalize --config.reasoning_decoder.source=blocks
  page default "$dir"
}
depths() {  # depths PAGE VARIANT [FLAG ...]: arms compared, then each asked otherwise
  local dir=$runs/$1 variant=${short:+smoke} config arm seed
  variant=${variant:-$2}
  config=configs/compare_depth.py${variant:+:$variant}
  main --mode=compare --config="$config" --workdir="$dir" ${per_core:+--per_core}
  for arm in 8x1 4x2 2x4 1x8; do
    for seed in $([ "$short" ] && echo 0 || echo 0 1 2); do
      main --mode=scaling --workdir="$dir/rim_$arm-$seed" "${@:3}"
    done
  done
  main --mode=compare --config="$config" --workdir="$dir" --task=report
  page "$1" "$dir"
}
depth() { depths depth ''; }
lengths() { depths lengths mixed '--config.eval.sets=("min_steps=9,max_steps=12",)'; }
variables() { depths variables variables; }
permutations() { depths permutations permutations; }
compared() {  # compared PAGE CONFIG [FLAG ...]
  main --mode=compare --config="$2" --workdir="$runs/$1" ${per_core:+--per_core} "${@:3}" \
    ${one[@]+"${one[@]}"}
  page "$1" "$runs/$1"
}
comparison() { compared comparison "configs/compare_arithmetic.py:$([ "$short" ] && echo smoke || echo four)"; }
mixed() { compared mixed "configs/compare_arithmetic.py:$([ "$short" ] && echo smoke || echo short)"; }
memory() {
  compared memory configs/imm_shakespeare.py:replication ${text:+--config.data.path="$text"} \
    ${short:+--config.optim.stage1.steps=4}
}
tables() {
  local sizes=(--repeats 10)
  [ ! "$short" ] || sizes=(--repeats 1 --batch 1)
  run python -m latent_reasoning.benchmarks.tables rows memory layer torch decode "${sizes[@]}"
}
speed() { into "$out/speed.md" 'Speed beside references' tables; }

gpt2=(--config=configs/rim_gsm8k.py '--config.data.buckets.prefix=(128,)'
  '--config.data.buckets.count=(8,)' '--config.data.buckets.readout=(32,)')
# plan TITLE FLAG ...: a part of the page, with the command it is by.
# shellcheck disable=SC2016
plan() {
  [ "$dry_run" ] ||
    printf '\n## %s\n\n```sh\n%s\n```\n\n' "$1" "$(dry_run=1; main --mode=plan "${@:2}" 3>&1)"
  main --mode=plan "${@:2}"
}
planned() {
  local remat target model attention
  for remat in full dots none; do
    for attention in shared_prefix cudnn; do
      plan "GPT-2 124M, 128 × 384, gpu:h100, $attention, remat $remat" "${gpt2[@]}" \
        --target=gpu:h100 --config.model.attention=$attention --config.model.remat=$remat
      [ ! "$short" ] || return 0
    done
  done
  for target in tpu:v6e:2x2 tpu:v5p:2x2x1; do
    for model in Llama-3.2-1B Llama-3.2-3B Llama-3.1-8B; do
      plan "$model, $target, fsdp 4, splash" --config=configs/rim_gsm8k.py:llama1b \
        --config.model.init_from="meta-llama/$model" --target=$target --config.mesh.fsdp=-1 \
        --config.mesh.data=1 --config.model.attention=splash --config.model.remat=full --search
    done
  done
}
plans() { into "$out/plans.md" 'A training step, by the compilers of TPUs and GPUs' planned; }
tests() {
  local what=(tests/parallel tests/test_failures.py)
  [ ! "$short" ] || what=(tests/parallel/test_sharding.py -k every_method)
  printf '```\n'
  run python -m pytest -q -m slow -s -n 0 "${what[@]}"
  printf '```\n'
}
robustness() { into "$out/robustness.md" 'Meshes, processes, kills, damage' tests; }

for name in "${pages[@]}"; do
  note "--- $name"
  "$name"
done
