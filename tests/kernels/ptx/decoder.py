"""Decode the text of PTX into the instructions of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.kernels.ptx.instructions import FORMS, SIZES
from tests.kernels.ptx.machine import KINDS, NUMBERS, Instruction

LANES = 32
ORDERS = {"relaxed": 0, "acquire": 1, "release": 2, "acq_rel": 3}
HINTS = {"cg", "ca", "cs", "lu", "cv", "wb", "wt", "nc"}  # of caches, which the machine does not have


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
        """Return the constants behind the registers; the machine fills in the special registers."""
        image = bytearray(self.file - self.registers)
        for (bits, size), offset in self.constants.items():
            start = offset - self.registers
            image[start : start + size * LANES] = bits.to_bytes(size, "little") * LANES
        return bytes(image)

    def operand(self, text: str, size: int) -> int:
        """Return the place of a register or a constant that has `size` bytes a lane."""
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
        elif base == "mov" and "{" in operands[1]:
            yield self.pure(f"join.{parts[0]}", [operands[0], *group(operands[1])])
        elif base == "mov" and "{" in operands[0]:
            for half, to in zip(("low", "high"), group(operands[0]), strict=True):
                if to != "_":
                    yield self.pure(f"{half}.{parts[0]}", [to, operands[1]])
        elif base == "setp" and "|" in operands[0]:
            for half, to in zip(("low", "high"), operands[0].split("|"), strict=True):
                yield self.pure(f"{half}.{name}", [to, *operands[1:]])
        elif base == "shfl":
            if operands[3:] not in (["31", "-1"], ["0x1f", "-1"]) or "|" in operands[0]:
                raise NotImplementedError("not all lanes take part")
            yield self.pure(name, operands[:3])
        elif base == "redux":
            yield self.pure(name, operands[:2])  # the third is a register with the lanes that take part: all of a warp
        elif base == "cvt" and parts[-1] in ("u8", "s8") and self.places[operands[1]][1] == 4:
            yield self.pure(f"{name}.b32", operands)
        else:
            yield self.pure(name, operands)

    def pure(self, name: str, operands: list[str]) -> Any:
        types = FORMS[name].types
        places = [self.operand(x, SIZES[t]) for x, t in zip(operands, types, strict=True)]
        return make("pure", places, handler=NUMBERS[name], width=SIZES[types[0]])

    def access(self, kind: str, parts: list[str], registers: list[str], where: str | None = None) -> Any:
        """Make a load or a store of a vector of registers, or an atomic addition with a result and a value."""
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
        base = offset = 0
        if where is not None:
            symbol, offset = address(where)
            base = self.operand(symbol, 4 if shared else 8)
        # An order within one program orders nothing between programs.
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


def make(kind: str, operands: Sequence[int] = (), **fields: int) -> Any:
    padded = (*operands, *[-1] * (10 - len(operands)))
    return Instruction(kind=KINDS.index(kind), operands=padded, guard=-1, **fields)


def statements(body: str, files: dict[str, str]) -> Iterator[Line]:
    """Return the instructions and labels of a function, each with its line in the source of the kernel."""
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
