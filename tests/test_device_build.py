"""Compiling kernels: the cache, its safety, and what is said where there is no compiler."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from hpctrain.device import build
from hpctrain.device.cpu import CpuDevice
from hpctrain.errors import KernelError

LIBRARY = ("elementwise", "float32")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cached_kernels_need_no_compiler(cache, monkeypatch):
    build.build(LIBRARY, build.host_level())
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    y = np.zeros(5, "float32")
    CpuDevice().launch("fill", y, 2.0, 5, work=5)
    assert (y == 2).all()
    with pytest.raises(KernelError, match=r"no C\+\+ compiler: install g\+\+ .*HPCTRAIN_CACHE"):
        build.build(("sums", "float32"), build.host_level())


def test_a_read_only_cache_serves(cache):
    path = build.build(LIBRARY, build.host_level())
    path.chmod(0o444)
    cache.chmod(0o555)
    try:
        assert build.build(LIBRARY, build.host_level()) == path
    finally:
        cache.chmod(0o755)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache, monkeypatch):
    compiler = cache.parent / "cxx"
    compiler.write_text("#!/bin/sh\necho 'boom: no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(KernelError, match="boom: no such flag"):
        build.build(LIBRARY, "x86-64-v3")
    assert list(cache.iterdir()) == []


def test_a_killed_compiler_leaves_no_library(cache, monkeypatch):
    """The output is renamed into place only when the compiler succeeded."""
    compiler = cache.parent / "cxx"
    compiler.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho half > "$2"\nkill -9 $$\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(KernelError, match="cannot compile"):
        build.build(LIBRARY, "x86-64-v3")
    assert not list(cache.glob("*.so"))


def test_two_at_once_both_get_a_whole_library(cache):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(build.build(LIBRARY, "x86-64-v3")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0].stat().st_size > 1000
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_sources_options_and_level_are_in_the_name(cache):
    names = {
        build.build(library, level).name
        for library in (LIBRARY, ("elementwise", "float64"))
        for level in ("x86-64-v3", "x86-64-v4")
    }
    assert len(names) == 4


def test_the_level_all_ranks_share():
    assert build.lowest_level(["x86-64-v4", "x86-64-v3", "x86-64-v4"]) == "x86-64-v3"
    assert build.lowest_level(["x86-64-v2", "x86-64"]) == "x86-64"
    assert build.lowest_level(["native"]) == "native"


def test_an_unwritable_home_falls_back_to_the_temporary_folder(tmp_path):
    code = "from hpctrain.device.build import cache_folder; print(cache_folder())"
    env = {**os.environ, "XDG_CACHE_HOME": "/proc/none", "TMPDIR": str(tmp_path)}
    env.pop("HPCTRAIN_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{tmp_path}/hpctrain-{os.getuid()}"
