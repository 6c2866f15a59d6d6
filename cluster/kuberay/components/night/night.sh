#!/bin/sh
# Make tonight's RayJob from a suspended one, once, and wait for its end. Exit code 3: the RayJob failed or cannot be made of this
# template, or somebody deleted it; any other: try again. TEMPLATE is the suspended RayJob, CRONJOB what starts this every night,
# JOB_NAME and JOB_UID are the Kubernetes Job that runs it.
set -eu

scratch=${TMPDIR:-/tmp}

minutes=${JOB_NAME#"$CRONJOB-"}
case $minutes in
[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]) run_id=$(date -u -d "@$((minutes * 60))" +%Y-%m-%d) name=$TEMPLATE-$run_id ;;
*) run_id=$JOB_NAME name=$TEMPLATE-$JOB_NAME ;; # started by hand, under a name of its own
esac

if ! kubectl get rayjob "$name" --output name --ignore-not-found | grep -q .; then
    kubectl get rayjob "$TEMPLATE" --output json >"$scratch/template.json"
    kubectl patch --local --filename "$scratch/template.json" --type json --output json --patch '[
        {"op": "add", "path": "/metadata", "value": {"name": "'"$name"'", "ownerReferences": [
            {"apiVersion": "batch/v1", "kind": "Job", "name": "'"$JOB_NAME"'", "uid": "'"$JOB_UID"'"}]}},
        {"op": "add", "path": "/spec/suspend", "value": false},
        {"op": "add", "path": "/status", "value": {}}
    ]' >"$scratch/patched.json"
    sed "s/--run-id [^ \"]*/--run-id $run_id/" "$scratch/patched.json" >"$scratch/tonight.json"
    if ! grep -q -- "--run-id $run_id" "$scratch/tonight.json"; then
        echo "the entrypoint of rayjob/$TEMPLATE has no --run-id that could be replaced by $run_id; add one" >&2
        exit 3
    fi
    kubectl create --filename "$scratch/tonight.json"
fi

while :; do
    # An API server that does not answer is asked again. One that does, and knows no such job, says nothing at all.
    if status=$(kubectl get rayjob "$name" --ignore-not-found --output "jsonpath=is {.status.jobDeploymentStatus} {.status.jobStatus}"); then
        case $status in
        "is Complete SUCCEEDED") echo "$name: done" && exit 0 ;;
        "is Complete"* | "is Failed"* | "is ValidationFailed"*)
            echo "$name $status: $(kubectl get rayjob "$name" --output "jsonpath={.status.reason} {.status.message}")" >&2
            exit 3
            ;;
        "") echo "$name: somebody deleted it" >&2 && exit 3 ;;
        esac
    fi
    sleep "${POLL_SECONDS:-30}"
done
