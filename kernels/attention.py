"""Causal attention whose forward and backward are called by hand: what it keeps is ours to hold.

    out = softmax(q k' / sqrt(D) + causal mask) v

Each backend is one fused operator of PyTorch (or of the flash-attn package) that never makes the
T x T matrix and keeps a log-sum-exp per row instead. On "meta" the operator of the device that is
being rehearsed runs with shapes only: plain scaled_dot_product_attention would take the quadratic
path there.

Layout: q (B, T, H, D); k, v (B, T, H_kv, D), where H is a multiple of H_kv.
Source: Dao et al., arXiv:2205.14135.
"""

import importlib
import importlib.util
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lowmem.errors import ConfigError, HardwareError

Backend = Literal["cpu", "flash", "efficient", "flash-attn"]
aten = torch.ops.aten


class Statistics(NamedTuple):
    """What the backward needs beside q, k, v and out."""

    logsumexp: Tensor  # (B, H, T) float32
    rng: tuple[Tensor, ...]  # two scalars that dropout would use, or none


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype, width: int) -> Backend:
    """The backend of a model on `device`: "auto" (also called "sdpa") takes what the device has.

    On "meta" a backend must be named, "flash-attn" keeping what "flash" keeps. width: of a head.
    Raises HardwareError where flash-attn is missing, ConfigError for a head that no kernel takes,
    ValueError for an unknown word.
    """
    if wanted in ("auto", "sdpa"):
        if device.type == "meta":
            raise ValueError("on meta, name the backend that is rehearsed: cpu, flash or efficient")
        half = "efficient" if dtype == torch.float32 else "flash"
        wanted = "cpu" if device.type == "cpu" else half
    if wanted not in get_args(Backend):
        known = ", ".join(get_args(Backend))
        raise ValueError(f"unknown attention {wanted!r}; allowed: auto, {known}")
    if wanted == "flash-attn" and device.type == "meta":
        wanted = "flash"
    if wanted == "flash-attn":
        _require_flash_attn(device, dtype)
    if wanted != "cpu" and (width % 8 or width > 256):
        raise ConfigError(
            f"head_dim = {width}: no fused attention kernel of CUDA takes it",
            "allowed: multiples of 8 up to 256",
            "choose num_attention_heads so that hidden_size / num_attention_heads is one of these",
        )
    return wanted  # type: ignore[return-value]  # just checked


def _require_flash_attn(device: torch.device, dtype: torch.dtype) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        raise HardwareError(
            "attention = flash-attn, but the package flash-attn is not installed",
            "it is optional and compiles for your CUDA version",
            "pip install lowmem[flash], or leave attention at its default",
        )
    if device.type != "cuda" or dtype == torch.float32:
        raise HardwareError(
            f"attention = flash-attn on {device.type} with {dtype} weights",
            "flash-attn runs on CUDA devices in bf16 only",
            "use bf16 weights on a CUDA device, or leave attention at its default",
        )


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> tuple[Tensor, Statistics]:
    """(out (B, T, H, D), statistics)."""
    if backend == "flash-attn":
        return _flash_attn(q, k, v)
    if backend == "efficient":
        k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    match backend:
        case "cpu":
            out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
            rng: tuple[Tensor, ...] = ()
        case "flash":
            made = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
            out, logsumexp, rng = made[0], made[1], (made[6], made[7])
        case "efficient":
            made = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)
            out, logsumexp, rng = made[0], made[1], (made[2], made[3])
    return out.transpose(1, 2), Statistics(logsumexp, rng)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Statistics, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their own layout; `grad` is that of out."""
    if backend == "flash-attn":
        return _flash_attn_backward(grad, q, k, v, out, kept)
    groups = k.shape[2]
    if backend == "efficient":
        k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    lse, rng, length = kept.logsumexp, kept.rng, q.shape[2]
    match backend:
        case "cpu":
            dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, True
            )
        case "flash":
            dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse, None, None, length, length, 0.0, True, *rng
            )
        case "efficient":
            dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, out, lse, *rng, 0.0, [True, True, True, False], True
            )
    dq, dk, dv = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    return dq, _sum_heads(dk, groups), _sum_heads(dv, groups)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H_kv, D) -> (B, T, H, D): the efficient kernel wants as many k and v as q."""
    groups = x.shape[2]
    return x if groups == heads else x.repeat_interleave(heads // groups, dim=2)


def _sum_heads(grad: Tensor, groups: int) -> Tensor:
    """The gradient of `_repeat_heads`."""
    heads = grad.shape[2]
    return grad if groups == heads else grad.unflatten(2, (groups, heads // groups)).sum(3)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Statistics]:
    flash = importlib.import_module("flash_attn.flash_attn_interface")

    out, logsumexp, _, rng = flash._flash_attn_forward(
        q, k, v, return_softmax=False, **_flash_attn_settings(q)
    )
    return out, Statistics(logsumexp, (rng,))


def _flash_attn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Statistics
) -> tuple[Tensor, Tensor, Tensor]:
    flash = importlib.import_module("flash_attn.flash_attn_interface")

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    flash._flash_attn_backward(
        *(grad, q, k, v, out, kept.logsumexp, dq, dk, dv),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rng_state=kept.rng[0],
        **_flash_attn_settings(q),
    )
    return dq, dk, dv


def _flash_attn_settings(q: Tensor) -> dict[str, Any]:
    """The arguments that forward and backward share since flash-attn 2.7: causal, nothing else."""
    return {
        "dropout_p": 0.0,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": True,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
