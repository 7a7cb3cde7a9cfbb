"""What the kernels compile to for 9.0 and 8.0, without a GPU: registers, spills, shared memory, wgmma.

    python -m dfrot_kernels.offline [--json PATH] [MODULE ...]

Compiles each module's `variants()` with Triton, and reads registers and spills from the `-v` of the ptxas
that Triton brings. It needs a process without TRITON_INTERPRET, under which nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from dfrot_kernels.checks import KernelError
from dfrot_kernels.common import INTERPRETED, Variant

__all__ = ["CAPABILITIES", "MODULES", "Report", "compile_all", "compile_variant", "main"]

MODULES = ("tokens", "hadamard_tokens", "matmul", "matmul_fp", "kv", "attention", "error")
CAPABILITIES = (90, 80)
WGMMA = re.compile(r"wgmma\.mma_async\S*\.s32\.s8\.s8")


@dataclass(frozen=True)
class Report:
    """One compilation: name, compute capability × 10, registers a thread, bytes spilled and of shared memory.

    wgmma: whether the PTX has the int8 warpgroup instruction; wanted: whether it should.
    """

    module: str
    name: str
    capability: int
    registers: int
    spills: int
    shared: int
    wgmma: bool
    wanted: bool


def compile_variant(variant: Variant, capability: int, module: str = "") -> Report:
    """Compile one variant for a compute capability, 90 for 9.0; KernelError names the one that fails."""
    if INTERPRETED:
        raise KernelError("TRITON_INTERPRET=1 is set: kernels compile only in a process without it")
    where = f"{variant.name} for {capability / 10}"
    names = list(variant.signature)
    attributes = {(names.index(a),): [["tt.divisibility", 16]] for a in variant.aligned}
    source = ASTSource(variant.kernel, variant.signature, variant.constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options["enable_fp_fusion"] = variant.fp_fusion
    try:
        kernel = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    except Exception as error:
        raise KernelError(f"{where} does not compile: {error}") from error
    ptx = kernel.asm["ptx"]
    registers, spills = resources(ptx, capability, where)
    return Report(
        module=module,
        name=variant.name,
        capability=capability,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        wgmma=bool(WGMMA.search(ptx)),
        wanted=variant.wgmma and capability == 90,
    )


def resources(ptx: str, capability: int, where: str = "PTX") -> tuple[int, int]:
    """Registers a thread, and bytes stored and loaded by spills, of a kernel's PTX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(path)]
        made = subprocess.run(
            [*command, "-o", f"{folder}/cubin"], capture_output=True, text=True, check=False
        )
    found = [
        re.findall(pattern, made.stderr)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill")
    ]
    if made.returncode or not all(found):
        raise KernelError(f"{where}: ptxas says {made.stderr.strip() or 'nothing'}")
    return max(map(int, found[0])), sum(map(int, found[1]))


def compile_all(
    modules: Sequence[str] = MODULES, capabilities: Sequence[int] = CAPABILITIES
) -> list[Report]:
    """Reports of all variants of `modules`, in order; two compile at a time."""
    jobs = [
        (variant, capability, module)
        for module in modules
        for variant in import_module(f"dfrot_kernels.{module}").variants()
        for capability in capabilities
    ]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: compile_variant(*job), jobs))


def table(reports: Sequence[Report]) -> str:
    """The reports as lines of text."""
    width = max([len("kernel"), *(len(r.name) for r in reports)])
    lines = [f"{'kernel':{width}}   cc  registers  spilled B  shared KiB  int8 wgmma"]
    for r in reports:
        wgmma = "yes" if r.wgmma else "MISSING" if r.wanted else "-"
        lines.append(
            f"{r.name:{width}}  {r.capability / 10}  {r.registers:9}  {r.spills:9}"
            f"  {r.shared / 1024:10.1f}  {wgmma}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print the table, and write the reports as JSON where asked."""
    parser = argparse.ArgumentParser("python -m dfrot_kernels.offline", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the reports here too")
    asked = parser.parse_args(arguments)
    unknown = [m for m in asked.modules if m not in MODULES]
    if unknown:
        parser.error(f"no module {unknown[0]!r}: choose of {', '.join(MODULES)}")
    try:
        reports = compile_all(asked.modules or MODULES)
    except KernelError as error:
        parser.exit(1, f"{error}\n")
    print(table(reports))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")


if __name__ == "__main__":
    main()
