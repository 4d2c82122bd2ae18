"""Mamba-2's kernels in torch, for Megatron's own mixer on a CPU: the package mamba_ssm has them for CUDA only.

State space duality (Dao and Gu, 2024, arXiv:2405.21060, section 3): the scan is attention without a softmax, whose
scores decay. Forward only; gradients are torch's.

Shapes: B batch, L positions, H heads, P their size, G groups of heads, N size of a state.
"""

from __future__ import annotations

import functools
import sys
import types
from importlib import import_module
from typing import Any, Final

import torch
from torch.nn import functional

_MIXER: Final = "megatron.core.ssm.mamba_mixer"
_OPS: Final = "mamba_ssm.ops.triton"


def scan(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    a_H: torch.Tensor,
    b_BLGN: torch.Tensor,
    c_BLGN: torch.Tensor,
    d_H: torch.Tensor,
) -> torch.Tensor:
    """y[t] = c[t] · h[t] + d x[t], where h[t] = exp(dt[t] a) h[t-1] + dt[t] x[t] ⊗ b[t]; in the inputs' dtype."""
    heads = x_BLHP.shape[2] // b_BLGN.shape[2]
    b_BLHN, c_BLHN = (part.repeat_interleave(heads, 2) for part in (b_BLGN, c_BLGN))
    past_BLH = (dt_BLH * a_H).cumsum(1)
    decay_BLSH = past_BLH[:, :, None] - past_BLH[:, None]
    later_LS = torch.ones(decay_BLSH.shape[1:3], dtype=torch.bool).triu(1)
    decay_BLSH = decay_BLSH.masked_fill(later_LS[:, :, None], -torch.inf).exp()
    scores_BLSH = torch.einsum("blhn,bshn->blsh", c_BLHN, b_BLHN) * decay_BLSH * dt_BLH[:, None]
    return torch.einsum("blsh,bshp->blhp", scores_BLSH, x_BLHP) + d_H[:, None] * x_BLHP


def _split_conv1d_scan(
    zxbcdt: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dt_bias_H: torch.Tensor,
    a_H: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    *,
    activation: str,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: Any = None,
) -> torch.Tensor:
    """mamba_split_conv1d_scan_combined, as Megatron's mixer calls it in a training without packed sequences."""
    assert activation == "silu"
    assert seq_idx is None
    inner, states = headdim * len(a_H), (len(weight) - headdim * len(a_H)) // 2
    z, xbc, dt = torch.split(zxbcdt.float(), [inner, inner + 2 * states, len(a_H)], dim=2)
    padded = functional.pad(xbc.transpose(1, 2), (weight.shape[1] - 1, 0))
    xbc = functional.conv1d(padded, weight.float()[:, None], bias.float(), groups=len(weight)).transpose(1, 2)
    x, b, c = torch.split(functional.silu(xbc), [inner, states, states], dim=2)
    y = scan(
        torch.unflatten(x, 2, (-1, headdim)),
        functional.softplus(dt + dt_bias_H),
        a_H,
        torch.unflatten(b, 2, (ngroups, -1)),
        torch.unflatten(c, 2, (ngroups, -1)),
        D.float(),
    )
    return (y.flatten(2) * functional.silu(z)).to(zxbcdt.dtype)


class _Norm(torch.nn.Module):
    """mamba_ssm's RMSNorm, over groups of features. Not gated: the output of the scan already is."""

    def __init__(self, size: int, *, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = torch.unflatten(x.float(), -1, (-1, self.group_size))
        normed = functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight.float()).to(x.dtype)


@functools.cache
def mixer() -> types.ModuleType:
    """Megatron's module of its mixer, imported a second time with the kernels above in the place of mamba_ssm's."""
    names = ("mamba_ssm", "mamba_ssm.ops", _OPS, f"{_OPS}.layernorm_gated", f"{_OPS}.ssd_combined")
    modules = {name: types.ModuleType(name) for name in names}
    vars(modules[names[3]])["RMSNorm"] = _Norm
    vars(modules[names[4]])["mamba_split_conv1d_scan_combined"] = _split_conv1d_scan
    vars(modules[names[4]])["mamba_chunk_scan_combined"] = lambda x: x  # only inference calls it
    before = {name: sys.modules.pop(name, None) for name in (_MIXER, *modules)}
    sys.modules.update(modules)
    try:
        return import_module(_MIXER)
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        if before[_MIXER] is not None:
            sys.modules["megatron.core.ssm"].mamba_mixer = before[_MIXER]  # type: ignore[attr-defined]


def layer(spec: Any, norm: type, linears: tuple[type, type], add: Any) -> Any:
    """The specification of a Mamba layer.

    Args:
        spec: Megatron's ModuleSpec.
        linears: the projections into the mixer and out of it.
        add: what adds a layer's output to its input.
    """
    home, mixing = import_module("megatron.core.ssm.mamba_layer"), mixer()
    projections = mixing.MambaMixerSubmodules(in_proj=linears[0], out_proj=linears[1])
    mixes = spec(mixing.MambaMixer, submodules=projections)
    return spec(home.MambaLayer, submodules=home.MambaLayerSubmodules(norm=norm, mixer=mixes, mamba_bda=add))
