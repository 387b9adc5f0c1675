"""Run the kernels as compiled for an H100 on CPU tensors, instruction by instruction: `pytest -p tests.ptx`.

Triton compiles for sm_90 down to PTX, which is decoded here and run by the machine in tests/ptx.c. What the machine
refuses raises a `PTXError` that names the instruction, its line in the kernel's source, the program and the thread:

- an access outside of the tensors that the kernel was given, or outside of its shared memory;
- a misaligned access;
- a branch, a barrier or a return that the lanes of a warp do not take together, and a barrier that not all warps reach;
- a race: two accesses to the same memory, of which one writes, that neither barriers nor releases and acquires order.

Warps run in an order that is drawn at random, and several programs at once. Registers and shared memory start as NaN,
and so does what `torch.empty` gives while the plugin is on.

It does not show what ptxas makes of the PTX, nor speed. Approximate instructions give exact results.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import re
import struct
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

H100 = GPUTarget("cuda", 90, 32)
LANES = 32
RESIDENT = 8  # programs that run at once


def use_kernels_for_cpu_tensors(patch: pytest.MonkeyPatch) -> list[Any]:
    """Send CPU tensors to the Triton kernels, and return these. This is all that is known here of fastreg."""
    from fastreg import penalty
    from fastreg.kernels import dropout
    from fastreg.kernels import penalty as kernels

    patch.setitem(penalty.RUNNERS, "cpu", kernels)
    return [kernels.penalty_forward, kernels.penalty_backward, dropout.dropout_forward, dropout.dropout_backward]


class PTXError(RuntimeError):
    """The machine refused an instruction."""


# --- Instructions that work on registers alone: a table, from which C is written -------------------------------------


class Form(NamedTuple):
    """The types of an instruction's result and operands, and the result as a C expression of A, B and C.

    What ends in a semicolon works on whole warps instead: `d` is the result, `a`, `b` and `c` are the operands.
    """

    types: tuple[str, ...]
    code: str


SIZES = {"pred": 1} | {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
SIZES |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "s16x2": 4, "u16x2": 4, "f32": 4, "f64": 8}  # bytes a lane
HALVES = ("f16", "bf16")


def forms() -> dict[str, Form]:
    """List the instructions known."""
    table: dict[str, Form] = {}

    def define(name: str, types: str, code: str, *kinds: str) -> None:
        """Enter an instruction, or, with kinds, one for each in place of T."""
        for kind in kinds or ("T",):
            table[name.replace("T", kind)] = Form(tuple(types.replace("T", kind).split()), code.replace("T", kind))

    signed, unsigned, untyped = (tuple(f"{kind}{bits}" for bits in (16, 32, 64)) for kind in "sub")
    integers = signed + unsigned
    floats = ("f32", "f64", *HALVES)
    packed = tuple(f"{kind}x2" for kind in HALVES)

    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
        for rounding in ("", ".rn"):
            define(f"{name}{rounding}.T", "T T T", f"A {sign} B", *floats, *packed)
        define(f"{name}{'.lo' if name == 'mul' else ''}.T", "T T T", f"A {sign} B", *integers)
    define("mad.lo.T", "T T T T", "A * B + C", *integers)
    for kind, bits in (("s", 16), ("s", 32), ("u", 16), ("u", 32)):
        wide = f"{kind}{2 * bits}"
        define("mul.wide.T", f"{wide} T T", f"({wide})A * B", f"{kind}{bits}")
        define("mad.wide.T", f"{wide} T T {wide}", f"({wide})A * B + C", f"{kind}{bits}")
        define("mul.hi.T", "T T T", f"({wide})A * B >> {bits}", f"{kind}{bits}")
    define("div.T", "T T T", "B == 0 ? -1 : B == -1 ? -A : A / B", *signed)
    define("rem.T", "T T T", "B == 0 || B == -1 ? 0 : A % B", *signed)
    define("div.T", "T T T", "B == 0 ? (T)-1 : A / B", *unsigned)
    define("rem.T", "T T T", "B == 0 ? A : A % B", *unsigned)
    define("div.full.T", "T T T", "A / B", "f32")
    define("div.rn.T", "T T T", "A / B", "f32", "f64")
    define("fma.rn.T", "T T T T", "fmaf(A, B, C)", "f32")
    define("fma.rn.T", "T T T T", "fma(A, B, C)", "f64")
    define("neg.T", "T T", "-A", *signed, *floats)
    define("abs.T", "T T", "A < 0 ? -A : A", *signed)
    define("abs.T", "T T", "fabs(A)", *floats)
    for name, sign in (("min", "<"), ("max", ">")):
        define(f"{name}.T", "T T T", f"A {sign} B ? A : B", *integers, "s16x2", "u16x2")
        define(f"{name}.T", "T T T", f"A {sign} B || B != B ? A : B", *floats)
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
    define("selp.T", "T T T pred", "C ? A : B", *integers, *untyped, "f32", "f64")
    define("mov.T", "T T", "A", *integers, *untyped, "f32", "f64", "pred")
    for name, sign in (("eq", "=="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
        define(f"setp.{name}.T", "pred T T", f"A {sign} B", *integers, *untyped, *floats)
        define(f"setp.{name}u.T", "pred T T", f"A {sign} B || A != A || B != B", *floats)
    define("setp.ne.T", "pred T T", "A != B", *integers, *untyped)
    define("setp.ne.T", "pred T T", "A < B || A > B", *floats)
    define("setp.neu.T", "pred T T", "A != B", *floats)
    define("setp.nan.T", "pred T T", "A != A || B != B", *floats)
    define("setp.num.T", "pred T T", "A == A && B == B", *floats)

    for source in integers:
        define(f"cvt.T.{source}", f"T {source}", "A", *integers)
        define(f"cvt.rn.T.{source}", f"T {source}", "A", "f32", "f64")
    for byte in ("u8", "s8"):  # in a register of 16 bits
        define(f"cvt.T.{byte}", "T b16", f"({byte})A", *integers)
    for half in HALVES:
        define(f"cvt.T.{half}", f"T {half}", "A", "f32", "f64")
        define(f"cvt.rn.{half}.f32", f"{half} f32", "A")
        define(f"cvt.rn.{half}x2.f32", "b32 f32 f32", f"(b32)to_{half}(A) << 16 | to_{half}(B)")
    define("cvt.f64.f32", "f64 f32", "A")
    define("cvt.rn.f32.f64", "f32 f64", "A")
    for whole, half in (("b32", "b16"), ("b64", "b32")):  # what `mov` between a register and two halves is made of
        bits = half[1:]
        define(f"join.{whole}", f"{whole} {half} {half}", f"A | ({whole})B << {bits}")
        define(f"low.{whole}", f"{half} {whole}", "A")
        define(f"high.{whole}", f"{half} {whole}", f"A >> {bits}")

    define("shfl.sync.bfly.b32", "b32 b32 b32", "b32 x[LANES]; memcpy(x, a, sizeof x); EACH d[t] = x[t ^ b[t]];")
    for name, step in (("add", "x + a[t]"), ("min", "a[t] < x ? a[t] : x"), ("max", "a[t] > x ? a[t] : x")):
        fold = f"T x = a[0]; for (int t = 1; t < LANES; t++) x = {step}; EACH d[t] = x;"
        define(f"redux.sync.{name}.T", "T T", fold, "s32", "u32")
    return table


FORMS = forms()
NUMBERS = {name: number for number, name in enumerate(FORMS)}


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
    """Compile the machine, once for each version of it, and load it."""
    ivdep = '_Pragma("GCC ivdep")'
    handlers = [
        "typedef u8 b8; typedef u16 b16; typedef u32 b32; typedef u64 b64;",
        f"#define EACH {ivdep} for (int t = 0; t < LANES; t++)",
        f"#define EACH_HALF {ivdep} for (int t = 0; t < 2 * LANES; t++)",
        *map(handler, FORMS),
        f"static Handler *const HANDLER[] = {{ {', '.join(f'h{i}' for i in range(len(FORMS)))} }};",
        "#undef EACH",
    ]
    source = Path(__file__).with_suffix(".c")
    flags = ["-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing", "-w"]
    key = hashlib.sha256("\n".join([*handlers, *flags, source.read_text()]).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"ptx-machine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            header, fresh = Path(scratch) / "handlers.h", Path(scratch) / "machine.so"
            header.write_text("\n".join(handlers))
            command = ["gcc", *flags, f'-DHANDLERS="{header}"', "-shared", "-fPIC", source, "-o", fresh, "-lm"]
            subprocess.run(command, check=True)
            fresh.rename(built)
    loaded = ctypes.CDLL(str(built))
    loaded.launch.restype = ctypes.c_int64
    return loaded


# --- From the text of PTX to what the machine runs -------------------------------------------------------------------

KINDS = ("pure", "branch", "barrier", "return", "parameter", "load", "store", "atomic_add", "ldmatrix", "stmatrix")
ORDERS = {"relaxed": 0, "acquire": 1, "release": 2, "acq_rel": 3}
HINTS = {"cg", "ca", "cs", "lu", "cv", "wb", "wt", "nc"}  # of caches, which the machine does not have


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


I32, U32, I64, U64, PTR = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
# As in ptx.c, which says what the fields are.
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
    address=U64,
)
Machine = structure(
    "Machine",
    **dict.fromkeys(("code", "parameters", "constants"), PTR),
    **dict.fromkeys(("registers", "file", "lane_ids", "program_ids", "grid_sizes"), I32),
    **dict.fromkeys(("warps", "shared", "grid", "resident"), I32),
    regions=PTR,
    region_count=I32,
    seed=U32,
)


class Line(NamedTuple):
    """A statement of PTX, and where it comes from in the source of the kernel."""

    text: str
    source: str

    def __str__(self) -> str:
        return f"`{self.text}` ({self.source})"


class Decoder:
    """Turn the PTX of one kernel into instructions of the machine.

    A register is an offset into the register file of a warp, where it has a place for each lane. Special registers and
    constants have places there, too, behind the registers.
    """

    def __init__(self, ptx: str):
        text = re.sub(r"//[^\n]*", "", ptx)
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)^\{(.*?)^\}", text, re.M | re.S)
        if entry is None:
            raise NotImplementedError("PTX without an entry")
        self.name, parameters, _, body = entry.groups()
        self.files = {number: path for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
        self.parameters: dict[str, tuple[int, int]] = {}  # offset and bytes
        self.parameter_bytes = 0
        for parameter in filter(str.strip, parameters.split(",")):
            self.add_parameter(parameter.split())
        self.places: dict[str, tuple[int, int]] = {}  # registers: offset and bytes a lane
        self.file = 0
        for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]*);", body):
            for name in names.split(","):
                self.add_registers(name.strip(), SIZES[kind])
        self.registers = self.file
        for special in ("%tid.x", "%ctaid.x", "%nctaid.x"):
            self.places[special] = self.place(4)
        self.constants: dict[tuple[int, int], int] = {}  # bits and bytes a lane -> offset
        self.lines: list[Line] = []
        self.code: list[Any] = []
        labels: dict[str, int] = {}
        branches: list[tuple[Any, str]] = []
        for line in statements(body, self.files):
            if line.text.endswith(":"):
                labels[line.text[:-1]] = len(self.code)
                continue
            for instruction in self.decode(line.text):
                self.code.append(instruction)
                self.lines.append(line)
                if instruction.kind == KINDS.index("branch"):
                    branches.append((instruction, line.text.split()[-1]))
        for instruction, label in branches:
            instruction.target = labels[label]

    def add_parameter(self, words: list[str]) -> None:
        size = SIZES[words[1][1:]]
        self.parameter_bytes = -(-self.parameter_bytes // size) * size
        self.parameters[words[-1]] = self.parameter_bytes, size
        self.parameter_bytes += size

    def place(self, size: int) -> tuple[int, int]:
        self.file += size * LANES
        return self.file - size * LANES, size

    def add_registers(self, declared: str, size: int) -> None:
        name, count = re.fullmatch(r"(%?\w+)(?:<(\d+)>)?", declared).groups()  # pyright: ignore
        for register in [name] if count is None else [f"{name}{i}" for i in range(int(count))]:
            if register not in self.places:  # else declared in another scope, too
                self.places[register] = self.place(size)

    def constant(self, bits: int, size: int) -> int:
        key = bits % 2 ** (8 * size), size
        if key not in self.constants:
            self.constants[key] = self.place(size)[0]
        return self.constants[key]

    def image(self) -> bytes:
        """What the register file holds behind the registers; the machine fills in the special registers."""
        image = bytearray(self.file - self.registers)
        for (bits, size), offset in self.constants.items():
            start = offset - self.registers
            image[start : start + size * LANES] = bits.to_bytes(size, "little") * LANES
        return bytes(image)

    def operand(self, text: str, size: int) -> int:
        """The place of a register or a constant that has `size` bytes a lane."""
        if text in self.places:
            offset, its = self.places[text]
            if its != size:
                raise NotImplementedError(f"{text} has {its} bytes where {size} are expected")
            return offset
        if text in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z", "global_smem"):
            return self.constant(0, size)
        if number := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8,16})", text):
            return self.constant(int(number[1], 16), size)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self.constant(int(text.rstrip("U"), 0), size)
        raise NotImplementedError(f"operand {text}")

    def decode(self, text: str) -> Iterator[Any]:
        match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if match is None:
            raise NotImplementedError(text)
        negation, guard, name, rest = match.groups()
        try:
            for instruction in self.instructions(name, split(rest)):
                instruction.guard = -1 if guard is None else self.operand(guard, 1)
                instruction.negated = negation == "!"
                if guard is not None and name.split(".")[1:2] == ["sync"] and name != "bar.sync":
                    raise NotImplementedError("an exchange between lanes under a predicate")
                yield instruction
        except (KeyError, ValueError, NotImplementedError) as error:
            raise NotImplementedError(f"cannot run `{text}`: {error}") from error

    def instructions(self, name: str, operands: list[str]) -> Iterator[Any]:
        base, *parts = name.split(".")
        if base == "bra":
            yield make("branch")
        elif name in ("ret", "exit"):
            yield make("return")
        elif name == "bar.sync" and operands == ["0"]:
            yield make("barrier")
        elif base == "createpolicy":
            return  # of caches
        elif name.startswith("ld.param."):
            symbol, offset = address(operands[1])
            instruction = self.access("parameter", parts, [operands[0]])
            instruction.offset = self.parameters[symbol][0] + offset
            yield instruction
        elif base == "ld":
            yield self.access("load", parts, operands[:1], operands[1])
        elif base == "st":
            yield self.access("store", parts, operands[1:2], operands[0])
        elif base in ("atom", "red"):
            to = operands[0] if base == "atom" else "_"
            where, value = operands[-2:]
            yield self.access("atomic_add", parts, [to, value], where)
        elif base in ("ldmatrix", "stmatrix"):
            registers, where = operands if base == "ldmatrix" else operands[::-1]
            yield self.matrix(base, parts, registers, where)
        elif base == "mov" and "{" in operands[1]:
            yield self.pure(f"join.{parts[0]}", [operands[0], *group(operands[1])])
        elif base == "mov" and "{" in operands[0]:
            for half, to in zip(("low", "high"), group(operands[0]), strict=True):
                if to != "_":
                    yield self.pure(f"{half}.{parts[0]}", [to, operands[1]])
        elif base == "shfl":
            if operands[3:] not in (["31", "-1"], ["0x1f", "-1"]) or "|" in operands[0]:
                raise NotImplementedError("not all lanes take part")
            yield self.pure(name, operands[:3])
        elif base == "redux":
            yield self.pure(name, operands[:2])  # the third is a mask of lanes, in a register: all
        else:
            yield self.pure(name, operands)

    def pure(self, name: str, operands: list[str]) -> Any:
        types = FORMS[name].types
        places = [self.operand(x, SIZES[t]) for x, t in zip(operands, types, strict=True)]
        return make("pure", places, handler=NUMBERS[name], width=SIZES[types[0]])

    def access(self, kind: str, parts: list[str], registers: list[str], where: str | None = None) -> Any:
        """A load or a store of a vector of registers, or an atomic addition that has a result and a value."""
        *modifiers, kind_of_element = parts
        known = {p for p in modifiers if p in HINTS or p.startswith(("L1::", "L2::"))}
        spaces = [p for p in modifiers if p in ("global", "shared", "shared::cta", "param")]
        vectors = [p for p in modifiers if re.fullmatch(r"v[248]", p)]
        scopes = [p for p in modifiers if p in ("cta", "gpu", "sys")] if kind == "atomic_add" else []
        orders = [p for p in modifiers if p in ORDERS] if kind == "atomic_add" else []
        known |= {*spaces, *vectors, *scopes, *orders} | ({"add"} if kind == "atomic_add" else set())
        if len(spaces) != 1 or {*modifiers} != known or (kind == "atomic_add" and kind_of_element[0] == "f"):
            raise NotImplementedError("a form of access that is not known")
        names = [x for register in registers for x in (group(register) if "{" in register else [register])]
        sizes = {self.places[x][1] for x in names if x in self.places} or {SIZES[kind_of_element]}
        (width,) = sizes
        shared = spaces[0].startswith("shared")
        base = 0
        offset = 0
        if where is not None:
            symbol, offset = address(where)
            base = self.operand(symbol, 4 if shared else 8)
        # Within one program alone an order orders nothing between programs.
        order = 0 if scopes == ["cta"] else sum(ORDERS[o] for o in orders)
        return make(
            kind,
            [base, *(-1 if x == "_" else self.operand(x, width) for x in names)],
            element=SIZES[kind_of_element],
            vector=len(names) if kind != "atomic_add" else 1,
            width=width,
            is_signed=kind_of_element[0] == "s" and kind != "store",
            shared=shared,
            target=order,
            offset=offset,
        )

    def matrix(self, base: str, parts: list[str], registers: str, where: str) -> Any:
        names = group(registers)
        if {*parts} - {"sync", "aligned", "m8n8", f"x{len(names)}", "trans", "shared", "shared::cta", "b16"}:
            raise NotImplementedError("a form of access that is not known")
        symbol, offset = address(where)
        places = [self.operand(symbol, 4), *(self.operand(x, 4) for x in names)]
        return make(base, places, vector=len(names), is_signed="trans" in parts, shared=True, offset=offset)


def make(kind: str, operands: Sequence[int] = (), **fields: int) -> Any:
    padded = (*operands, *[-1] * (10 - len(operands)))
    return Instruction(kind=KINDS.index(kind), operands=padded, guard=-1, **fields)


def statements(body: str, files: dict[str, str]) -> Iterator[Line]:
    """The instructions and labels of a function, each with the line of the source that it was made for."""
    source, pending = "?", ""
    for line in body.splitlines():
        words = line.split()
        if words[:1] == [".loc"]:
            source = f"{files.get(words[1], '?')}:{words[2]}"
        elif words[:1] and re.fullmatch(r"[$\w]+:", words[0]):
            yield Line(words[0], source)
        else:
            *whole, pending = f"{pending} {line}".split(";")
            for statement in whole:
                text = re.sub(r"^[{}\s]+", "", " ".join(statement.split()))
                if text and not text.startswith("."):
                    yield Line(text, source)


def split(operands: str) -> list[str]:
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands) if x.strip()]


def group(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]


def address(operand: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if match is None:
        raise NotImplementedError(f"address {operand}")
    return match[1], int(match[2] or 0)


# --- A driver for Triton ---------------------------------------------------------------------------------------------


class H100Backend(CUDABackend):
    """Compile for NVIDIA GPUs as far as PTX, which is this backend's binary."""

    def __init__(self, target: Any):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], *options: Any) -> None:
        super().add_stages(stages, *options)
        del stages["cubin"]

    def hash(self) -> str:
        return f"ptx-{super().hash()}"  # the cache on disk must not mix up what lacks a cubin


class Argument(NamedTuple):
    """A tensor that a kernel was given: its name, and from where to where its elements lie in memory."""

    name: str
    begin: int
    end: int
    itemsize: int


@dataclass
class Kernel:
    """A kernel that was loaded: its decoded PTX, and the threads and the shared memory of a program."""

    decoded: Decoder
    shared: int

    def __post_init__(self) -> None:
        self.code = (Instruction * len(self.decoded.code))(*self.decoded.code)
        self.constants = self.decoded.image()


class Executor:
    """A driver of Triton whose launches run PTX on CPU tensors. Set it as `triton.runtime.driver._active`."""

    def __init__(self) -> None:
        self.utils = self
        self.random = random.Random(0)
        self.kernels: list[Kernel] = []
        self.launches = self.programs = self.steps = 0
        self.switches: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "warpSize": LANES}

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.kernels.append(Kernel(Decoder(ptx.decode()), shared))
        return len(self.kernels) - 1, len(self.kernels) - 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        if metadata.num_ctas != 1 or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("clusters, or scratch memory")
        for name, kind in source.signature.items():
            value = source.constants.get((source.fn.arg_names.index(name),)) if kind == "constexpr" else "given"
            if value is None or value == "given" or isinstance(value, bool):
                self.switches[source.fn.__name__][name].add(str(value))

        def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            _, _, _, *arguments = rest  # metadata and hooks of the launch
            if (y, z) != (1, 1):
                raise NotImplementedError("a grid of more than one axis")
            given = list(flat(source.signature.items(), arguments))
            self.launch(self.kernels[function], x, metadata.num_warps, given)

        return launch

    def launch(self, kernel: Kernel, grid: int, warps: int, given: list[tuple[str, str, Any]]) -> None:
        """Run `grid` programs. `given` has the names, types and values of the arguments that are not constants."""
        decoded = kernel.decoded
        tensors = [argument(name, x) for name, kind, x in given if kind[0] == "*" and x is not None]
        values = [packed(kind, x) for _, kind, x in given]
        values += [bytes(8)] * (len(decoded.parameters) - len(values))  # of scratch memory that there is none of
        block = bytearray(decoded.parameter_bytes)
        for (offset, size), value in zip(decoded.parameters.values(), values, strict=True):
            if len(value) != size:
                raise TypeError(f"{decoded.name}: a parameter has {size} bytes, its argument {len(value)}")
            block[offset : offset + size] = value
        merged = regions(tensors)
        memory, parameters = (Region * len(merged))(*merged), (ctypes.c_char * len(block)).from_buffer(block)
        machine = Machine(
            code=ctypes.addressof(kernel.code),
            parameters=ctypes.addressof(parameters),
            constants=ctypes.cast(kernel.constants, PTR),
            registers=decoded.registers,
            file=decoded.file,
            lane_ids=decoded.places["%tid.x"][0],
            program_ids=decoded.places["%ctaid.x"][0],
            grid_sizes=decoded.places["%nctaid.x"][0],
            warps=warps,
            shared=kernel.shared,
            grid=grid,
            resident=min(grid, RESIDENT),
            regions=ctypes.addressof(memory),
            region_count=len(merged),
            seed=self.random.getrandbits(32),
        )
        fault = Fault(other_program=-1)
        steps = library().launch(ctypes.byref(machine), ctypes.byref(fault))
        if steps < 0:
            raise PTXError(explain(decoded, fault, tensors))
        self.launches, self.programs, self.steps = self.launches + 1, self.programs + grid, self.steps + steps


def flat(signature: Any, arguments: Any) -> Iterator[tuple[str, str, Any]]:
    """Names, types and values of what is not constant, tuples taken apart."""
    for (name, kind), value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from flat([(f"{name}[{i}]", k) for i, k in enumerate(kind)], value)
        elif kind != "constexpr":
            yield name, kind, value


def argument(name: str, x: torch.Tensor) -> Argument:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return Argument(name, x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size(), x.element_size())


def packed(kind: str, value: Any) -> bytes:
    """An argument as it lies in the memory of parameters."""
    if kind[0] == "*":
        return struct.pack("<Q", 0 if value is None else value.data_ptr())
    formats = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
    formats |= {"u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
    return struct.pack(f"<{formats[kind]}", value)


def regions(tensors: list[Argument]) -> list[Any]:
    """The memory of the tensors; where they overlap, in one piece."""
    merged: list[Any] = []
    for x in sorted(tensors, key=lambda x: x.begin):
        if merged and x.begin < merged[-1].end:
            merged[-1].end = max(merged[-1].end, x.end)
            merged[-1].granule = min(merged[-1].granule, x.itemsize)
        else:
            merged.append(Region(begin=x.begin, end=x.end, granule=x.itemsize))
    return merged


def explain(decoded: Decoder, fault: Any, tensors: list[Argument]) -> str:
    message = f"{fault.what.decode()}: {decoded.lines[fault.instruction]}, "
    message += f"program {fault.program}, thread {fault.thread}"
    if fault.address:
        message += f", address {fault.address:#x}"
        near = [(max(x.begin - fault.address, fault.address - x.end + 1, 0), x) for x in tensors]
        distance, nearest = min(near, default=(1 << 32, None))
        if nearest is not None and distance < 1 << 32:
            message += f", {fault.address - nearest.begin} bytes from the start of {nearest.name}"
            message += f", which has {nearest.end - nearest.begin}"
    if fault.other_program >= 0:
        its = f"thread {fault.other_thread}" if fault.other_thread >= 0 else "several threads"
        message += f"; the other: program {fault.other_program}, {its}"
    return f"{decoded.name}: {message}"


@contextmanager
def executed(executor: Executor, kernels: Sequence[Any] = ()) -> Iterator[Executor]:
    """Have Triton compile for an H100, and run on CPU tensors what it compiles; `kernels` are compiled anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends, "nvidia", Backend(compiler=H100Backend, driver=Executor))  # pyright: ignore
        patch.setattr(driver, "_active", executor)
        for kernel in kernels:
            patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        yield executor


# --- A plugin for pytest ---------------------------------------------------------------------------------------------


def scrambled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.empty`, or its like, with NaN in the memory of CPU tensors that are not huge."""

    def fresh(*arguments: Any, **options: Any) -> torch.Tensor:
        x = make(*arguments, **options)
        if x.device.type == "cpu" and x.nbytes < 2**26:
            x.detach().fill_(torch.nan if x.dtype.is_floating_point else torch.iinfo(x.dtype).max)
        return x

    return fresh


EXECUTOR, KERNELS = pytest.StashKey[Executor](), pytest.StashKey[list[Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx-sample",
        type=int,
        default=0,
        metavar="N",
        help="run each N-th case of each test, and fail if a kernel did not run with each of its switches on and off",
    )


def pytest_configure(config: pytest.Config) -> None:
    patch, context = pytest.MonkeyPatch(), executed(Executor())
    config.stash[EXECUTOR] = context.__enter__()
    config.stash[KERNELS] = use_kernels_for_cpu_tensors(patch)
    config.add_cleanup(lambda: context.__exit__(None, None, None))
    config.add_cleanup(patch.undo)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU, and what the sample has not drawn."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu") is None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    every = config.getoption("ptx_sample") or 1
    kept = {item for of_test in cases.values() for item in of_test[::every]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def ptx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test with the same schedules, and with memory that holds nothing of use."""
    request.config.stash[EXECUTOR].random.seed(0)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, scrambled(getattr(torch, name)))


def not_covered(run: Executor, kernels: list[Any]) -> list[str]:
    """Name the kernels that did not run, and the switches that were never on or never off."""
    missing = [kernel.__name__ for kernel in kernels if kernel.__name__ not in run.switches]
    halves = ({"True"}, {"False"}, {"None"})
    return missing + [f"{k}: {name}" for k, seen in run.switches.items() for name in seen if seen[name] in halves]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    missing = not_covered(config.stash[EXECUTOR], config.stash[KERNELS])
    if config.getoption("ptx_sample") and missing and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[EXECUTOR]
    terminalreporter.write_line(
        f"PTX: {len(run.kernels)} kernels as compiled for sm_90, {run.launches} launches, {run.programs} programs, "
        f"{run.steps / 1e6:.0f} million instructions of a warp"
    )
    if missing := not_covered(run, config.stash[KERNELS]):
        terminalreporter.write_line(f"PTX: never on, or never off: {', '.join(missing)}")
