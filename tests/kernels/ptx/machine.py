"""The machine of machine.c, compiled once with the instructions of instructions.py: its structures and its library."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.kernels.ptx.instructions import FORMS, HALVES

KINDS = ("pure", "branch", "barrier", "return", "load", "store", "atomic_add")
NUMBERS = {name: number for number, name in enumerate(FORMS)}


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


I32, U32, I64, U64, PTR = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
# As in machine.c, which describes the fields.
Instruction = structure(
    "Instruction",
    **dict.fromkeys(("kind", "handler", "guard", "negated"), I32),
    operands=I32 * 10,
    **dict.fromkeys(("element", "vector", "width", "is_signed", "shared", "target"), I32),
    offset=I64,
)
Region = structure("Region", begin=U64, end=U64, granule=U64, shadow=PTR)
Fault = structure(
    "Fault",
    what=ctypes.c_char * 120,
    **dict.fromkeys(("instruction", "program", "thread", "other_program", "other_thread"), I32),
)
Machine = structure(
    "Machine",
    code=PTR,
    constants=ctypes.c_char_p,
    **dict.fromkeys(("registers", "file", "warps", "shared", "grid", "resident"), I32),
    regions=PTR,
    region_count=I32,
    seed=U32,
)


def handler(name: str) -> str:
    """Write the C function of an instruction."""
    form = FORMS[name]
    types = [t.removesuffix("x2") for t in form.types]
    stored = ["u16" if t in HALVES else "u8" if t == "pred" else t.replace("b", "u") for t in types]
    declared = " ".join(
        f"{t} *{array} = (void *)(registers + operands[{i}]);"
        for i, (array, t) in enumerate(zip("dabc", stored, strict=False))
    )
    body = form.code
    if not body.endswith(";"):
        values = " ".join(
            f"f32 {value} = from_{t}({array}[t]);" if t in HALVES else f"{c} {value} = {array}[t];"
            for value, array, t, c in zip("ABC", "abc", types[1:], stored[1:], strict=False)
        )
        result = f"to_{types[0]}({body})" if types[0] in HALVES else body
        lanes = "EACH_HALF" if form.types[0].endswith("x2") else "EACH"
        body = f"{lanes} {{ {values} d[t] = {result}; }}"
    return f"static void h{NUMBERS[name]}(u8 *registers, const s32 *operands) {{ {declared} {body} }}"


@cache
def library() -> ctypes.CDLL:
    """Compile the machine, once for each version, and load it."""
    ivdep = '_Pragma("GCC ivdep")'
    handlers = [
        "typedef u8 b8; typedef u16 b16; typedef u32 b32; typedef u64 b64;",
        f"#define EACH {ivdep} for (int t = 0; t < LANES; t++)",
        f"#define EACH_HALF {ivdep} for (int t = 0; t < 2 * LANES; t++)",
        *map(handler, FORMS),
        f"static Handler *const HANDLER[] = {{ {', '.join(f'h{i}' for i in range(len(FORMS)))} }};",
        "#undef EACH",
    ]
    source = Path(__file__).with_name("machine.c").read_text().replace("#include HANDLERS", "\n".join(handlers))
    command = (
        "gcc -O2 -ftree-vectorize -march=native -ffp-contract=off -fwrapv -fno-strict-aliasing -w -shared -fPIC -xc -"
    )
    folder = Path(tempfile.gettempdir()) / f"ptx-machine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"{hashlib.sha256((command + source).encode()).hexdigest()[:20]}.so"
    if not built.exists():
        fresh = built.with_suffix(f".{os.getpid()}")  # other processes may build it at the same time
        subprocess.run([*command.split(), "-o", fresh, "-lm"], input=source.encode(), check=True)
        fresh.rename(built)
    loaded = ctypes.CDLL(str(built))
    loaded.launch.restype = ctypes.c_int64
    return loaded
