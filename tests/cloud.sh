#!/usr/bin/env bash
# Bring up a cluster, answer one paid prompt on it, and tear it down again whatever happens.
#
# Usage: tests/cloud.sh [--dry-run] [CLUSTER.yaml]      from the repository's root; --dry-run only says what it would do
#
# It pays with a devnet's play money. The cluster has a name of its own, so that no other one can be hit, and its
# machines are terminated, not stopped. WORKERS is how many have to be there before the prompt (0 where they come
# when they are asked for), LIMIT_S the longest that one step may take. Exit status: of the step that failed; 90 if
# the cluster may still be there.
set -euo pipefail

dry_run=
[ "${1:-}" = --dry-run ] && dry_run=yes && shift
given=${1:-ray_cluster.yaml}
name="azu-e2e-$(date +%s)-$$"
limit_s=${LIMIT_S:-1800} workers=${WORKERS:-0}
folder=$(mktemp -d)
cluster="$folder/cluster.yaml"
sed 's/cache_stopped_nodes: true/cache_stopped_nodes: false/' "$given" >"$cluster"
child=

step() { # a command, in the background so that a signal ends it at once
  echo "+ $*"
  [ -n "$dry_run" ] && return
  timeout "$limit_s" "$@" &
  child=$!
  wait "$child"
}

on_head() { step ray exec --cluster-name "$name" "$cluster" "$1"; }

tear_down() {
  local status=$?
  trap - EXIT
  trap '' INT TERM HUP
  set +e
  [ -n "$child" ] && kill "$child" 2>/dev/null
  for attempt in 1 2 3; do
    step ray down -y --cluster-name "$name" "$cluster" && break
    [ "$attempt" = 3 ] && status=90
  done
  # Ray knows of a head as long as there is one.
  if [ -z "$dry_run" ] && timeout "$limit_s" ray get-head-ip --cluster-name "$name" "$cluster" >/dev/null 2>&1; then
    status=90
  fi
  [ "$status" = 90 ] && echo "THE CLUSTER $name MAY STILL BE THERE, AND COST MONEY: look at your provider's console" >&2
  rm -rf "$folder"
  exit "$status"
}
trap tear_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

step ray up -y --no-config-cache --cluster-name "$name" "$cluster"
wallet="export AZU_WALLET_PASSWORD=play AZU_HOME=~/.azu-e2e"
on_head "$wallet; azu wallet new && azu wallet fund 10 && azu login && azu deposit 5"
# Workers come after the head, or only when they are asked for.
on_head "$wallet; until [ \$(azu ps --json | grep -o '\"state\": \"alive\"' | wc -l) -ge $workers ]; do sleep 2; done"
on_head "$wallet; until azu prompt 'What is the capital of France?' --max-tokens 20 --json; do sleep 10; done"
on_head "$wallet; azu ps; azu balance --json"
