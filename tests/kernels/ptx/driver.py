"""A driver for Triton that compiles for an H100 and runs the code on CPU tensors."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from struct import pack
from typing import Any

import pytest
import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from tests.kernels.ptx.decoder import Decoder
from tests.kernels.ptx.machine import Fault, Machine, Region, library
from tests.kernels.stand_in import StandInDriver, active

H100 = GPUTarget("cuda", 90, 32)
RESIDENT = 8  # programs that run at once
FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}


class PTXError(RuntimeError):
    """The machine refused an instruction."""


class H100Backend(CUDABackend):
    """Compile for NVIDIA GPUs as far as PTX, which is this backend's binary."""

    def __init__(self, target: Any):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], *options: Any) -> None:
        super().add_stages(stages, *options)
        del stages["cubin"]

    def hash(self) -> str:
        return f"ptx-{super().hash()}"  # the cache on disk must separate code without a cubin


class Executor(StandInDriver):
    """A driver of Triton whose launches run PTX on CPU tensors."""

    def __init__(self) -> None:
        super().__init__(H100)
        self.random = random.Random(0)
        self.kernels: list[tuple[Decoder, int]] = []  # that were loaded, and bytes of shared memory of a program

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.kernels.append((Decoder(ptx.decode()), shared))
        return len(self.kernels) - 1, len(self.kernels) - 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return partial(self.launch, source.signature.values(), metadata.num_warps)

    def launch(self, kinds: Any, warps: int, *given: Any) -> None:
        """Run the programs of a launch. Triton calls its launchers with these arguments."""
        grid, _, _, _, function, _, _, _, _, *arguments = given
        decoded, shared = self.kernels[function]
        typed = [(kind, x) for kind, x in zip(kinds, arguments, strict=True) if kind != "constexpr"]
        memory = regions([x for _, x in typed if isinstance(x, torch.Tensor)])
        values = [
            pack("Q", x.data_ptr()) if isinstance(x, torch.Tensor) else pack(FORMATS[kind], x) for kind, x in typed
        ]
        values += [bytes(8)] * (len(decoded.parameters) - len(values))  # of scratch memory that there is none of
        machine = Machine(
            code=ctypes.addressof(decoded.code),
            constants=decoded.image(values),
            registers=decoded.registers,
            file=decoded.file,
            warps=warps,
            shared=shared,
            grid=grid,
            resident=min(grid, RESIDENT),
            regions=ctypes.addressof(memory),
            region_count=len(memory),
            seed=self.random.getrandbits(32),
        )
        fault = Fault(other_program=-1)
        if library().launch(ctypes.byref(machine), ctypes.byref(fault)) < 0:
            statement, source = decoded.lines[fault.instruction]
            message = f"{decoded.name}: {fault.what.decode()}: `{statement}` ({source}), "
            message += f"program {fault.program}, thread {fault.thread}"
            if fault.other_program >= 0:
                its = f"thread {fault.other_thread}" if fault.other_thread >= 0 else "several threads"
                message += f"; the other: program {fault.other_program}, {its}"
            raise PTXError(message)


def regions(tensors: list[torch.Tensor]) -> Any:
    """Return the memory where the tensors' elements are; tensors that overlap have one region."""
    merged: list[Any] = []
    for x in sorted((x for x in tensors if x.numel()), key=torch.Tensor.data_ptr):
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        begin, end = x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize
        if merged and begin < merged[-1].end:
            merged[-1].end = max(merged[-1].end, end)
            merged[-1].granule = min(merged[-1].granule, x.itemsize)
        else:
            merged.append(Region(begin=begin, end=end, granule=x.itemsize))
    return (Region * len(merged))(*merged)


@contextmanager
def executed(executor: Executor, *kernels: Any) -> Iterator[None]:
    """Have Triton compile for an H100, and run the code on CPU tensors; `kernels` are compiled anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends, "nvidia", Backend(compiler=H100Backend, driver=Executor))  # pyright: ignore
        with active(executor, *kernels):
            yield
