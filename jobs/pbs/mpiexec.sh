#!/bin/bash
# mpiexec.sh -- train under PBS; mpiexec starts one rank per GPU.
#
#     qsub jobs/pbs/mpiexec.sh
#
# Untested on a real PBS: written from the sites' pages, and run in the tests with stand-ins for
# qsub and mpiexec. PBS gives no warning before the limit: hpctrain stops by the clock.

# -- EDIT --------------------------------------------------------------------------------------
#PBS -A EDIT
#PBS -q EDIT
#PBS -l select=1:ncpus=32:mpiprocs=4:ngpus=4
#PBS -l walltime=04:00:00
#PBS -N hpctrain
#PBS -j oe

set -euo pipefail
run=run.toml         # EDIT: the run file
folder=runs/run      # EDIT: its run.folder
python=python        # EDIT: the Python that has hpctrain
minutes=240          # EDIT: the time limit above
script=jobs/pbs/mpiexec.sh # EDIT: this file; the job submits it again
per_node=4           # EDIT: ranks per node, as mpiprocs
# EDIT: module load ...
# -- end of what is to be edited ---------------------------------------------------------------

export HPCTRAIN_END_TIME=$(($(date +%s) + minutes * 60)) # hpctrain stops before it
export HDF5_USE_FILE_LOCKING=FALSE # shards are only read; parallel file systems refuse locks
cd "${PBS_O_WORKDIR:-.}"

ranks=$(wc -l <"$PBS_NODEFILE") # a line for each of the mpiprocs
launch=(mpiexec -n "$ranks" -ppn "$per_node") # Open MPI: -n "$ranks" --map-by "ppr:$per_node:node"

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
if [ "$status" -eq 75 ] && [ ! -e "$folder/STOP" ]; then qsub "$script"; fi
exit "$status"
