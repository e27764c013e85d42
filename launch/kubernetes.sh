#!/usr/bin/env bash
# Trains on Kubernetes as a JobSet (jobset.x-k8s.io/v1alpha2), one process per pod; the runs of
# a comparison (a config with sweep.runs) as an Indexed Job, one per pod.
#
#   launch/kubernetes.sh print|run --name=NAME --image=IMAGE --nodes=N [FLAG ...] \
#       -- ARGUMENT ...
#   launch/kubernetes.sh stop --name=NAME [--namespace=NAME]
#
#   print   the JobSet or Job, as YAML
#   run     kubectl apply it: python -m latent_reasoning.main ARGUMENT ... in --nodes pods.
#           When a pod is lost all start again and resume, --tries times at most; a mistake
#           or training error (statuses 1, 2), or two starts in a row without a new
#           checkpoint, end it at once
#   stop    delete it, and its Secret: the processes get SIGTERM and two minutes to save
#
#   --gpus=8                     per pod
#   --resource=nvidia.com/gpu    what is counted; google.com/tpu on GKE
#   --node_selector=KEY=VALUE,KEY=VALUE
#   --toleration=KEY[=VALUE][:EFFECT]   of a taint of the nodes; may be repeated
#   --namespace=NAME             kubectl's own default otherwise
#   --service_account=NAME       whose rights the pods have
#   --queue=NAME                 of Kueue: the label kueue.x-k8s.io/queue-name
#   --secret=NAME                a Secret of the cluster, whose keys become variables of
#                                main.py; may be repeated
#   --env=NAME[=VALUE]           a variable for main.py, such as HF_TOKEN, which has its value
#                                from here where none is given; may be repeated. They are kept
#                                in the Secret NAME-env, which `run` makes and `print` omits
#   --shm=SIZE                   limit of /dev/shm, such as 16Gi: a volume in memory, of half
#                                of the node's otherwise
#   --tasks=N                    for a comparison: N tasks, each of which trains its share of
#                                the runs, --nodes of them at a time
#   --tries=100
#   --dry_run                    print the commands, run none
#
# The image works in a checkout with the package installed:
#   FROM python:3.12
#   COPY . /latent_reasoning
#   WORKDIR /latent_reasoning
#   RUN pip install -c launch/constraints.txt -e '.[gpu,hf,gcs]'
# Pods have no disk that lasts: the workdir is a bucket's.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

command=${1-}
[ $# -eq 0 ] || shift
name='' image='' nodes='' gpus=8 resource=nvidia.com/gpu node_selector='' namespace='' tries=100
service_account='' queue='' shm='' tasks='' toleration=() secret=()
case $command in
  print | run | stop) ;;
  --help | -h) help; exit ;;
  *) fail "unknown command '$command'; known: print, run, stop" ;;
esac
parse "name= image= nodes= gpus= resource= node_selector= toleration+ namespace= \
service_account= queue= secret+ env+ shm= tasks= tries=" "$@"
need name
need_name
pair='[A-Za-z0-9_./-]+=[A-Za-z0-9_.-]+'
[[ ! $node_selector || $node_selector =~ ^$pair(,$pair)*$ ]] ||
  fail "--node_selector=$node_selector: expected KEY=VALUE,KEY=VALUE"
taint='^[A-Za-z0-9_./-]+(=[A-Za-z0-9_.-]+)?(:(NoSchedule|PreferNoSchedule|NoExecute))?$'
for one in ${toleration[@]+"${toleration[@]}"}; do
  [[ $one =~ $taint ]] ||
    fail "--toleration=$one: expected KEY, KEY=VALUE or either with :NoSchedule or :NoExecute"
done
for one in ${secret[@]+"${secret[@]}"} ${service_account:+"$service_account"} \
    ${queue:+"$queue"}; do
  [[ $one =~ ^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$ ]] ||
    fail "'$one' is no name of Kubernetes: expected a-z, 0-9, - and ."
done
[[ ! $shm || $shm =~ ^[1-9][0-9]*[KMGT]i?$ ]] ||
  fail "--shm=$shm: expected a size such as 16Gi"
[ -z "$tasks" ] || need_number tasks
if [ "$command" != stop ]; then
  need image nodes
  need_number nodes gpus tries
  need_config
  need_bucket
fi

# A double-quoted YAML string. Kubernetes expands $(NAME) in arguments: $$ is one $.
text() { printf '"%s"' "$(printf '%s' "$1" | sed 's/\\/\\\\/g; s/"/\\"/g')"; }
literal() { text "$(printf '%s' "$1" | sed 's/\$/$$/g')"; }

# Prints lines of YAML behind $1 spaces.
indent() { local pad; pad=$(printf '%*s' "$1" ''); sed "s/^/$pad/"; }

# What the pods of both kinds share. Behind pod's $1 are the first arguments of main.py.
pod() {
  local one key value effect attempt=$1
  shift
  cat << END
restartPolicy: Never
terminationGracePeriodSeconds: 120
${service_account:+serviceAccountName: $(text "$service_account")
}nodeSelector:$([ "$node_selector" ] || echo ' {}')
END
  [ ! "$node_selector" ] || for one in ${node_selector//,/ }; do
    echo "  $(text "${one%%=*}"): $(text "${one#*=}")"
  done
  [ ${#toleration[@]} -eq 0 ] || echo 'tolerations:'
  for one in ${toleration[@]+"${toleration[@]}"}; do
    effect='' value=''
    [[ $one != *:* ]] || effect=${one##*:} one=${one%:*}
    key=${one%%=*}
    [[ $one != *=* ]] || value=${one#*=}
    printf '%s%s%s}\n' "- {key: $(text "$key"), operator: $([ "$value" ] && echo Equal ||
      echo Exists)" "${value:+, value: $(text "$value")}" "${effect:+, effect: $effect}"
  done
  cat << END
volumes:
- name: shm
  emptyDir: {medium: Memory${shm:+, sizeLimit: $(text "$shm")}}
containers:
- name: train
  image: $(text "$image")
  resources: {limits: {$(text "$resource"): $gpus}}
  volumeMounts:
  - {name: shm, mountPath: /dev/shm}
  env:
  - name: LATENT_REASONING_START
    valueFrom: {fieldRef: {fieldPath: "metadata.annotations['$attempt']"}}
END
  [ $((${#secret[@]} + ${#env_names[@]})) -eq 0 ] || echo '  envFrom:'
  for one in ${secret[@]+"${secret[@]}"} ${env_names[@]+"$name-env"}; do
    echo "$one"
  done | awk '!seen[$0]++ {printf "  - secretRef: {name: \"%s\"}\n", $0}'
  echo '  command: [python, -m, latent_reasoning.main]'
  echo '  args:'
  for one in "$@"; do echo "  - $(text "$one")"; done
  for one in "${args[@]}"; do echo "  - $(literal "$one")"; done
}

metadata() {
  echo 'metadata:'
  echo "  name: $(text "$name")"
  [ -z "$queue" ] || echo "  labels: {kueue.x-k8s.io/queue-name: $(text "$queue")}"
}

job_set() {
  cat << END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
$(metadata)
spec:
  failurePolicy:
    maxRestarts: $tries
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        parallelism: $nodes
        completions: $nodes
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [1, 2]}
        template:
          spec:
END
  pod jobset.sigs.k8s.io/restart-attempt "--coordinator=$name-workers-0-0.$name:8476" \
    "--num_processes=$nodes" "--process_id=\$(JOB_COMPLETION_INDEX)" | indent 12
}

indexed_job() {
  cat << END
apiVersion: batch/v1
kind: Job
$(metadata)
spec:
  parallelism: $nodes
  completions: $tasks
  completionMode: Indexed
  backoffLimitPerIndex: $tries
  podFailurePolicy:
    rules:
    - action: FailIndex
      onExitCodes: {containerName: train, operator: In, values: [1, 2]}
  template:
    spec:
END
  pod batch.kubernetes.io/job-index-failure-count \
    "--task=\$(JOB_COMPLETION_INDEX)/$tasks" | indent 6
}

job() { if [ "$tasks" ]; then indexed_job; else job_set; fi; }

# The pairs of --env; base64 needs no quoting.
env_secret() {
  local i
  [ ${#env_names[@]} -gt 0 ] || return 0
  printf '%s\n' --- 'apiVersion: v1' 'kind: Secret' "metadata: {name: \"$name-env\"}" data:
  for ((i = 0; i < ${#env_names[@]}; i++)); do
    echo "  ${env_names[i]}: $(printf %s "${env_values[i]}" | base64 | tr -d '\n')"
  done
}

kube() { run kubectl ${namespace:+--namespace="$namespace"} "$@"; }

case $command in
  print) job ;;
  stop)
    kind=jobset
    [ -z "$tasks" ] || kind=job
    kube delete "$kind" "$name"
    kube delete secret "$name-env" --ignore-not-found ;;
  run)
    if [ "$dry_run" ]; then
      echo "$(kube apply -f - 3>&1) << 'END'"; job; echo END
    else
      { job; env_secret; } | kube apply -f -
    fi ;;
esac
