#!/bin/bash
# flux.sh -- train under Flux; flux run starts one rank per GPU.
#
#     flux batch jobs/flux/flux.sh
#
# Untested on a real Flux: written from its manual, and run in the tests with a stand-in for flux.

# -- EDIT --------------------------------------------------------------------------------------
# flux: --bank=EDIT
# flux: --queue=EDIT
# flux: --nodes=1
# flux: --time-limit=240m
# flux: --job-name=hpctrain
# flux: --output=hpctrain-{{id}}.out
# flux: --signal=SIGUSR1@300s

set -euo pipefail
run=run.toml         # EDIT: the run file
folder=runs/run      # EDIT: its run.folder
python=python        # EDIT: the Python that has hpctrain
minutes=240          # EDIT: the time limit above
script=jobs/flux/flux.sh # EDIT: this file; the job submits it again
nodes=1              # EDIT: as --nodes
per_node=4           # EDIT: ranks per node
cores=8              # EDIT: cores per rank
gpus=1               # EDIT: GPUs per rank; 0: without. Flux hides GPUs that are not asked for
# EDIT: module load ...
# -- end of what is to be edited ---------------------------------------------------------------

export HPCTRAIN_END_TIME=$(($(date +%s) + minutes * 60)) # hpctrain stops before it
export HDF5_USE_FILE_LOCKING=FALSE # shards are only read; parallel file systems refuse locks

launch=(flux run --nodes="$nodes" --ntasks="$((nodes * per_node))" --cores-per-task="$cores"
    --gpus-per-task="$gpus") # all ranks of a node see the GPUs of all: gpu-affinity=on

# A signal that is trapped ends `wait` early: pass it on and wait again for the real status.
caught=0
trap 'caught=1; kill -USR1 "${launcher:-}" 2>/dev/null || true' USR1 USR2
"${launch[@]}" "$python" -m hpctrain train "$run" --set "run.folder=$folder" --resume auto &
launcher=$!
status=127
while :; do
    caught=0 code=0
    wait "$launcher" || code=$?
    if [ "$code" -ne 127 ]; then status=$code; fi
    if [ "$caught" -eq 0 ]; then break; fi
done

# 75: stopped early, with a checkpoint: submit the next job, unless the file STOP forbids it.
if [ "$status" -eq 75 ] && [ ! -e "$folder/STOP" ]; then flux --parent batch "$script"; fi
exit "$status"
