#!/bin/bash
# cray.sh -- train under Slurm with HPE Cray MPICH; srun starts one rank per GPU.
#
#     sbatch jobs/slurm/cray.sh
#
# mpi4py from PyPI finds Cray MPICH by its ABI: load cray-mpich-abi. Untested: written from the
# sites' pages. MPI may be given GPU memory only where craype-accel-* was loaded ("GTL library is
# not linked" otherwise): see gpu below.

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
#SBATCH --signal=USR1@300
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
export MPICH_GPU_SUPPORT_ENABLED=${MPICH_GPU_SUPPORT_ENABLED:-0} # 1: MPI reads GPU memory
export FI_MR_CACHE_MONITOR=userfaultfd # the default monitor can hang with Python

# hpctrain stops before the job's end. Newer versions of Slurm tell it; "none" is no limit.
end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) || end=
end=$(date -d "${end:-none}" +%s 2>/dev/null) || end=
export HPCTRAIN_END_TIME=${SLURM_JOB_END_TIME:-$end}

launch=(srun --kill-on-bad-exit=1 --cpu-bind=cores)

status=0
"${launch[@]}" "$python" -m hpctrain train "$run" --set "run.folder=$folder" --resume auto ||
    status=$?
# srun returns 0 also where it could start no rank: a finished run has left the file DONE.
if [ "$status" -eq 0 ] && [ ! -e "$folder/DONE" ]; then status=1; fi

# 75: stopped early, with a checkpoint. The file STOP in the run folder keeps it out of the queue.
if [ "$status" -eq 75 ] && [ ! -e "$folder/STOP" ]; then
    job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    scontrol requeue "$job"
fi
exit "$status"
