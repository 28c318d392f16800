#!/bin/bash
# jsrun.sh -- train under LSF; jsrun starts one rank per GPU.
#
#     bsub < jobs/lsf/jsrun.sh
#
# Untested on a real LSF: written from the sites' pages, and run in the tests with stand-ins for
# bsub and jsrun. Without jsrun: launch=(mpirun).

# -- EDIT --------------------------------------------------------------------------------------
#BSUB -P EDIT
#BSUB -q EDIT
#BSUB -nnodes 1
#BSUB -W 240
#BSUB -J hpctrain
#BSUB -o hpctrain-%J.out

set -euo pipefail
run=run.toml         # EDIT: the run file
folder=runs/run      # EDIT: its run.folder
python=python        # EDIT: the Python that has hpctrain
minutes=240          # EDIT: the time limit above
script=jobs/lsf/jsrun.sh # EDIT: this file; the job submits it again
nodes=1              # EDIT: as -nnodes
per_node=4           # EDIT: ranks per node
cores=8              # EDIT: cores per rank
gpus=4               # EDIT: GPUs per node; 0: without
# EDIT: module load ...
# -- end of what is to be edited ---------------------------------------------------------------

export HPCTRAIN_END_TIME=$(($(date +%s) + minutes * 60)) # hpctrain stops before it
export HDF5_USE_FILE_LOCKING=FALSE # shards are only read; parallel file systems refuse locks

launch=(jsrun -n "$nodes" -a "$per_node" -c "$((per_node * cores))" -g "$gpus" -b "packed:$cores")

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
if [ "$status" -eq 75 ] && [ ! -e "$folder/STOP" ]; then bsub <"$script"; fi
exit "$status"
