"""Print which code runs on each device: `python -m fastreg`. The exit code is 1 if the self-test of a device fails."""

from __future__ import annotations

import argparse
import platform
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import torch

import fastreg
from fastreg.call.backends import CPP, backend_for, why_formula
from fastreg.call.dropout import fused_dropout_ar_tar
from fastreg.call.penalty import fused_ar_tar
from fastreg.call.reference import ar_tar, encoded
from fastreg.call.torch_state import has_float64
from fastreg.kernels import cpu
from fastreg.kernels.backend import Backend
from fastreg.kernels.view import Spec, Values


def main() -> int:
    """Print the versions, and for each device the code that runs on it and the outcome of the self-test."""
    argparse.ArgumentParser(prog="python -m fastreg", description=__doc__).parse_args()
    python = platform.python_version()
    print(f"fastreg {fastreg.__version__}, Python {python}, torch {torch.__version__}, {triton()}")
    print(f"imported from {Path(__file__).parent}")
    if any(distributions(name="fastreg")):
        print(
            "the unrelated distribution fastreg is installed, too, in the same folder: run `pip uninstall fastreg "
            "fastreg-rnn`, and install the one that you need"
        )
    if CPP is not None:
        print(f"library for CPUs: {cpu.description()}")
    warnings.simplefilter("ignore")  # the report tells the same, in more words
    failed, found = False, list(devices())
    for device in found:
        backend = backend_for(device)
        code = f"the plain formula ({why_formula(device)})" if backend is None else backend.name
        try:
            for _ in range(2):  # only the second time, compiled code is launched directly
                self_test(device)
            outcome = "self-test passed"
        except Exception as error:  # the libraries of a device may raise anything
            failed = True
            outcome = f"SELF-TEST FAILED: {type(error).__name__}: {str(error).strip()}"
        print(f"{device}: {code}{launches(backend)}; {outcome}")
    if len(found) > 1:
        print("to measure this GPU, and send the results: bench/on_gpu.ipynb in the repository")
    return int(failed)


def launches(backend: Backend | None) -> str:
    """Say in which way the Triton kernels are launched; other code, and interpreted kernels, know only one way."""
    if backend is None or backend is CPP or "interpreted" in backend.name:
        return ""
    from fastreg.kernels.launch import description

    return f", {description()}"


def triton() -> str:
    """Return the name and version of Triton; builds of PyTorch install it under several names."""
    for name in (f"{prefix}triton{suffix}" for prefix in ("", "pytorch-") for suffix in ("", "-rocm", "-xpu")):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "triton not installed"


def devices() -> Iterator[torch.device]:
    """List the CPU and all accelerators."""
    yield torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            yield torch.device(accelerator.type, index)


def self_test(device: torch.device) -> None:
    """Compare the values and gradients on a device with the formula in float64.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    raw, dropped, mask = torch.randn(3, 5, 40, 24, generator=generator, device="cpu").to(device)
    lengths = torch.tensor([40, 0, 3, 17, 1], device="cpu").to(device)
    for steps in (None, lengths):
        leaves = (raw.clone().requires_grad_(), dropped.clone().requires_grad_())
        exact = leaves
        if has_float64(device):
            exact = raw.double().requires_grad_(), dropped.double().requires_grad_()
        values = Values(2.0, 1.0) if steps is None else Values(2.0, 1.0, *encoded((5, 40), steps, None, None))
        spec = Spec(dtype=exact[0].dtype)
        got = fused_ar_tar(leaves[0], leaves[1], 2.0, 1.0, lengths=steps)
        want = ar_tar(*exact, values, spec).value
        compare([got, *torch.autograd.grad(got, leaves)], [want, *torch.autograd.grad(want, exact)])
        kept, got = fused_dropout_ar_tar(leaves[0], 0.5, 2.0, 1.0, mask=mask, lengths=steps)
        product = exact[0] * mask.to(exact[0].dtype)
        want = ar_tar(exact[0], product, values, spec).value
        results = [got, *torch.autograd.grad([got, kept.sum()], leaves[0])]
        compare(results, [want, *torch.autograd.grad([want, product.sum()], exact[0])])


def compare(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Compare two lists of tensors in float64, to a few units in the last place of float32."""
    for x, y in zip(got, want, strict=True):
        atol = 1e-6 * y.detach().abs().max().item()
        torch.testing.assert_close(x.detach().cpu().double(), y.detach().cpu().double(), rtol=1e-5, atol=atol)


if __name__ == "__main__":
    sys.exit(main())
