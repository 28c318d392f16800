#!/bin/bash
# relaunch.sh -- train under Slurm with spare nodes: after a failure start again without bad nodes.
#
#     sbatch jobs/slurm/relaunch.sh
#
# Of the nodes of the job, `nodes` run. When a rank fails, the run is started again at once on nodes
# that answer, that Slurm does not call down, and that are not in $folder/bad_nodes.txt, one name
# per line: hpctrain's watchdog adds nodes whose ranks gave no sign of life, and you may. It ends
# when two attempts in a row reach no new checkpoint.

# -- EDIT --------------------------------------------------------------------------------------
#SBATCH --account=EDIT
#SBATCH --partition=EDIT
#SBATCH --nodes=3
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
#SBATCH --no-kill

set -euo pipefail
run=run.toml         # EDIT: the run file
folder=runs/run      # EDIT: its run.folder
python=python        # EDIT: the Python that has hpctrain
nodes=2              # EDIT: how many of the nodes run; the others are spare
# EDIT: module load ...
# -- end of what is to be edited ---------------------------------------------------------------

export HDF5_USE_FILE_LOCKING=FALSE # shards are only read; parallel file systems refuse locks
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$OMP_NUM_THREADS # srun does not take it over from sbatch

# hpctrain stops before the job's end. Newer versions of Slurm tell it; "none" is no limit.
end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) || end=
end=$(date -d "${end:-none}" +%s 2>/dev/null) || end=
export HPCTRAIN_END_TIME=${SLURM_JOB_END_TIME:-$end}

newest_checkpoint() { # its name, or nothing
    local found=("$folder"/checkpoints/step_*)
    if [ -e "${found[-1]}" ]; then basename "${found[-1]}"; fi
}

answers() { # node: a step starts there; Slurm itself takes minutes to call a dead node down
    timeout --kill-after=5 "${RELAUNCH_PROBE:-30}" srun --overlap --mpi=none --nodes=1 --ntasks=1 \
        --nodelist="$1" true >/dev/null 2>&1
}

good_nodes() { # the nodes of the job that may be used, one per line, as many as run
    local bad=/dev/null node count=0
    if [ -e "$folder/bad_nodes.txt" ]; then bad=$folder/bad_nodes.txt; fi
    while read -r node && [ "$count" -lt "$nodes" ]; do
        if answers "$node" </dev/null; then
            echo "$node"
            count=$((count + 1))
        else
            echo "node $node does not answer" >&2
        fi
    done < <(scontrol show hostnames "$SLURM_JOB_NODELIST" |
        grep -vxFf <(sinfo -h -N -o %N -n "$SLURM_JOB_NODELIST" -t down,drain,fail) |
        grep -vxFf "$bad")
}

per_node=${SLURM_NTASKS_PER_NODE%%\(*} # may be written 4(x2)
before=$(newest_checkpoint)
idle=0 # attempts in a row without a new checkpoint
while :; do
    hosts=$(good_nodes) || true
    if [ "$(wc -w <<<"$hosts")" -lt "$nodes" ]; then
        echo "fewer than $nodes good nodes are left: ${hosts//$'\n'/ }" >&2
        exit 1
    fi
    # --overlap: what has failed may hold the cores until Slurm has given up the dead node
    launch=(srun --overlap --mpi=pmix --kill-on-bad-exit=1 --nodes="$nodes"
        --ntasks="$((nodes * per_node))" --nodelist="${hosts//$'\n'/,}")
    status=0
    "${launch[@]}" "$python" -m hpctrain train "$run" --set "run.folder=$folder" --resume auto ||
        status=$?
    # srun returns 0 also where it could start no rank: a finished run has left the file DONE.
    if [ "$status" -eq 0 ] && [ ! -e "$folder/DONE" ]; then status=1; fi
    case $status in 0 | 2 | 3 | 75) break ;; esac # finished, wrong usage, diverged, stopped
    after=$(newest_checkpoint)
    idle=$((idle + 1))
    if [ "$after" != "$before" ]; then idle=0; fi
    before=$after
    echo "the run failed with status $status; newest checkpoint: ${after:-none}" >&2
    if [ "$idle" -ge 2 ]; then break; fi
    sleep "${RELAUNCH_PAUSE:-10}" # Slurm may need a moment to see that a node is down
done

# 75: stopped early, with a checkpoint. The file STOP in the run folder keeps it out of the queue.
if [ "$status" -eq 75 ] && [ ! -e "$folder/STOP" ]; then
    job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    scontrol requeue "$job"
fi
exit "$status"
