#!/bin/bash
# stage-env.sh -- copy a Python environment to every node of a Slurm job, before hundreds of ranks
# import from a parallel file system at once. Prints the Python to use:
#
#     python=$(jobs/stage-env.sh env.tar.gz)
#
# env.tar.gz: tar -czf env.tar.gz -C .venv .   (or conda-pack). Scripts in a moved environment
# name the old place: start programs by `"$python" -m hpctrain`, as the scripts here do.

set -euo pipefail
archive=${1:?usage: stage-env.sh env.tar.gz}
place=${STAGE_FOLDER:-${TMPDIR:-/tmp}}/hpctrain-env-${SLURM_JOB_ID:?not in a Slurm job}
per_node=(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --mpi=none)

"${per_node[@]}" mkdir -p "$place" >&2
sbcast --force --compress "$archive" "$place/env.tar.gz" >&2 # fails where a copy is not whole
"${per_node[@]}" tar -xzf "$place/env.tar.gz" -C "$place" >&2
"${per_node[@]}" test -x "$place/bin/python" >&2
echo "$place/bin/python"
