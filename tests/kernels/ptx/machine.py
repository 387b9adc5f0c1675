"""The machine of machine.c, compiled with the instructions of instructions.py: its structures and its library."""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.kernels.ptx.instructions import FORMS, HALVES

SOURCE = Path(__file__).with_name("machine.c").read_text()
COMMAND = "gcc -O2 -ftree-vectorize -march=native -ffp-contract=off -fwrapv -fno-strict-aliasing -w -shared -fPIC -xc -"
KINDS = ("pure", "branch", "barrier", "return", "load", "store", "atomic_add")
NUMBERS = {name: number for number, name in enumerate(FORMS)}
TYPES = {"s32": ctypes.c_int32, "u32": ctypes.c_uint32, "s64": ctypes.c_int64, "u64": ctypes.c_uint64}
TYPES |= {"char": ctypes.c_char, "u8*": ctypes.c_char_p}


def structure(name: str) -> Any:
    """Return a structure of machine.c, which describes its fields."""
    (body,) = re.findall(rf"typedef struct {{([^}}]*)}} {name};", SOURCE)
    fields = []
    for kind, names in re.findall(r"(\w+) ([^;]+);", re.sub(r"//.*|const ", "", body)):
        for pointer, field, length in re.findall(r"(\*?)(\w+)(?:\[(\d+)\])?", names):
            its = TYPES.get(kind + pointer, ctypes.c_void_p)
            fields.append((field, its * int(length) if length else its))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Instruction, Region, Fault, Machine = map(structure, ("Instruction", "Region", "Fault", "Machine"))


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
    """Compile the machine, and load it."""
    ivdep = '_Pragma("GCC ivdep")'
    handlers = [
        "typedef u8 b8; typedef u16 b16; typedef u32 b32; typedef u64 b64;",
        f"#define EACH {ivdep} for (int t = 0; t < LANES; t++)",
        f"#define EACH_HALF {ivdep} for (int t = 0; t < 2 * LANES; t++)",
        *map(handler, FORMS),
        f"static Handler *const HANDLER[] = {{ {', '.join(f'h{i}' for i in range(len(FORMS)))} }};",
        "#undef EACH",
    ]
    source = SOURCE.replace("#include HANDLERS", "\n".join(handlers)).encode()
    with TemporaryDirectory() as folder:
        built = f"{folder}/machine.so"
        subprocess.run([*COMMAND.split(), "-o", built, "-lm"], input=source, check=True)
        loaded = ctypes.CDLL(built)
    loaded.launch.restype = ctypes.c_int64
    return loaded
