"""Compiles what the Triton backend launches, for GPUs that need not be there; prints what came out as JSON lines.

A script for a process without TRITON_INTERPRET: under the interpreter nothing can be compiled.

    python triton_offline.py '[["loss", "bf16", 4096, {}], ...]' 90

The operators run as ever, on the meta device, but for their launches: these are compiled with the types, constants and
alignments that Triton would find in the arguments.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ncmi_kernels._schema import CLASS_WEIGHTS, COEFFICIENTS, ROW_STATS
from ncmi_kernels._triton import OPERATORS as ops
from ncmi_kernels._triton import launches

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
POINTERS = {dtype: f"*{name}" for name, dtype in DTYPES.items()} | {torch.int64: "*i64", torch.int32: "*i32"}


def source_of(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """A launch's kernel, as Triton specialises it."""
    assert arguments.keys() == set(kernel.arg_names), arguments.keys() ^ set(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, varies = arguments[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not varies):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            divisible = True  # by 16 bytes, as what torch allocates is
        else:
            assert type(value) is int, (parameter.name, value)
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible and not varies:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


@contextlib.contextmanager
def recorded(found: list[tuple[Any, dict[str, Any], dict[str, Any]]]):
    """Every launch goes to the list."""
    launch = launches.launch
    launches.launch = lambda kernel, grid, *, warps=4, debug=False, **arguments: found.append(
        (kernel, arguments, {"num_warps": warps, "debug": debug, **launches.COMPILING})
    )
    yield
    launches.launch = launch


def launches_of(operator: str, dtype: str, columns: int, options: dict[str, Any]) -> list[Any]:
    """What an operator launches, with the defaults of the module NCMILoss or these options."""
    rows, classes = options.get("rows", 4096), options.get("classes", 1000)
    softmax, c2s = options.get("activation") == "softmax", options.get("centroid_to_sample", False)
    temperature, l2 = options.get("temperature", 1.0), options.get("l2_normalize", True)
    wide = torch.float64 if dtype == "fp64" else torch.float32
    with torch.device("meta"):
        z, y = torch.empty(rows, columns, dtype=DTYPES[dtype]), torch.empty(rows, dtype=torch.int64)
        xi, center = torch.empty(classes, columns, dtype=wide), torch.empty(columns, dtype=wide)
        batches, upstream = torch.empty((), dtype=torch.int64), torch.empty((), dtype=wide)
        saved, coefficients = (torch.empty(rows, n, dtype=torch.float64) for n in (ROW_STATS, COEFFICIENTS))
        terms = torch.empty(2, rows, dtype=torch.float64)
        row_reference, row_own = (
            torch.empty(rows, columns, dtype=wide) if options.get(name) else None
            for name in ("row_reference", "row_own")
        )
        level, sums = (torch.empty(shape, dtype=torch.float64) for shape in ((2, classes), (classes, CLASS_WEIGHTS)))
        product, weighted = torch.empty(rows, classes, dtype=wide), torch.empty(classes, columns, dtype=wide)
        of_class = (sums, weighted) if options.get("class_weights") else ()
    several = options.get("centroids_per_class", 1)
    found: list[Any] = []
    with recorded(found):
        stats = ops.centroid_stats(xi, softmax, c2s)
        if operator != "centroid_stats":
            found.clear()
        if operator == "terms":
            ops.terms(z, y, center, *stats, temperature, l2, softmax, c2s, -100)
        elif operator == "reduce":
            ops.reduce(terms, saved, y, None, None, c2s, False, True, 1, 1e-8, 0.0, -100)
        elif operator == "loss":
            sample = options.get("ratio", "batch") == "sample"
            ops.loss(
                *(z, y, None, center, batches, 0.9, *stats, None, temperature, l2, softmax, c2s, not sample, 1, 1e-8),
                *(0.0, -100, sample and dtype not in ("bf16", "fp16")),
            )
        elif operator == "input_grad":
            ops.input_grad(z, y, center, *stats, saved, coefficients, upstream, c2s, -100, row_reference, row_own)
        elif operator == "centroid_grad":
            ops.centroid_grad(z, y, center, xi, *stats, saved, coefficients, upstream, c2s, -100, None, *of_class)
        elif operator == "centroid_step_":
            sgd = 0.1, 0.9, 5e-4, True
            momenta = torch.empty_like(xi)
            ops.centroid_step_(
                z, y, center, xi, momenta, *stats, saved, coefficients, softmax, c2s, -100, *sgd, *of_class
            )
        elif operator == "scale_":
            ops.scale_(z, upstream)
        elif operator == "focus_table":
            ops.focus_table(*stats, c2s)
        elif operator == "focus_rows":
            ops.focus_rows(z, y, center, *stats, saved, c2s, -100)
        elif operator == "focus_weights_":
            shared = saved.new_empty(3, rows) if options.get("shared") else None
            ops.focus_weights_(product, terms[1], saved, y, stats[3], level, 10.0, c2s, -100, several, shared)
        elif operator == "focus_nearest":
            ops.focus_nearest(product, saved, y, stats[3], level, c2s, -100, several)
        elif operator == "focus_sums_":
            ops.focus_sums_(product, sums, saved, coefficients, y, c2s, -100)
    return found


def sass_of(cubin: Path) -> list[str]:
    """Opcodes, less what stands past the target of a BRA.DIV: the same again, for warps whose threads went apart."""
    listing = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", listing)
    apart = [int(re.findall(r"0x([0-9a-f]+)", rest)[-1], 16) for _, op, rest in found if op == "BRA.DIV"]
    code = [op for address, op, _ in found if int(address, 16) < min(apart, default=1 << 62)]
    # The padding after the last branch is never run.
    while code and code[-1] in ("NOP", "BRA"):
        code.pop()
    return code


def traffic(ptx: str, source: ASTSource) -> dict[str, Any]:
    """The bits that a thread loads and stores once through the program, and the widest access, by pointer argument."""
    pointers = [name for name, kind in source.signature.items() if kind != "constexpr"]
    leads: dict[str, set[str]] = {}  # where a register may point
    instructions = [line.strip() for line in ptx.splitlines() if line.startswith("\t")]
    while True:  # registers of loops depend on themselves
        before = sum(map(len, leads.values()))
        for line in instructions:
            parameter = re.match(r"ld\.param\.\S+\s+(%rd\d+), \[\w+_param_(\d+)\]", line)
            if (
                parameter
                and int(parameter[2]) < len(pointers)
                and source.signature[pointers[int(parameter[2])]][0] == "*"
            ):
                leads.setdefault(parameter[1], set()).add(pointers[int(parameter[2])])
            elif arithmetic := re.match(r"(?:@\S+ )?(?:add|mad|mov|selp|cvta|sub|or)\.\S+\s+(%rd\d+), (.*);", line):
                sources = re.findall(r"%rd\d+", arithmetic[2])
                leads.setdefault(arithmetic[1], set()).update(*(leads.get(name, set()) for name in sources))
        if sum(map(len, leads.values())) == before:
            break
    found: dict[str, Any] = {"loads": {}, "stores": {}, "widest": {}}
    for line in instructions:
        access = re.match(r"(?:@\S+ )?(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\s.*?\[\s*(%rd\d+)", line)
        if not access:
            assert not re.match(r"(?:@\S+ )?(ld|st|atom|red|cp)\.(global|async)", line), line
            continue
        (name,) = leads[access[4]]
        bits = int(access[2] or 1) * int(access[3])
        kind = found["loads" if access[1] == "ld" else "stores"]
        kind[name] = kind.get(name, 0) + bits
        found["widest"][name] = max(bits, found["widest"].get(name, 0))
    return found


def measure(source: ASTSource, target: int, options: dict[str, Any]) -> dict[str, Any]:
    """Resources of a kernel, and what it consists of."""
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True)
        sass = sass_of(cubin)
    found = {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    constants = {source.fn.arg_names[i]: value for (i,), value in source.constants.items()}
    return found | {
        "kernel": source.fn.__name__,
        "shared": compiled.metadata.shared,
        "spilled": sum(op.split(".")[0] in ("STL", "LDL") for op in sass),
        "sass": len(sass),
        "elements": constants.get("ROWS", 1)
        * constants.get("COLUMNS", 1)
        * max(1, constants.get("STRETCHES", 1))
        / (32 * options["num_warps"]),
        # A small tile has copies of its elements in several threads.
        "reread": max(1, n / (32 * options["num_warps"]))
        if (n := (constants.get("RESCUE") or 0) * constants.get("ROWS", 1))
        else 0,
        **traffic(compiled.asm["ptx"], source),
    }


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        for kernel, arguments, options in launches_of(*case):
            for target in map(int, sys.argv[2].split(",")):
                result = measure(source_of(kernel, arguments), target, options)
                print(json.dumps({"case": case, "target": target, **result}), flush=True)
