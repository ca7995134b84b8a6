#!/usr/bin/env bash
# The same study on a Ray cluster instead of this machine alone.
#
#   examples/ray_cluster.sh HOST:6379 [overrides...]
#
# Beforehand, on every machine: the same medray (pip install -c constraints.txt .), the same paths for data and runs (a
# shared file system), and Ray itself:
#   on the first:   ray start --head --port=6379
#   on the others:  ray start --address=FIRST:6379
# Ray trusts whoever reaches its ports: keep the cluster in a network of its own.
set -euo pipefail

address=${1:?usage: ray_cluster.sh HOST:6379 [overrides...]}
shift

# Trials run wherever the cluster has room, each with its share of cores or a GPU; study.concurrency limits how many at
# once. The study's folder stays on this machine: --resume goes on from here, with or without the cluster.
medray tune "$(dirname "$0")/search_space.yaml" --address "$address" study.name=cluster study.concurrency=8 "$@"

# After an interruption:
#   medray tune --resume runs/cluster --address HOST:6379
