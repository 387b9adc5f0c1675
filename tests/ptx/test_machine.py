"""The executor of PTX: its instructions, the code it refuses, and the faults it finds in a kernel."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
from torch import Tensor

from fastreg import fused_ar_tar
from tests import ptx
from tests.calls import CALLS, everything
from tests.exact import assert_gradient, check_penalty, exact, truth
from tests.ptx.decoder import LANES, Decoder
from tests.ptx.driver import Executor, Kernel, PTXError, executed

pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 is set: nothing is compiled"),
    pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="the machine needs gcc on Linux"),
]


# -- instructions, from PTX written by hand ----------------------------------------------------------------------------


def run(body: str, *tensors: Tensor, grid: int = 1, warps: int = 1, shared: int = 64, seed: int = 0) -> None:
    """Run the body of a kernel that has %base0, %base1, ... as the addresses of tensors, and %lane as the thread's."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 p_{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %base{i}, [p_{i}];" for i in range(len(tensors)))
    text = f"""
.visible .entry hand_written({parameters})
{{
    .reg .pred %p<4>;
    .reg .b16 %h<8>;
    .reg .b32 %r<8>;
    .reg .b32 %lane;
    .reg .b64 %d<8>;
    .reg .b64 %base<8>;
    {loads}
    mov.u32 %lane, %tid.x;
{body}
    ret;
}}
"""
    executor = Executor()
    executor.random.seed(seed)
    kernel = Kernel(Decoder(text), shared)
    executor.launch(kernel, grid, warps, [(f"x{i}", "*", x) for i, x in enumerate(tensors)])


KINDS = {torch.int16: "b16", torch.int32: "b32", torch.int64: "b64"}
KINDS |= {torch.float16: "b16", torch.bfloat16: "b16", torch.float32: "b32", torch.float64: "b64"}
REGISTERS = {"b16": "%h", "b32": "%r", "b64": "%d"}


def apply(instruction: str, result: torch.dtype, *inputs: Tensor) -> Tensor:
    """Return the result of an instruction for inputs, (n,), in {0}, {1}, ...; n a multiple of the lanes of a warp."""
    out = torch.zeros(len(inputs[0]), dtype=result)
    body, registers = "", []
    for i, x in enumerate([out, *inputs]):
        kind = KINDS[x.dtype]
        registers.append(f"{REGISTERS[kind]}{i}")
        body += f"mov.u32 %r7, %ctaid.x; mad.lo.s32 %r7, %r7, {LANES}, %lane;"
        body += f"mad.wide.u32 %base{i}, %r7, {x.itemsize}, %base{i};\n"
        body += f"ld.global.{kind} {registers[i]}, [%base{i}];\n" if i else ""
    body += instruction.format(*registers) + f"\nst.global.{KINDS[result]} [%base0], {registers[0]};\n"
    run(body, out, *inputs, grid=len(out) // LANES)
    return out


BITS = {"rtol": 0, "atol": 0, "equal_nan": True}
ALL_HALVES = torch.arange(-(2**15), 2**15).short()
I32, I64, F32, F64 = torch.int32, torch.int64, torch.float32, torch.float64
LOWEST = -(2**31)


def ints(*values: int) -> Tensor:
    return torch.tensor(values + (0,) * (LANES - len(values)), dtype=I32)


def floats(*values: float, dtype: torch.dtype = F32) -> Tensor:
    return torch.tensor(values + (0.0,) * (LANES - len(values)), dtype=dtype)


NANS = floats(torch.nan, torch.nan, torch.nan)


@pytest.mark.parametrize(("half", "name"), [(torch.float16, "f16"), (torch.bfloat16, "bf16")], ids=["f16", "bf16"])
def test_halves_are_rounded_and_compared_as_in_torch(half: torch.dtype, name: str) -> None:
    every = ALL_HALVES.view(half)
    torch.testing.assert_close(apply(f"cvt.f32.{name} {{0}}, {{1}};", F32, every), every.float(), equal_nan=True)
    middles = (every.float() + every.float().nextafter(torch.tensor(torch.inf)).to(half).float()) / 2
    x = torch.cat([torch.randn(2**12) * 10.0**e for e in range(-12, 7)] + [middles])
    pair = apply(f"cvt.rn.{name}x2.f32 {{0}}, {{1}}, {{2}};", I32, x, x.flip(0)).view(half)
    torch.testing.assert_close(pair.view(-1, 2), torch.stack([x.flip(0), x], 1).to(half), **BITS)
    y = torch.where(ALL_HALVES % 3 == 0, every, every.roll(12345))
    for sign, f in (("add", torch.add), ("mul", torch.mul), ("sub", torch.sub)):
        both = apply(f"{sign}.{name}x2 {{0}}, {{1}}, {{2}};", I32, every.view(I32), y.view(I32)).view(half)
        torch.testing.assert_close(both, f(every, y), **BITS)
    select = "selp.b32 {0}, 1, 0, %p1; @%p2 add.s32 {0}, {0}, 2;"
    for order, compare in (("eq", torch.eq), ("lt", torch.lt), ("neu", torch.ne)):
        both = apply(f"setp.{order}.{name}x2 %p1|%p2, {{1}}, {{2}}; {select}", I32, every.view(I32), y.view(I32))
        first, second = compare(every, y).int().view(-1, 2).unbind(1)
        assert torch.equal(both, first + 2 * second)


@pytest.mark.parametrize(
    ("instruction", "inputs", "want"),
    [
        ("div.s32 {0}, {1}, {2};", [ints(7, -7, LOWEST), ints(-2, 2, -1)], ints(-3, -3, LOWEST)),
        ("rem.s32 {0}, {1}, {2};", [ints(7, -7, LOWEST), ints(-2, 2, -1)], ints(1, -1, 0)),
        ("shl.b32 {0}, {1}, {2};", [ints(1, 1, 1), ints(3, 31, 32)], ints(8, LOWEST, 0)),
        ("shr.u32 {0}, {1}, {2};", [ints(-8, 8, -8), ints(28, 1, 99)], ints(15, 4, 0)),
        ("bfe.u32 {0}, {1}, 5, 2;", [ints(0x7F, 0x40, 31)], ints(3, 2, 0)),
        ("min.u32 {0}, {1}, {2};", [ints(-1, 3), ints(2, 2)], ints(2, 2)),
        ("cvt.u64.u32 {0}, {1};", [ints(-1, 5)], ints(-1, 5).long() % 2**32),
        ("cvt.s32.s8 {0}, {1};", [ints(0x1FF, 0x17F).short()], ints(-1, 127)),
        ("prmt.b32 {0}, {1}, {2}, 0x3340U;", [ints(0x11223344), ints(0x55667788)], ints(0x11118844)),
        ("mul.wide.s32 {0}, {1}, {2};", [ints(LOWEST, -1), ints(LOWEST, 1)], torch.tensor([2**62, -1] + [0] * 30)),
        ("fma.rn.f32 {0}, {1}, {1}, {2};", [floats(1 + 2**-12), floats(-1 - 2**-11)], floats(2**-24)),
        ("min.f32 {0}, {1}, {2};", [floats(torch.nan, 1), floats(1, torch.nan)], floats(1, 1)),
        ("cvt.rn.f32.f64 {0}, {1};", [floats(1 / 3, 1e300, dtype=F64)], floats(1 / 3, torch.inf)),
        ("cvt.rn.f32.u64 {0}, {1};", [torch.tensor([-1] + [0] * 31)], floats(2.0**64)),
        ("mov.b32 {{%h6, %h7}}, {1}; mov.b32 {0}, {{%h7, %h6}};", [ints(0x12345678)], ints(0x56781234)),
        ("shfl.sync.bfly.b32 {0}, {1}, 16, 31, -1;", [torch.arange(32).int()], torch.arange(32).int() ^ 16),
        ("redux.sync.add.s32 {0}, {1}, -1;", [torch.arange(32).int()], torch.full((32,), 496).int()),
        *[
            (f"setp.{name}.f32 %p1, {{1}}, {{1}}; selp.b32 {{0}}, 1, 0, %p1;", [NANS], ints(*[want] * 3))
            for name, want in (("lt", 0), ("ge", 0), ("eq", 0), ("ne", 0), ("neu", 1), ("ltu", 1))
        ],
        ("setp.lt.s32 %p1, {1}, 2; selp.b32 {0}, 1, 4, %p1;", [ints(1, 2, -1)], ints(1, 4, *[1] * 30)),
        ("mov.b32 {0}, 7; setp.gt.s32 %p1, {1}, 0; @%p1 mov.b32 {0}, 1;", [ints(1, 2)], ints(1, 1, *[7] * 30)),
    ],
    ids=lambda x: x.split(";")[0].split(" ")[0] if isinstance(x, str) else "",
)
def test_one_instruction(instruction: str, inputs: list[Tensor], want: Tensor) -> None:
    got = apply(instruction, want.dtype, *inputs)
    assert got[:3].tolist() == want[:3].tolist()
    assert torch.equal(got, want) or not instruction.startswith("shfl")


# -- refused code -----------------------------------------------------------------------------------------------------

AT_LANE = "mad.wide.u32 %d0, %lane, 4, %base0;"
MINE = "shl.b32 %r2, %lane, 2;"
NEXT = "xor.b32 %r3, %r2, 128;"  # the value of a thread of the next warp


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sin.approx.f32 %r1, %r2;", "cannot run `sin.approx.f32 %r1, %r2`"),
        ("ld.volatile.global.b32 %r1, [%base0];", r"cannot run `ld.volatile.global.b32 %r1, \[%base0\]`"),
        ("add.s32 %r1, %d1, 1;", "%d1 has 8 bytes where 4 are expected"),
        (f"{AT_LANE} ld.global.b32 %r1, [%d0+4];", "outside of the tensors .* thread 63, .* 256 bytes from .* x0"),
        (f"{AT_LANE} ld.global.b32 %r1, [%d0+-4];", "outside of the tensors .* thread (0|32), "),
        (f"{AT_LANE} st.global.b32 [%d0+4], %lane;", "outside of the tensors .*`st.global.b32"),
        ("mov.b32 %r2, 64; ld.shared.b32 %r1, [%r2];", "outside of shared memory: `ld.shared.b32 %r1, "),
        ("ld.global.v2.b32 {%r1, %r2}, [%base0+4];", "a misaligned access: `ld.global.v2.b32"),
        ("st.shared.b32 [global_smem+2], %lane;", "a misaligned access"),
        ("setp.lt.s32 %p1, %lane, 40; @%p1 bra $L; $L:", "a divergent branch: .* program 0, thread 32"),
        ("setp.lt.s32 %p1, %lane, 40; @%p1 bar.sync 0;", "a divergent barrier: lanes of one warp"),
        ("setp.lt.s32 %p1, %lane, 32; @%p1 bra $L; bar.sync 0;\n$L:", "a divergent barrier: part of the warps ended"),
        (
            "setp.lt.s32 %p1, %lane, 32; @%p1 bra $L; bar.sync 0; bra $M;\n$L:\nbar.sync 0;\n$M:",
            "a divergent barrier: other warps wait at another one",
        ),
        ("setp.lt.s32 %p1, %lane, 40; @%p1 ret;", "a divergent return"),
        ("st.global.b32 [%base0], %lane;", "a race: overwrites what another thread wrote: .*; the other: program 0"),
        ("setp.eq.s32 %p1, %lane, 0; @%p1 st.global.b32 [%base0], 1; ld.global.b32 %r1, [%base0];", "a race: "),
        (
            f"{MINE} {NEXT} st.shared.b32 [%r2], 1; bar.sync 0; ld.shared.b32 %r1, [%r3]; st.shared.b32 [%r2], 2;",
            "a race: (overwrites what another thread read|reads what another thread wrote)",
        ),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_refused(body: str, message: str, seed: int) -> None:
    shared = 256 if "a race" in message else 64
    with pytest.raises((PTXError, NotImplementedError), match=message):
        run(body.replace("; ", ";\n"), torch.zeros(64), warps=2, shared=shared, seed=seed)


# -- fastreg's kernels, and mutants of them ----------------------------------------------------------------------------


class Edited(Executor):
    """Runs PTX that an edit has made a mutant of."""

    def __init__(self, edit: Callable[[str], str]):
        super().__init__()
        self.edit = edit

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        text = ptx.decode()
        edited = self.edit(text)
        assert edited != text
        return super().load_binary(name, edited.encode(), shared, device)


@contextmanager
def running(executor: Executor) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the kernels by the executor; yield activations that several programs share."""
    raw, dropped = torch.randn(2, 4, 40, 600, generator=torch.Generator().manual_seed(0)).unbind()
    with executed(executor, ptx.all_kernels()), ptx.kernels_take_cpu_tensors():
        yield raw.requires_grad_(), dropped.requires_grad_()


def test_the_penalty_of_several_programs_and_schedules() -> None:
    executor = Executor()
    with running(executor) as pair:
        check_penalty(*pair, 2.0, 1.0)
        first, *more = [[x.detach() for x in everything(CALLS["pair"], [*pair])] for _ in range(5)]
    assert executor.programs > 2 * executor.launches
    assert all(torch.equal(x, y) for again in more for x, y in zip(first, again, strict=True))


def forward(edit: Callable[[str], str]) -> Callable[[str], str]:
    """An edit of the kernel that has the ticket alone."""
    return lambda text: edit(text) if "atom.global" in text else f"{text}//"


def without_barriers(code: re.Match[str]) -> str:
    return code[0].replace("bar.sync", "// bar.sync")


MUTANTS: dict[str, tuple[Callable[[str], str], str]] = {
    "relaxed": (forward(lambda text: text.replace("acq_rel", "relaxed")), "a race: reads what another thread"),
    "of_one_program": (forward(lambda text: text.replace("atom.global.gpu", "atom.global.cta")), "a race: reads what"),
    "acquire_alone": (forward(lambda text: text.replace("acq_rel", "acquire")), "a race: reads what another thread"),
    "release_alone": (forward(lambda text: text.replace("acq_rel", "release")), "a race: reads what another thread"),
    "no_barrier_before_the_ticket": (
        forward(lambda text: re.sub(r"st\.global(?:(?!st\.global).)*atom\.global", without_barriers, text, flags=re.S)),
        r"a race: .*\.py:\d+\).* the other: program \d+, (thread \d+|several threads)",
    ),
    "no_barrier_after_the_ticket": (
        forward(lambda text: re.sub(r"(atom\.global.*?)bar\.sync\s+0;", r"\1", text, count=1, flags=re.S)),
        "a race: .*(ld|st).shared",
    ),
    "a_mask": (lambda text: re.sub(r"@%p\d+ (ld\.global\.v4)", r"\1", text), "outside of the tensors"),
}


@pytest.mark.parametrize(("edit", "message"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_of_the_penalty_is_refused(edit: Callable[[str], str], message: str) -> None:
    with running(Edited(edit)) as pair, pytest.raises(PTXError, match=message):
        check_penalty(*pair, 2.0, 1.0)


def test_a_flipped_sign_of_the_penalty_shows() -> None:
    with running(Edited(lambda text: text.replace("sub.f32", "add.f32", 1))) as pair:
        (got,) = torch.autograd.grad(fused_ar_tar(*pair, 2.0, 1.0), pair[:1])
    raw, dropped = map(exact, pair)
    (want,) = torch.autograd.grad(truth(raw, dropped, 2.0, 1.0).penalty, raw)
    with pytest.raises(AssertionError, match="times what is allowed"):
        assert_gradient(got, want)
