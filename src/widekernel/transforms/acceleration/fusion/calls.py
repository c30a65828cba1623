"""Calls: what prevents native calls on an input, whatever has been planned."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from widekernel.ops.eager import TENSOR_TYPES, is_ordinary_call, is_unobserved_call


def is_usual_call(x: Tensor) -> bool:
    """Return whether nothing but the states of modules and weights can prevent native calls on `x`.

    There are no gradients, autocast, global hooks, compilers, modes or profilers, and `x` is a plain float32 tensor in CPU
    memory. In any other case, `reasons_against_call` decides, which takes longer.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) in TENSOR_TYPES
        and x.dtype is torch.float32
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
        and is_ordinary_call()
        and not torch._C._is_any_autocast_enabled()
        and not torch_module._has_any_global_hook()
    )


def reasons_against_call(block: nn.Module, x: Tensor) -> Iterator[str]:
    """Yield why the code of the block must run, whatever its plan is."""
    if not is_unobserved_call():
        yield "a compiler, tracer, transform or mode observes the operators"
        return
    if type(x) not in TENSOR_TYPES or x.layout != torch.strided:
        yield f"the input is not a plain tensor but {type(x).__name__}"
        return
    if x.dtype != torch.float32 or x.device.type != "cpu":
        yield f"the input is {str(x.dtype).removeprefix('torch.')} on {x.device}: blocks are fused in float32 on the CPU"
    if x.numel() == 0:
        yield "the input is empty"
    if x.is_neg() or x._is_zerotensor():
        yield "the input has no memory of its own"
    if torch_module._has_any_global_hook():
        yield "there are global hooks of modules"
    if torch._C._is_any_autocast_enabled():
        yield "autocast is on"
    if block.training:
        yield "the block is in training mode"
    if torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in block.parameters())):
        yield "gradients are wanted: use torch.no_grad() or torch.inference_mode()"
