"""The machine of machine.c, and a table of the instructions that work only on registers, as C code for it."""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("machine.c").read_text()
COMMAND = "gcc -O2 -ftree-vectorize -march=native -ffp-contract=off -fwrapv -fno-strict-aliasing -w -shared -fPIC -xc -"
KINDS = ("pure", "branch", "barrier", "return", "load", "store", "atomic_add")
TYPES = {"s32": ctypes.c_int32, "u32": ctypes.c_uint32, "s64": ctypes.c_int64, "u64": ctypes.c_uint64}
TYPES |= {"char": ctypes.c_char, "u8*": ctypes.c_char_p}
SIZES = {"pred": 1} | {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
SIZES |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8}  # bytes a lane
HALVES = ("f16", "bf16")


class Form(NamedTuple):
    """The types of an instruction's result and operands, and the result as a C expression of A, B and C.

    Code that ends in a semicolon works on whole warps instead: `d` is the result, `a`, `b` and `c` are the operands.
    """

    types: tuple[str, ...]
    code: str


def forms() -> dict[str, Form]:
    """List the instructions known."""
    table: dict[str, Form] = {}

    def define(name: str, types: str, code: str, *kinds: str) -> None:
        """Enter an instruction, or, with kinds, one for each in place of T."""
        for kind in kinds or ("T",):
            table[name.replace("T", kind)] = Form(tuple(types.replace("T", kind).split()), code.replace("T", kind))

    signed, unsigned, untyped = (tuple(f"{kind}{bits}" for bits in (16, 32, 64)) for kind in "sub")
    integers, reals = signed + unsigned, ("f32", "f64")
    packed = tuple(f"{kind}x2" for kind in HALVES)

    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
        for rounding in ("", ".rn"):
            define(f"{name}{rounding}.T", "T T T", f"A {sign} B", *reals, *HALVES, *packed)
        define(f"{name}{'.lo' if name == 'mul' else ''}.T", "T T T", f"A {sign} B", *integers)
    define("mad.lo.T", "T T T T", "A * B + C", *integers)
    for kind, bits in (("s", 16), ("s", 32), ("u", 16), ("u", 32)):
        wide = f"{kind}{2 * bits}"
        define("mul.wide.T", f"{wide} T T", f"({wide})A * B", f"{kind}{bits}")
        if bits == 32:
            define("mul.hi.T", "T T T", f"({wide})A * B >> {bits}", f"{kind}{bits}")
        define("mad.wide.T", f"{wide} T T {wide}", f"({wide})A * B + C", f"{kind}{bits}")
    define("div.T", "T T T", "B == 0 ? -1 : B == -1 ? -A : A / B", *signed)
    define("rem.T", "T T T", "B == 0 || B == -1 ? 0 : A % B", *signed)
    define("div.T", "T T T", "B == 0 ? (T)-1 : A / B", *unsigned)
    define("rem.T", "T T T", "B == 0 ? A : A % B", *unsigned)
    define("div.rn.T", "T T T", "A / B", *reals)
    define("fma.rn.T", "T T T T", "fma(A, B, C)", "f64")
    define("fma.rn.T", "T T T T", "fmaf(A, B, C)", "f32")
    define("neg.T", "T T", "-A", *signed, *reals, *HALVES)
    for name, sign in (("min", "<"), ("max", ">")):
        define(f"{name}.T", "T T T", f"A {sign} B ? A : B", *integers)
        define(f"{name}.T", "T T T", f"A {sign} B || B != B ? A : B", *reals)
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        define(f"{name}.T", "T T T", f"A {sign} B", *untyped)
        define(f"{name}.T", "T T T", f"!!A {sign} !!B", "pred")
    define("not.T", "T T", "~A", *untyped)
    define("not.T", "T T", "!A", "pred")
    for bits in (16, 32, 64):
        define("shl.T", "T T b32", f"B < {bits} ? A << B : 0", f"b{bits}")
        define("shr.T", "T T b32", f"B < {bits} ? A >> B : 0", f"u{bits}", f"b{bits}")
        define("shr.T", "T T b32", f"A >> (B < {bits} ? B : {bits - 1})", f"s{bits}")
    define("bfe.T", "T T b32 b32", "B < 32 ? A >> B & (C < 32 ? (1u << C) - 1 : -1u) : 0", "u32")
    define("selp.T", "T T T pred", "C ? A : B", *integers, *untyped, *reals)
    define("mov.T", "T T", "A", *integers, *untyped, *reals, "pred")
    for name, sign in (("eq", "=="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
        define(f"setp.{name}.T", "pred T T", f"A {sign} B", *integers, *untyped, *reals)
    define("setp.ne.T", "pred T T", "A != B", *integers, *untyped)
    define("setp.neu.T", "pred T T", "A != B", *reals)

    for source in integers:
        define(f"cvt.T.{source}", f"T {source}", "A", *integers)
        define(f"cvt.rn.T.{source}", f"T {source}", "A", *reals)
    for byte in ("u8", "s8"):
        for register in ("b16", "b32"):  # which is wider, and which the decoder adds to the name
            define(f"cvt.T.{byte}.{register}", f"T {register}", f"({byte})A", *integers)
    for half in HALVES:
        define(f"cvt.T.{half}", f"T {half}", "A", *reals)
        define(f"cvt.rn.{half}.f32", f"{half} f32", "A")
        define(f"cvt.rn.{half}x2.f32", "b32 f32 f32", f"(b32)to_{half}(A) << 16 | to_{half}(B)")
    define("cvt.f64.f32", "f64 f32", "A")
    define("cvt.rn.f32.f64", "f32 f64", "A")
    for whole, half in (("b32", "b16"), ("b64", "b32")):  # what `mov` between a register and two halves is made of
        define(f"join.{whole}", f"{whole} {half} {half}", f"A | ({whole})B << {half[1:]}")
        define(f"low.{whole}", f"{half} {whole}", "A")
        define(f"high.{whole}", f"{half} {whole}", f"A >> {half[1:]}")

    byte = "u64 x = (u64)b[t] << 32 | a[t]; u32 s = c[t] >> 4 * k, y = x >> 8 * (s & 7) & 255;"
    chosen = f"for (int k = 0; k < 4; k++) {{ {byte} z |= (s & 8 ? y >> 7 ? 255u : 0 : y) << 8 * k; }}"
    define("prmt.b32", "b32 b32 b32 b32", f"EACH {{ u32 z = 0; {chosen} d[t] = z; }};")
    define("shfl.sync.bfly.b32", "b32 b32 b32", "b32 x[LANES]; memcpy(x, a, sizeof x); EACH d[t] = x[t ^ b[t]];")
    total = "T x = 0; for (int t = 0; t < LANES; t++) x += a[t]; EACH d[t] = x;"
    define("redux.sync.add.T", "T T", total, "s32", "u32")
    return table


FORMS = forms()
NUMBERS = {name: number for number, name in enumerate(FORMS)}


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
