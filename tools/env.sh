# shellcheck shell=sh
# env.sh -- settings for Open MPI on one machine: a laptop, a container, CI.
#
#     source tools/env.sh
#
# Sets only what is not set yet. Inside a batch job it sets nothing: there the site's settings
# decide (placement, binding and the network are what these lines switch off). Settings of one
# version of Open MPI mean nothing to another, and other MPI libraries read none of them.
# tests/launching.py has the same table for the tests.

if [ -z "${SLURM_JOB_ID:-}${PBS_JOBID:-}${LSB_JOBID:-}${FLUX_JOB_ID:-}" ]; then
    # Containers run as root, which Open MPI refuses unless it is told twice.
    export OMPI_ALLOW_RUN_AS_ROOT="${OMPI_ALLOW_RUN_AS_ROOT-1}"
    export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM-1}"

    # More ranks than cores (Open MPI 5; 4). With several hosts it would put all ranks on the first.
    export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy-:oversubscribe}"
    export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe-1}"

    # Not bound to a core each: two jobs side by side would share core 0.
    export PRTE_MCA_hwloc_default_binding_policy="${PRTE_MCA_hwloc_default_binding_policy-none}"
    export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy-none}"

    # Ranks that wait give way to ranks that compute.
    export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle-1}"

    # Shared memory and TCP only: no search for UCX and OFI fabrics (starts in 0.2 s, not 1.3 s).
    export OMPI_MCA_pml="${OMPI_MCA_pml-ob1}"
    export OMPI_MCA_btl="${OMPI_MCA_btl-^ofi,uct}"
    export OMPI_MCA_osc="${OMPI_MCA_osc-^ucx}"

    # This component's all-reduce sends 2.5 times the bytes between nodes.
    export OMPI_MCA_coll="${OMPI_MCA_coll-^han}"

    # BLAS starts with one thread; a run then sets as many as there are cores for each rank.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS-1}"
    export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS-1}"
fi
