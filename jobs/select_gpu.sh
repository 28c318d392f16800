#!/bin/bash
# select_gpu.sh -- show each rank one GPU only; for programs that cannot choose themselves.
#
#     srun ... jobs/select_gpu.sh COMMAND...
#
# hpctrain chooses its GPU itself and is better off seeing all of them: ranks reach their
# neighbours' memory directly only then. GPU_ORDER=3,2,1,0 gives another order than 0,1,2,...

set -euo pipefail
rank=
for name in OMPI_COMM_WORLD_LOCAL_RANK MPI_LOCALRANKID PALS_LOCAL_RANKID PMI_LOCAL_RANK \
    MV2_COMM_WORLD_LOCAL_RANK FLUX_TASK_LOCAL_ID JSM_NAMESPACE_LOCAL_RANK SLURM_LOCALID; do
    rank=${!name:-}
    if [ -n "$rank" ]; then break; fi
done
if [ -z "$rank" ]; then
    echo "select_gpu.sh: no launcher tells the local rank; start it under mpirun or srun" >&2
    exit 2
fi
IFS=, read -ra order <<<"${GPU_ORDER:-${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 7)}}"
export CUDA_VISIBLE_DEVICES=${order[rank % ${#order[@]}]}
exec "$@"
