"""Operators on the meta device, without what takes their time: only shapes matter there."""

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor


def remembered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs); on meta, what only makes new tensors infers their shapes once.

    Many shape functions are Python and take a hundred times longer than the tensor's own making.
    """
    key = _call(func, args, kwargs)
    if key is None:
        return func(*args, **kwargs)
    if (known := _made.get(key)) is not None:
        new = [_empty(*each) for each in known]
        return new[0] if len(func._schema.returns) == 1 else tuple(new)
    out = func(*args, **kwargs)
    new = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else []
    if new and all(isinstance(each, Tensor) and _is_plain(each) for each in new):
        _made[key] = [(each.shape, each.stride(), each.dtype) for each in new]
    return out


_Made = tuple[torch.Size, tuple[int, ...], torch.dtype]
_made: dict[Any, list[_Made] | None] = {}


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What decides the shapes of an operator's results, hashable; None: this one must run."""
    if not _makes_new_tensors(func):
        return None
    parts: list[Any] = [func]
    for value in itertools.chain(args, *kwargs.items()):
        if isinstance(value, Tensor):
            if not value.is_meta:
                return None
            parts.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            if any(isinstance(each, Tensor) for each in value):
                return None
            parts.append(tuple(value))
        else:
            parts.append((type(value), value))  # 1 and 1.0 promote differently
    return tuple(parts)


@cache
def _makes_new_tensors(func: Any) -> bool:
    schema = func._schema
    aliases = [each.alias_info for each in (*schema.arguments, *schema.returns)]
    return all(each is None for each in aliases) and bool(schema.returns)


def _is_plain(tensor: Tensor) -> bool:
    """Would its shape and strides make the same storage again?"""
    if not tensor.is_meta or tensor.storage_offset():
        return False
    made = _empty(tensor.shape, tensor.stride(), tensor.dtype)
    return made.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()


def _empty(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


IN_PLACE = {
    getattr(torch.ops.aten, name)
    for name in [
        "mul_",
        "add_",
        "sub_",
        "div_",
        "addcmul_",
        "addcdiv_",
        "clamp_",
        "sqrt_",
        "neg_",
        "exp_",
        "copy_",
        "zero_",
        "fill_",
        "addmm_",
        "bitwise_and_",
        "bitwise_xor_",
        "nan_to_num_",
    ]
}
"""Operators that only overwrite their first argument: on meta there is nothing to do."""
