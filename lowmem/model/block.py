"""One decoder block, forward and backward in an order of our own.

    x1 = x + attention(norm(x)),   x2 = x1 + W_down (silu(W_gate y) * W_up y),   y = norm(x1)

Autograd would decide when weight gradients appear and when saved tensors die. Here a block is one
autograd function with an explicit backward: weight gradients are made one at a time and handed over
at once, every input gradient is taken before the weight may change, and buffers are used again in
place. What lives between forward and backward is the dict `Kept`, from which the backward pops.

All activations are (n, width) with n = batch * length tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowmem.config.recompute import Level, keeps_attention, keeps_mlp
from lowmem.config.schema import ModelConfig
from lowmem.kernels.attention import Backend, Statistics, attention, attention_backward
from lowmem.kernels.compiled import compiling
from lowmem.kernels.rms_norm import rms_norm, rms_norm_again, rms_norm_backward
from lowmem.kernels.rope import rotate_
from lowmem.kernels.swiglu import swiglu, swiglu_backward
from lowmem.model.boundaries import HostInputs, Kept
from lowmem.model.int8 import Int8Linear
from lowmem.phases import phase

GradientSink = Callable[[str, Tensor], None]
Rotation = tuple[Tensor, Tensor]  # cos, sin: float32 (T, D/2)


class Linear(nn.Module):
    """The uninitialised weight (outputs, inputs) and bias of x W' + b; `Block` multiplies."""

    def __init__(self, inputs: int, outputs: int, bias: bool, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **where))
        self.bias = nn.Parameter(torch.empty(outputs, **where)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W' + b in one new tensor."""
        out = torch.addmm(residual, x, self.weight.t())
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad W: (n, outputs) -> (n, inputs)."""
        return grad @ self.weight

    def add_input_gradient(self, total: Tensor, grad: Tensor) -> None:
        """total += grad W, in place."""
        total.addmm_(grad, self.weight)


AnyLinear = Linear | Int8Linear
LinearType = Callable[..., AnyLinear]  # (inputs, outputs, bias, dtype, device)


class Norm(nn.Module):
    """The uninitialised weight of an RMSNorm."""

    def __init__(self, width: int, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **where))


class Attention(nn.Module):
    """The four projections of grouped-query attention."""

    def __init__(self, config: ModelConfig, linear: LinearType, **where: Any) -> None:
        super().__init__()
        h, kv, bias = config.hidden_size, config.key_value_width, config.attention_bias
        width = config.num_attention_heads * config.head_dim
        self.q_proj: AnyLinear = linear(h, width, bias=bias, **where)
        self.k_proj: AnyLinear = linear(h, kv, bias=bias, **where)
        self.v_proj: AnyLinear = linear(h, kv, bias=bias, **where)
        self.o_proj: AnyLinear = linear(width, h, bias=bias, **where)


class Mlp(nn.Module):
    """The three projections of the gated MLP."""

    def __init__(self, config: ModelConfig, linear: LinearType, **where: Any) -> None:
        super().__init__()
        h, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj: AnyLinear = linear(h, f, bias=bias, **where)
        self.up_proj: AnyLinear = linear(h, f, bias=bias, **where)
        self.down_proj: AnyLinear = linear(f, h, bias=bias, **where)


class Block(nn.Module):
    """Attention and MLP with their norms; `index` counts from 0. linear: of the projections.

    compiled: its element-wise pieces are, see kernels/compiled.py.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        backend: Backend,
        linear: LinearType,
        compiled: bool,
        **where: Any,
    ) -> None:
        super().__init__()
        self.index, self.backend, self.compiled = index, backend, compiled
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.self_attn = Attention(config, linear, **where)
        self.mlp = Mlp(config, linear, **where)
        self.input_layernorm = Norm(config.hidden_size, **where)
        self.post_attention_layernorm = Norm(config.hidden_size, **where)

    def forward(self, x: Tensor, rotation: Rotation, level: Level) -> tuple[Tensor, Kept]:
        """(x2, what `level` keeps for `backward`)."""
        with compiling(self.compiled):
            return self._through(x, rotation, level)

    def _through(self, x: Tensor, rotation: Rotation, level: Level) -> tuple[Tensor, Kept]:
        kept = self._attend(x, rotation)
        x1 = kept["x1"]
        if not keeps_attention(level):
            kept.clear()
        gated = self._gate(x1)
        product = swiglu(gated["gate"], gated["up"])
        if keeps_mlp(level):
            kept |= gated
        gated.clear()  # before the output exists
        kept["x"] = x
        return self.mlp.down_proj.add_to(x1, product), kept

    def backward(self, grad: Tensor, kept: Kept, rotation: Rotation, hand: GradientSink) -> None:
        """Turn `grad`, that of x2, into that of x in place; `kept` is emptied on the way.

        hand: receives (full parameter name, gradient), each exactly once; it may change the weight.
        """
        with compiling(self.compiled):
            self._back_through(grad, kept, rotation, hand)

    def _back_through(
        self, grad: Tensor, kept: Kept, rotation: Rotation, hand: GradientSink
    ) -> None:
        x = kept.pop("x")
        if "q" not in kept:
            kept |= self._attend(x, rotation)
        if "gate" not in kept:
            kept |= self._gate(kept["x1"])
        self._mlp_backward(grad, kept, hand)
        self._attention_backward(grad, x, kept, rotation, hand)

    def _attend(self, x: Tensor, rotation: Rotation) -> Kept:
        """x1 and everything that attention's backward needs beside x."""
        proj = self.self_attn
        y, rstd = rms_norm(x, self.input_layernorm.weight, self.eps)
        q = rotate_(self._heads(proj.q_proj(y), rotation), *rotation)
        k = rotate_(self._heads(proj.k_proj(y), rotation), *rotation)
        v = self._heads(proj.v_proj(y), rotation)
        del y
        out, statistics = attention(q, k, v, self.backend)
        out = out.reshape(len(x), -1)
        kept = {"rstd1": rstd, "q": q, "k": k, "v": v, "out": out}
        kept["logsumexp"] = statistics.logsumexp
        kept |= {f"rng{i}": value for i, value in enumerate(statistics.rng)}
        kept["x1"] = proj.o_proj.add_to(x, out)
        return kept

    def _gate(self, x1: Tensor) -> Kept:
        """Both inputs of the MLP's product."""
        y, rstd = rms_norm(x1, self.post_attention_layernorm.weight, self.eps)
        return {"rstd2": rstd, "gate": self.mlp.gate_proj(y), "up": self.mlp.up_proj(y)}

    def _heads(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(n, heads * D) -> (B, T, heads, D), a view."""
        return x.view(-1, rotation[0].shape[0], x.shape[1] // self.head_dim, self.head_dim)

    def _mlp_backward(self, grad: Tensor, kept: Kept, hand: GradientSink) -> None:
        """grad of x2 -> grad of x1, in place."""
        mlp, norm = self.mlp, self.post_attention_layernorm
        gate, up = kept.pop("gate"), kept.pop("up")
        with phase("gradient of mlp.down"):
            made = _weight_gradients(grad, swiglu(gate, up), mlp.down_proj)
            grad_product = mlp.down_proj.input_gradient(grad)
            self._hand(hand, "mlp.down_proj", made)
        swiglu_backward(grad_product, gate, up)  # gate and up now hold their own gradients
        del grad_product
        x1, rstd = kept.pop("x1"), kept.pop("rstd2")
        y = rms_norm_again(x1, norm.weight, rstd)
        with phase("gradient of mlp.up"):
            grad_y = mlp.up_proj.input_gradient(up)
            made = _weight_gradients(up, y, mlp.up_proj)
            del up
            self._hand(hand, "mlp.up_proj", made)
        with phase("gradient of mlp.gate"):
            mlp.gate_proj.add_input_gradient(grad_y, gate)
            made = _weight_gradients(gate, y, mlp.gate_proj)
            del gate, y
            self._hand(hand, "mlp.gate_proj", made)
        with phase("gradient of norm"):
            made = {"weight": rms_norm_backward(grad_y, x1, norm.weight, rstd)}
            grad.add_(grad_y)
            self._hand(hand, "post_attention_layernorm", made)

    def _attention_backward(
        self, grad: Tensor, x: Tensor, kept: Kept, rotation: Rotation, hand: GradientSink
    ) -> None:
        """grad of x1 -> grad of x, in place."""
        proj, norm = self.self_attn, self.input_layernorm
        with phase("gradient of attention.o"):
            made = _weight_gradients(grad, kept["out"], proj.o_proj)
            grad_out = proj.o_proj.input_gradient(grad)
            self._hand(hand, "self_attn.o_proj", made)
        grad_q, grad_k, grad_v = self._attend_backward(grad_out, kept, rotation)
        del grad_out
        rstd = kept.pop("rstd1")
        y = rms_norm_again(x, norm.weight, rstd)
        with phase("gradient of attention.v"):
            grad_y = proj.v_proj.input_gradient(grad_v)
            made = _weight_gradients(grad_v, y, proj.v_proj)
            del grad_v
            self._hand(hand, "self_attn.v_proj", made)
        with phase("gradient of attention.k"):
            proj.k_proj.add_input_gradient(grad_y, grad_k)
            made = _weight_gradients(grad_k, y, proj.k_proj)
            del grad_k
            self._hand(hand, "self_attn.k_proj", made)
        with phase("gradient of attention.q"):
            proj.q_proj.add_input_gradient(grad_y, grad_q)
            made = _weight_gradients(grad_q, y, proj.q_proj)
            del grad_q, y
            self._hand(hand, "self_attn.q_proj", made)
        with phase("gradient of norm"):
            made = {"weight": rms_norm_backward(grad_y, x, norm.weight, rstd)}
            grad.add_(grad_y)
            self._hand(hand, "input_layernorm", made)

    def _attend_backward(
        self, grad_out: Tensor, kept: Kept, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the projections of q, k and v: (n, width of each)."""
        rng = tuple(kept.pop(name) for name in ("rng0", "rng1") if name in kept)
        statistics = Statistics(kept.pop("logsumexp"), rng)
        q, k, v = kept.pop("q"), kept.pop("k"), kept.pop("v")
        out = self._heads(kept.pop("out"), rotation)
        grad_out = self._heads(grad_out, rotation)
        made = attention_backward(grad_out, q, k, v, out, statistics, self.backend)
        grad_q, grad_k, grad_v = made
        rotate_(grad_q, *rotation, back=True)
        rotate_(grad_k, *rotation, back=True)
        n = len(grad_out) * grad_out.shape[1]
        return grad_q.reshape(n, -1), grad_k.reshape(n, -1), grad_v.reshape(n, -1)

    def _hand(self, hand: GradientSink, module: str, gradients: dict[str, Tensor]) -> None:
        """Hand gradients over by full name and forget each before the next."""
        for name in list(gradients):
            hand(f"model.layers.{self.index}.{module}.{name}", gradients.pop(name))


def _weight_gradients(grad: Tensor, x: Tensor, layer: AnyLinear) -> dict[str, Tensor]:
    """Gradients of weight and bias of a layer with input x (n, inputs) and output's `grad`."""
    made = {"weight": grad.t() @ x}
    if layer.bias is not None:
        made["bias"] = grad.sum(0, dtype=torch.float32).to(grad.dtype)
    return made


class BlockStep(torch.autograd.Function):
    """A block as autograd sees it: one input, one output, and no weights.

    inputs: where the block's input waits for backward, and its turn; None: with what else is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        rotation: Rotation,
        level: Level,
        hand: GradientSink,
        inputs: tuple[HostInputs, int] | None,
    ) -> Tensor:
        leaves = inputs is not None and inputs[0].leave(block.index, x)
        out, ctx.kept = block(x, rotation, level)
        if leaves:
            del ctx.kept["x"]
        ctx.block, ctx.rotation, ctx.hand, ctx.inputs = block, rotation, hand, inputs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.kept
        del ctx.kept  # a second backward has nothing to work with, and must fail
        with phase(f"backward of block {ctx.block.index + 1}"):
            if ctx.inputs is not None:
                inputs, turn = ctx.inputs
                inputs.bring(ctx.block.index, kept, turn)
            ctx.block.backward(grad, kept, ctx.rotation, ctx.hand)
        return grad, None, None, None, None, None
