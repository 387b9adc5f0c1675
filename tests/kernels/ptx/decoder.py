"""Decode the text of PTX into the instructions of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tests.kernels.ptx.machine import FORMS, KINDS, NUMBERS, SIZES, Instruction

LANES = 32
ORDERS = {"relaxed": 0, "acquire": 1, "release": 2, "acq_rel": 3}
SPACES, HINTS = {"global", "shared", "shared::cta"}, {"ca", "cg", "cs"}  # of caches, which the machine does not have
ACCESS, ATOMIC = {*SPACES, *HINTS, "v2", "v4", "v8"}, {*SPACES, *ORDERS, "add", "cta", "gpu"}  # known parts of names


class Decoder:
    """Turn the PTX of one kernel into instructions of the machine.

    A register is an offset into the register file of a warp, where it has a place for each lane. Special registers,
    parameters and constants have places there, too, behind the registers.
    """

    def __init__(self, ptx: str):
        text = re.sub(r"//[^\n]*", "", ptx)
        entry = r"\.visible \.entry (\w+)\((.*?)\).*?^\{(.*?)^\}"
        ((self.name, parameters, body),) = re.findall(entry, text, re.M | re.S)
        self.parameters = [parameter.split()[-1] for parameter in filter(str.strip, parameters.split(","))]
        self.places: dict[str, tuple[int, int]] = {}  # registers: offset and bytes a lane
        self.file = 0
        for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]*);", body):
            for name, count in re.findall(r"(%?\w+)(?:<(\d+)>)?", names):
                for register in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                    if register not in self.places:  # else declared in another scope, too
                        self.places[register] = self.place(SIZES[kind])
        self.registers = self.file
        for special in ("%tid.x", "%ctaid.x", "%nctaid.x"):  # the machine fills them in
            self.places[special] = self.place(4)
        # A value and its bytes a lane -> offset. The value of a parameter is its number, and whether it has a sign.
        self.constants: dict[tuple[int | tuple[int, bool], int], int] = {}
        code: list[Any] = []
        self.lines: list[tuple[str, str]] = []  # of each instruction, and where it comes from in the kernel's source
        labels: dict[str, int] = {}
        for statement, source in statements(body, dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))):
            if statement.endswith(":"):
                labels[statement[:-1]] = len(code)
            else:
                code += self.decode(statement)
                self.lines += [(statement, source)] * (len(code) - len(self.lines))
        for instruction, (statement, _) in zip(code, self.lines, strict=True):
            if instruction.kind == KINDS.index("branch"):
                instruction.target = labels[statement.split()[-1]]
        self.code = (Instruction * len(code))(*code)

    def place(self, size: int) -> tuple[int, int]:
        self.file += size * LANES
        return self.file - size * LANES, size

    def constant(self, value: int | tuple[int, bool], size: int) -> int:
        if (value, size) not in self.constants:
            self.constants[value, size] = self.place(size)[0]
        return self.constants[value, size]

    def image(self, arguments: Sequence[bytes]) -> bytes:
        """Return the bytes behind the registers, given the values of the parameters."""
        image = bytearray(self.file - self.registers)
        for (value, size), offset in self.constants.items():
            if isinstance(value, tuple):
                value = int.from_bytes(arguments[value[0]], "little", signed=value[1])
            start = offset - self.registers
            image[start : start + size * LANES] = (value % 2 ** (8 * size)).to_bytes(size, "little") * LANES
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

    def decode(self, statement: str) -> Iterator[Any]:
        try:
            ((negation, guard, name, rest),) = re.findall(r"^(?:@(!?)(%\w+) )?([a-z][\w.:]*) ?(.*)$", statement)
            operands = [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest) if x.strip()]
            if guard and name.split(".")[1:2] == ["sync"] and name != "bar.sync":
                raise NotImplementedError("an exchange between lanes under a predicate")
            for instruction in self.instructions(name, operands):
                instruction.guard = self.operand(guard, 1) if guard else -1
                instruction.negated = negation == "!"
                yield instruction
        except (KeyError, ValueError, NotImplementedError) as error:
            raise NotImplementedError(f"cannot run `{statement}`: {error}") from error

    def instructions(self, name: str, operands: list[str]) -> Iterator[Any]:
        base, *parts = name.split(".")
        if base == "bra":
            yield make("branch")
        elif name == "ret":
            yield make("return")
        elif [name, *operands] == ["bar.sync", "0"]:
            yield make("barrier")
        elif name.startswith("ld.param."):
            to, size = self.places[operands[0]]
            value = self.parameters.index(operands[1].strip("[]")), parts[-1][0] == "s"
            yield make("pure", [to, self.constant(value, size)], handler=NUMBERS[f"mov.b{8 * size}"], width=size)
        elif base == "ld":
            yield self.access("load", parts, group(operands[0]), operands[1])
        elif base == "st":
            yield self.access("store", parts, group(operands[1]), operands[0])
        elif base in ("atom", "red"):
            to = operands[0] if base == "atom" else "_"
            yield self.access("atomic_add", parts, [to, operands[-1]], operands[-2])
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
            yield self.pure(name, operands[:2])  # the third is a register with the lanes that take part: all of a warp
        elif base == "cvt" and parts[-1] in ("u8", "s8"):
            yield self.pure(f"{name}.b{8 * self.places[operands[1]][1]}", operands)
        else:
            yield self.pure(name, operands)

    def pure(self, name: str, operands: list[str]) -> Any:
        types = FORMS[name].types
        places = [self.operand(x, SIZES[t]) for x, t in zip(operands, types, strict=True)]
        return make("pure", places, handler=NUMBERS[name], width=SIZES[types[0]])

    def access(self, kind: str, parts: list[str], names: list[str], where: str) -> Any:
        """Make a load or a store of a vector of registers, or an atomic addition with a result and a value."""
        is_atomic, element, parts = kind == "atomic_add", parts[-1], parts[:-1]
        if not {*parts} <= (ATOMIC if is_atomic else ACCESS) or (is_atomic and element[0] == "f"):
            raise NotImplementedError("a form of access that is not known")
        (width,) = {self.places[x][1] for x in names if x in self.places} or {SIZES[element]}
        shared = "global" not in parts
        ((base, offset),) = re.findall(r"^\[ ?([%$\w]+) ?(?:\+ ?(-?\d+) ?)?\]$", where)
        return make(
            kind,
            [self.operand(base, 4 if shared else 8), *(-1 if x == "_" else self.operand(x, width) for x in names)],
            element=SIZES[element],
            vector=1 if is_atomic else len(names),
            width=width,
            is_signed=element[0] == "s" and kind != "store",
            shared=shared,
            # An order within one program orders nothing between programs.
            target=0 if "cta" in parts else sum(ORDERS.get(x, 0) for x in parts),
            offset=int(offset or 0),
        )


def make(kind: str, operands: Sequence[int] = (), **fields: int) -> Any:
    padded = (*operands, *[-1] * (10 - len(operands)))
    return Instruction(kind=KINDS.index(kind), operands=padded, guard=-1, **fields)


def statements(body: str, files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Return the instructions and labels of a function, each with its line in the source of the kernel."""
    source, pending = "?", ""
    for line in body.splitlines():
        words = line.split()
        if words[:1] == [".loc"]:
            source = f"{files.get(words[1], '?')}:{words[2]}"
        elif words[:1] and re.fullmatch(r"[$\w]+:", words[0]):
            yield words[0], source
        else:
            *whole, pending = f"{pending} {line}".split(";")
            for statement in whole:
                text = re.sub(r"^[{}\s]+", "", " ".join(statement.split()))
                if text and not text.startswith("."):
                    yield text, source


def group(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]
