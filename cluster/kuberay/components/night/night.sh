#!/bin/sh
# Make tonight's RayJob from a suspended one, once, and wait for its end. Exit code 3: the RayJob failed or cannot be made of this
# template; any other: try again. TEMPLATE is the suspended RayJob, JOB_NAME and JOB_UID are the Kubernetes Job that runs this.
set -eu

scratch=${TMPDIR:-/tmp}

minutes=${JOB_NAME##*-}
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
    ]' | sed "s/--run-id [^ \"]*/--run-id $run_id/" >"$scratch/tonight.json"
    if ! grep -q -- "--run-id $run_id" "$scratch/tonight.json"; then
        echo "the entrypoint of rayjob/$TEMPLATE has no --run-id that could be replaced by $run_id; add one" >&2
        exit 3
    fi
    kubectl create --filename "$scratch/tonight.json"
fi

while :; do
    # An API server that does not answer is asked again.
    status=$(kubectl get rayjob "$name" --output "jsonpath={.status.jobDeploymentStatus} {.status.jobStatus}" || true)
    case $status in
    "Complete SUCCEEDED") echo "$name: done" && exit 0 ;;
    Complete* | Failed*)
        echo "$name: $status: $(kubectl get rayjob "$name" --output "jsonpath={.status.reason} {.status.message}")" >&2
        exit 3
        ;;
    esac
    sleep "${POLL_SECONDS:-30}"
done
