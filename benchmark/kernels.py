"""Compiles every Triton kernel of the head, without a GPU: registers, shared memory, spills.

    python -m benchmark.kernels [--width 512] [--archs 80 90 100] [--sample 1]

Each kernel in the variants that the program can ask for (operands, stored types, flags) and in each tile that
autotuning may try on that architecture; and the update's kernel has to be one program for all of its random keys. It
writes a record with the kernels' checksum to benchmark/results/, and ends with status 1 where a kernel does not
compile, spills, or needs more shared memory than there is. --sample n compiles n of each kernel's variants on each
architecture: what the tests do.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmark.record import write_record
from runtime import files

KERNELS = Path(__file__).parent.parent / "head" / "ops" / "triton_kernels.py"
SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may have
INTEGERS = {"first", "B", "K", "D", "R", "PER", "weight_first", "first_number", "weight_key", "momentum_key"}
NUMBERS = {"filter_above", "skip_below", "boost", "lr", "factor", "decay"}
TYPES = {"column": "*i64", "part": "*i64", "member": "*i8", "index": "*i64", "weight_index": "*i64", "keep": "*i32"}


def variants(width: int, capability: int) -> list:
    """[(kernel's name, {argument: type}, constants, options)]"""
    from head.ops import triton_kernels as kernels

    def tiles(longest, flags):
        for tile in kernels.without_spills(kernels.TILES, capability, longest, flags):
            yield {**flags, **tile.kwargs}, dict(num_warps=tile.num_warps, num_stages=tile.num_stages)

    halves, both, found = ("fp16", "bf16"), (False, True), []
    for half, flag in itertools.product(halves, both):
        types = {"left": f"*{half}", "right": f"*{half}"}
        for learn in both:
            flags = dict(LEARN=learn, FILTER=flag, TOP5=flag)
            found += [("scan_kernel", types, *tile) for tile in tiles("BLOCK_B", flags)]
        found += [("gradient_kernel", types, *tile) for tile in tiles("BLOCK_K", dict(FILTER=flag, MEMBER=flag))]
    for half, stored, flag in itertools.product(halves, ("fp32", "bf16"), both):
        types = {"weight": f"*{stored}", "unit": f"*{half}"}
        found.append(("unit_rows_kernel", types, dict(GATHER=flag, NORMALISE=not flag), dict(num_warps=1)))
        found.append(("unit_rows_kernel", types, dict(GATHER=flag, NORMALISE=True), dict(num_warps=1)))
    dropped = {"fp32": 0, "bf16": 16}
    for stored, momentum, flag in itertools.product(dropped, (None, "fp32", "bf16", "i8"), both):
        flags = dict(
            GATHER=flag,
            NORMALISE=not flag or momentum == "i8",
            MOMENTUM={None: 0, "i8": 2}.get(momentum, 1),
            SCALE=flag,
            KEEP=flag,
            WEIGHT_DROPPED=dropped[stored],
            MOMENTUM_DROPPED=dropped.get(momentum, 0),
        )
        types = {"weight": f"*{stored}", "momentum": f"*{momentum or 'fp32'}"}
        found.append(("update_kernel", types, flags, dict(num_warps=4)))
    return [(name, types, dict(flags, WIDTH=width), options) for name, types, flags, options in found]


def compiled(name, types, constants, options, capability) -> dict:
    """{"registers", "shared", "spills"}: bytes but for the registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from head.ops import triton_kernels as kernels

    function = getattr(kernels, name)
    function = getattr(function, "fn", function) if hasattr(function, "configs") else function
    if "WIDEN" in function.arg_names:
        constants = dict(constants, WIDEN=False)
    signature, aligned = {}, {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument in NUMBERS:
            signature[argument] = "fp32"
        else:
            signature[argument] = types.get(argument, TYPES.get(argument, "*fp32"))
            aligned[(place,)] = [["tt.divisibility", 16]]
        if argument in ("B", "D"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        ASTSource(function, signature, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )
    return {"shared": kernel.metadata.shared, **assembled(kernel.asm["ptx"], capability)}


def assembled(ptx: str, capability: int) -> dict:
    """What Triton's own ptxas says of a kernel."""
    import triton.backends.nvidia as nvidia

    tools = sorted((Path(nvidia.__file__).parent / "bin").glob("ptxas*"), key=lambda path: len(path.name), reverse=True)
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for tool in tools if capability >= 90 else tools[::-1]:
            said = subprocess.run(
                [tool, "-v", "--gpu-name", arch, source, "-o", "/dev/null"], capture_output=True, text=True
            ).stderr
            registers = re.search(r"Used (\d+) registers", said)
            if registers:
                spills = [int(count) for count in re.findall(r"(\d+) bytes spill", said)]
                return {"registers": int(registers.group(1)), "spills": sum(spills)}
    raise RuntimeError(f"ptxas: {said.strip()[:300]}")


def update_signatures(updates: int = 200) -> set:
    """What Triton tells programs of the update's kernel apart by, over so many updates of the same rows: one each
    would be compiled."""
    from unittest import mock

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from head.centers import Centers, Update
    from head.ops import triton, triton_kernels
    from runtime.shard import RowShard

    kernel = triton_kernels.update_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    signatures = set()

    class Launcher:
        def __getitem__(self, grid):
            return lambda *arguments, **flags: signatures.add(str(bind(*arguments, **flags)[1:]))

    centers = Centers(RowShard(0, 64, 64), 32, dtype=torch.bfloat16, momentum_dtype=torch.bfloat16)
    with mock.patch.object(triton_kernels, "update_kernel", Launcher()):
        for centers.updates in range(updates):
            update = Update(centers, 0.1 / (1 + centers.updates), kernel=triton.update_rows)
            update(0, 64, torch.zeros(64, 32))
    return signatures


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=512, help="of the rows: a power of two")
    parser.add_argument("--archs", type=int, nargs="+", default=list(SHARED))
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument(
        "--output", default=str(Path(__file__).parent / "results"), help="folder of the record; '' = none"
    )
    options = parser.parse_args(argv)
    import triton

    rows, bad = [], 0
    for capability in options.archs:
        wanted = variants(options.width, capability)
        if options.sample:
            some = random.Random(capability)
            by_kernel = itertools.groupby(sorted(wanted, key=lambda v: v[0]), key=lambda v: v[0])
            wanted = [variant for _, all in by_kernel for variant in some.sample(list(all), options.sample)]
        for variant in wanted:
            name, types, constants, flags = variant
            row = {"kernel": name, "sm": capability, "types": types, **constants, **flags}
            try:
                row.update(compiled(name, types, constants, flags, capability))
                wrong = row["spills"] or row["shared"] > SHARED[capability]
            except Exception as error:  # of whatever part of the compiler
                row["failed"], wrong = " ".join(str(error).split())[:300], True
            bad += bool(wrong)
            rows.append(row)
            sys.stdout.write(f"{'BAD ' if wrong else ''}{row}\n")
            sys.stdout.flush()
    signatures = update_signatures()
    bad += len(signatures) > 1
    sys.stdout.write(f"programs of the update's kernel for all of its random keys: {len(signatures)}\n")
    if options.output:
        content = {"triton": triton.__version__, "kernels": files.file_checksum(KERNELS), "rows": rows}
        write_record("kernels", content, folder=options.output)
    sys.stdout.write(f"{len(rows)} kernels, {bad} bad\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
