#!/usr/bin/env bash
# Trains on Kubernetes as a JobSet (jobset.x-k8s.io/v1alpha2), one process per pod.
#
#   launch/kubernetes.sh print|run --name=NAME --image=IMAGE --nodes=N [FLAG ...] \
#       -- ARGUMENT ...
#   launch/kubernetes.sh stop --name=NAME [--namespace=NAME]
#
#   print   the JobSet, as YAML
#   run     kubectl apply it: python -m latent_reasoning.main ARGUMENT ... in --nodes pods.
#           When a pod is lost all start again and resume, --tries times at most; a mistake
#           or training error (statuses 1, 2) ends it at once
#   stop    delete it: the processes get SIGTERM and two minutes to save
#
#   --gpus=8                     per pod
#   --resource=nvidia.com/gpu    what is counted; google.com/tpu on GKE
#   --node_selector=KEY=VALUE,KEY=VALUE
#   --namespace=NAME             kubectl's own default otherwise
#   --tries=100
#   --dry_run                    print the commands, run none
#
# The image works in a checkout with the package installed:
#   FROM python:3.12
#   COPY . /latent_reasoning
#   WORKDIR /latent_reasoning
#   RUN pip install -e '.[gpu,hf,gcs]'
# Pods have no disk that lasts: the workdir is a bucket's.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

command=${1-}
[ $# -eq 0 ] || shift
name='' image='' nodes='' gpus=8 resource=nvidia.com/gpu node_selector='' namespace='' tries=100
case $command in
  print | run | stop) ;;
  --help | -h) help; exit ;;
  *) fail "unknown command '$command'; known: print, run, stop" ;;
esac
parse 'name= image= nodes= gpus= resource= node_selector= namespace= tries=' "$@"
need name
need_name
pair='[A-Za-z0-9_./-]+=[A-Za-z0-9_.-]+'
[[ ! $node_selector || $node_selector =~ ^$pair(,$pair)*$ ]] ||
  fail "--node_selector=$node_selector: expected KEY=VALUE,KEY=VALUE"
if [ "$command" != stop ]; then
  need image nodes
  need_number nodes gpus tries
  need_config
  need_bucket
fi

# A double-quoted YAML string. Kubernetes expands $(NAME) in arguments: $$ is one $.
text() { printf '"%s"' "$(printf '%s' "$1" | sed 's/\\/\\\\/g; s/"/\\"/g')"; }
literal() { text "$(printf '%s' "$1" | sed 's/\$/$$/g')"; }

job_set() {
  local arg pair IFS=,
  cat << END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "$name")
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
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:$([ "$node_selector" ] || echo ' {}')
END
  for pair in $node_selector; do
    echo "              $(text "${pair%%=*}"): $(text "${pair#*=}")"
  done
  cat << END
            containers:
            - name: train
              image: $(text "$image")
              resources: {limits: {$(text "$resource"): $gpus}}
              command: [python, -m, latent_reasoning.main]
              args:
              - "--coordinator=$name-workers-0-0.$name:8476"
              - "--num_processes=$nodes"
              - "--process_id=\$(JOB_COMPLETION_INDEX)"
END
  for arg in "${args[@]}"; do echo "              - $(literal "$arg")"; done
}

kube() { run kubectl ${namespace:+--namespace="$namespace"} "$@"; }

case $command in
  print) job_set ;;
  stop) kube delete jobset "$name" ;;
  run)
    if [ "$dry_run" ]; then
      echo "$(kube apply -f - 3>&1) << 'END'"; job_set; echo END
    else
      job_set | kube apply -f -
    fi ;;
esac
