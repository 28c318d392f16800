#!/bin/bash
# mpirun.sh -- train under Slurm; mpirun of Open MPI starts one rank per GPU.
#
#     sbatch jobs/slurm/mpirun.sh
#
# As srun.sh, for sites or MPI libraries whose ranks srun cannot start. The signal goes to this
# shell (B:) and from here to mpirun, which passes it on; sent to all, it would end mpirun's daemons.

# -- EDIT --------------------------------------------------------------------------------------
#SBATCH --account=EDIT
#SBATCH --partition=EDIT
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=240
#SBATCH --job-name=hpctrain
#SBATCH --gpu-bind=none
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue

set -euo pipefail
run=run.toml         # EDIT: the run file
folder=runs/run      # EDIT: its run.folder
python=python        # EDIT: the Python that has hpctrain
# EDIT: module load ...
# -- end of what is to be edited ---------------------------------------------------------------

export HDF5_USE_FILE_LOCKING=FALSE # shards are only read; parallel file systems refuse locks
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$OMP_NUM_THREADS # srun does not take it over from sbatch

# hpctrain stops before the job's end. Newer versions of Slurm tell it; "none" is no limit.
end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) || end=
end=$(date -d "${end:-none}" +%s 2>/dev/null) || end=
export HPCTRAIN_END_TIME=${SLURM_JOB_END_TIME:-$end}

per_node=${SLURM_NTASKS_PER_NODE%%\(*} # may be written 4(x2)
launch=(mpirun -n "$((SLURM_NNODES * per_node))" --map-by "ppr:$per_node:node:PE=$OMP_NUM_THREADS")

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

# 75: stopped early, with a checkpoint. The file STOP in the run folder keeps it out of the queue.
if [ "$status" -eq 75 ] && [ ! -e "$folder/STOP" ]; then
    job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    scontrol requeue "$job"
fi
exit "$status"
