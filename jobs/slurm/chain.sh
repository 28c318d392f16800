#!/bin/bash
# chain.sh -- train under Slurm as a chain of jobs: an array of which one task runs at a time.
#
#     sbatch jobs/slurm/chain.sh
#
# For sites that do not let a job requeue itself. Each task goes on where the one before stopped;
# when the run is finished (the file DONE) or is not to go on (STOP), the rest ends at once.

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
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --array=1-10%1

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

if [ -e "$folder/STOP" ]; then
    echo "$folder/STOP is there: nothing is done"
    exit 75
fi
launch=(srun --mpi=pmix --kill-on-bad-exit=1) # `srun --mpi=list`: pmix for Open MPI, pmi2 for MPICH

status=0
"${launch[@]}" "$python" -m hpctrain train "$run" --set "run.folder=$folder" --resume auto ||
    status=$?
# srun returns 0 also where it could start no rank: a finished run has left the file DONE.
if [ "$status" -eq 0 ] && [ ! -e "$folder/DONE" ]; then status=1; fi

exit "$status"
