"""Every kernel compiled for 9.0 and 8.0 in a process of its own: no spills, memory that fits, int8 wgmma."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dfrot_kernels import offline
from dfrot_kernels.checks import KernelError
from dfrot_kernels.common import Variant

KERNELS = Path(offline.__file__).parents[1]
SPILLS = {
    90: 0,
    80: 64,
}  # bytes; Triton 3.7 spills 32 and 16 in two kernels for 8.0, Triton 3.9 none
SHARED = {90: 227 * 1024, 80: 163 * 1024}  # bytes a program can have


def compiled(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """`python -m dfrot_kernels.offline` without the interpreter that the tests run under."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "dfrot_kernels.offline", *arguments],
        env={**inherited, "PYTHONPATH": str(KERNELS), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


@pytest.fixture(scope="session")
def reports(tmp_path_factory) -> list[dict]:
    """One report a compilation; a failure to compile, or a missing ptxas, fails with its message."""
    path = tmp_path_factory.mktemp("offline") / "reports.json"
    done = compiled("--json", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert len(done.stdout.splitlines()) == 1 + len(found)
    return found


def test_every_kernel_compiles_for_both(reports):
    for capability in offline.CAPABILITIES:
        mine = [r for r in reports if r["capability"] == capability]
        assert {r["module"] for r in mine} == set(offline.MODULES)
        names = [(r["module"], r["name"]) for r in mine]
        assert len(names) == len(set(names)) == len(reports) / 2


def test_nothing_spills(reports):
    assert [r for r in reports if r["spills"] > SPILLS[r["capability"]]] == []
    assert all(0 < r["registers"] <= 255 for r in reports)


def test_shared_memory_fits(reports):
    assert [r for r in reports if r["shared"] > SHARED[r["capability"]]] == []


def test_int8_wgmma_where_it_is_wanted(reports):
    assert [r for r in reports if r["wanted"] and not r["wgmma"]] == []
    prefill = [r["name"] for r in reports if r["wanted"] and r["module"] == "matmul"]
    assert any("codes 2048x" in name for name in prefill)
    assert any("packed 2048x" in name for name in prefill)


@pytest.mark.parametrize("limit, spills", [(24, True), (128, False)])
def test_spills_are_seen(limit, spills):
    """64 numbers loaded before the first is stored: more than 24 registers hold."""
    loads = "".join(f"ld.volatile.global.u32 %r{i}, [%rd0+{4 * i}];\n" for i in range(64))
    stores = "".join(f"st.volatile.global.u32 [%rd0+{4 * i}], %r{i};\n" for i in range(64))
    ptx = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry many(.param .u64 p) .maxnreg {limit} {{
.reg .b32 %r<64>;
.reg .b64 %rd<1>;
ld.param.u64 %rd0, [p];
{loads}{stores}ret;
}}"""
    registers, spilled = offline.resources(ptx, 80)
    assert registers <= limit and (spilled > 0) is spills


def test_broken_ptx_is_reported():
    with pytest.raises(KernelError, match=r"PTX: ptxas says .*fatal"):
        offline.resources("nonsense", 80)


def test_refused_under_the_interpreter():
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1 is set"):
        offline.compile_variant(Variant("any", None, {}, {}), 90)
    done = compiled("matmul", TRITON_INTERPRET="1")
    assert done.returncode == 1 and "TRITON_INTERPRET=1 is set" in done.stderr


def test_unknown_modules_are_named():
    done = compiled("nothing")
    assert done.returncode == 2 and "no module 'nothing'" in done.stderr
