"""What training and prediction ask of the machine: device, precision, memory layout."""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imaging.batches import Inputs

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: torch.device | str | None = None) -> torch.device:
    """Returns the device of this name, after trying it; "auto" is CUDA where there is one.

    Raises ValueError for a device that torch does not know or cannot use.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # whichever torch raises
        raise ValueError(f"device {name} cannot be used: {error}") from error
    return device


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype that convolutions and products run in on this device.

    "auto" is bfloat16 where the hardware computes in it (CUDA from compute capability 8.0, CPUs
    with AVX-512 bf16 or AMX), and float32 elsewhere. Raises ValueError for anything but "auto",
    "fp32", "bf16" and "fp16", and for "fp16" without CUDA.
    """
    if precision == "auto":
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    if precision not in PRECISIONS:
        names = ", ".join(("auto", *PRECISIONS))
        raise ValueError(f"precision must be one of {names}, not {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs CUDA; use bf16 or fp32 on {device.type}")
    return PRECISIONS[precision]


def resolve_training_precision(
    precision: str, device: torch.device, model: nn.Module
) -> torch.dtype:
    """Returns the dtype that `train` trains a model in: `resolve_precision`'s, but for "auto".

    On CPUs, "auto" is what the model's `cpu_training_precision` says, or else float32 for one that
    trains depthwise convolutions, whose gradients are slower in bfloat16 there; evaluation is not.
    """
    dtype = resolve_precision(precision, device)
    if precision != "auto" or device.type != "cpu" or dtype is torch.float32:
        return dtype
    usual = "fp32" if _trains_depthwise_convolutions(model) else "bf16"
    return PRECISIONS[getattr(model, "cpu_training_precision", "") or usual]


def _trains_depthwise_convolutions(model: nn.Module) -> bool:
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return any(
        1 < each.groups == each.in_channels and each.weight.requires_grad for each in convolutions
    )


def name_of_precision(dtype: torch.dtype) -> str:
    """Returns what `resolve_precision` takes for a dtype: "fp32", "bf16" or "fp16"."""
    return next(name for name, each in PRECISIONS.items() if each is dtype)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Returns whether the hardware multiplies in bfloat16, rather than by way of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # torch has no public name for these yet
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False


def memory_format_for(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Returns the fastest layout for convolutions: channels last, but for CUDA in float32."""
    if device.type == "cpu" or dtype is not torch.float32:
        return torch.channels_last
    return torch.contiguous_format


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Returns the context in which a model runs in this precision; none for float32."""
    is_on = dtype is not torch.float32
    return torch.autocast(device.type, dtype if is_on else None, enabled=is_on)


def compute_logits(
    model: nn.Module,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    forward: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Returns the model's logits in float32, computed on this device in this precision.

    `inputs` are images, or a dict of `images` and further inputs, of which the model is given those
    that its `forward` has a parameter for; `features` may be in place of the images. `forward` is
    called in place of the model, such as its compiled form.
    """
    others = dict(inputs) if isinstance(inputs, Mapping) else {"images": inputs}
    images = []
    if "images" in others or "features" not in others:
        layout = memory_format_for(device, dtype)
        images = [others.pop("images").to(device, memory_format=layout, non_blocking=True)]
    if others:
        parameters = inspect.signature(model.forward).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        others = {
            name: values.to(device, non_blocking=True)
            for name, values in others.items()
            if takes_all or name in parameters
        }
    with autocast(device, dtype):
        return (model if forward is None else forward)(*images, **others).float()


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Lets cuDNN try its algorithms: the batches are all of one size, so it is soon done."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def deterministic_algorithms(is_on: bool) -> Iterator[None]:
    """Has torch use only deterministic algorithms in the block, if `is_on`."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Returns what the last bits of a result depend on, besides the settings."""
    name = f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "device": name}
