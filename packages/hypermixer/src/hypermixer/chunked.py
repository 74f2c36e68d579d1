"""Mixing in two passes over chunks of tokens, with a backward pass that recomputes.

Pass 1 adds up S over chunks of keys, pass 2 emits Y (norm included) over chunks of queries. Beside the
input and the output nothing that grows with N is held: the extra memory is O(chunk·d + d²/H). The
backward pass goes over the chunks again, so it costs one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from hypermixer.distributed import GroupRef
from hypermixer.functional import (
    hidden_from_state,
    read_matrix,
    read_tokens,
    same_autocast,
    token_state,
)
from hypermixer.hypernet import project_heads

if TYPE_CHECKING:
    from hypermixer.mixing import HyperMixing

Parameters = dict[str, Tensor]


class Plan(NamedTuple):
    """What a layer does with a chunk of tokens, apart from the tensors that need gradients.

    Attributes:
        chunk_size: tokens at a time.
        names: the layer's parameter names, in the order in which the parameters are passed.
        write: (key chunk, value chunk or None, window, parameters) → S of the chunk.
        between: (S, parameters) → R.
        read: (query chunk, window, R, parameters) → output chunk.
        group: ranks that hold the other tokens, or None.
    """

    chunk_size: int
    names: tuple[str, ...]
    write: Callable[[Tensor, Tensor | None, slice, Parameters], Tensor]
    between: Callable[[Tensor, Parameters], Tensor]
    read: Callable[[Tensor, slice, Tensor, Parameters], Tensor]
    group: GroupRef | None


def _windows(length: int, size: int) -> list[slice]:
    # An empty sequence still needs one (empty) chunk, for the shapes and dtypes.
    return [slice(a, min(a + size, length)) for a in range(0, max(length, 1), size)]


def _write_all(plan: Plan, key: Tensor, value: Tensor | None, parameters: Parameters) -> Tensor:
    windows = _windows(key.shape[1], plan.chunk_size)
    parts = (
        plan.write(key[:, w], None if value is None else value[:, w], w, parameters)
        for w in windows
    )
    state = next(parts)
    for part in parts:
        state = state + part
    if plan.group is not None:
        state = state.contiguous()
        dist.all_reduce(state, group=plan.group.group)
    return state


class _ChunkedMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        parameters = dict(zip(plan.names, tensors, strict=True))
        state = _write_all(plan, query if key is None else key, value, parameters)
        matrix = plan.between(state, parameters)
        windows = _windows(query.shape[1], plan.chunk_size)
        first = plan.read(query[:, windows[0]], windows[0], matrix, parameters)
        out = first.new_empty(*query.shape[:2], first.shape[-1])
        out[:, windows[0]] = first
        for window in windows[1:]:
            out[:, window] = plan.read(query[:, window], window, matrix, parameters)
        ctx.plan = plan
        ctx.autocast = same_autocast(query.device.type)
        ctx.save_for_backward(query, key, value, state, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        query, key, value, state, *tensors = ctx.saved_tensors
        leaves = [t.detach().requires_grad_() for t in tensors]
        parameters = dict(zip(plan.names, leaves, strict=True))
        totals = [torch.zeros_like(t) for t in leaves]

        def run(outputs: Tensor, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
            """Add to the parameters' gradients; return those of the inputs."""
            wanted = [*inputs, *leaves]
            grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                outputs, wanted, upstream, allow_unused=True
            )
            for total, part in zip(totals, grads[len(inputs) :], strict=True):
                if part is not None:
                    total += part
            pairs = zip(inputs, grads, strict=False)
            return [torch.zeros_like(x) if g is None else g for x, g in pairs]

        with torch.enable_grad(), ctx.autocast():
            state = state.detach().requires_grad_()
            middle = plan.between(state, parameters)
            matrix = middle.detach().requires_grad_()
            d_matrix = torch.zeros_like(matrix)
            d_query = torch.zeros_like(query)
            for window in _windows(query.shape[1], plan.chunk_size):
                part = query[:, window].detach().requires_grad_()
                y = plan.read(part, window, matrix, parameters)
                d_part, d_read = run(y, [part, matrix], grad[:, window])
                d_query[:, window] = d_part
                d_matrix += d_read
            (d_state,) = run(middle, [state], d_matrix)
            if plan.group is not None:
                d_state = d_state.contiguous()
                dist.all_reduce(d_state, group=plan.group.group)
            d_key = d_query if key is None else torch.zeros_like(key)
            d_value = None if value is None else torch.zeros_like(value)
            keys = query if key is None else key
            for window in _windows(keys.shape[1], plan.chunk_size):
                inputs = [keys[:, window].detach().requires_grad_()]
                if value is not None:
                    inputs.append(value[:, window].detach().requires_grad_())
                s = plan.write(
                    inputs[0], inputs[1] if len(inputs) > 1 else None, window, parameters
                )
                grads = run(s, inputs, d_state)
                d_key[:, window] += grads[0]
                if d_value is not None:
                    d_value[:, window] = grads[1]
        return None, d_query, None if key is None else d_key, d_value, *totals


def mix_chunked(
    plan: Plan, query: Tensor, key: Tensor | None, value: Tensor | None, parameters: Parameters
) -> Tensor:
    """Run a plan over chunks; ``key`` None is self-mixing, ``value`` None takes the keys."""
    tensors = [parameters[name] for name in plan.names]
    out: Tensor = _ChunkedMix.apply(plan, query, key, value, *tensors)  # type: ignore[no-untyped-call]
    return out


def make_plan(
    layer: HyperMixing,
    chunk_size: int,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    ids: tuple[Tensor | None, Tensor | None],
    starts: tuple[int, int],
    scale: Tensor | None,
) -> Plan:
    """Return the plan of a HyperMixing layer.

    Args:
        layer: the layer.
        chunk_size: tokens at a time.
        key_mask: (B, N) bool or None.
        query_mask: (B, M) bool or None.
        ids: explicit positions of queries and of keys.
        starts: first positions of queries and of keys, where there are no ids.
        scale: (B,) factor of P, or None.
    """
    reader = "w1" if layer.tied else "w2"

    def prepare(
        x: Tensor, mask: Tensor | None, which: int, window: slice, p: Parameters
    ) -> tuple[Tensor, Tensor]:
        if mask is not None:
            x = x.masked_fill(mask[:, window].unsqueeze(-1), 0.0)
        if layer.token_info is None:
            return x, x
        own = {n[11:]: t for n, t in p.items() if n.startswith("token_info.")}
        where = ids[which]
        chosen = None if where is None else where[..., window]
        arguments = (x, chosen, starts[which] + window.start)
        return x, functional_call(layer.token_info, own, arguments)

    def activate(x: Tensor, p: Parameters) -> Tensor:
        if not isinstance(layer.activation, nn.Module):
            return layer.activation(x)
        own = {n[11:]: t for n, t in p.items() if n.startswith("activation.")}
        active: Tensor = functional_call(layer.activation, own, (x,))
        return active

    def hidden(x: Tensor, side: str, p: Parameters) -> Tensor:
        bias = p.get(f"{side}.fc1_bias")
        return activate(project_heads(x, p[f"{side}.fc1_weight"], bias), p)

    def write(key: Tensor, value: Tensor | None, window: slice, p: Parameters) -> Tensor:
        clean, informed = prepare(key, key_mask, 1, window, p)
        if value is None:
            value = clean
        elif key_mask is not None:
            value = value.masked_fill(key_mask[:, window].unsqueeze(-1), 0.0)
        g = hidden(informed, "w1", p)
        return token_state(g, layer.split_heads(value), bias=layer.bias)

    def between(state: Tensor, p: Parameters) -> Tensor:
        h = hidden_from_state(state, p["w1.fc2_weight"], p.get("w1.fc2_bias"))
        if scale is not None:
            h = h * scale.to(h.dtype).view(1, -1, 1, 1)
        return read_matrix(activate(h, p), p[f"{reader}.fc2_weight"], p.get(f"{reader}.fc2_bias"))

    def read(query: Tensor, window: slice, matrix: Tensor, p: Parameters) -> Tensor:
        _, informed = prepare(query, query_mask, 0, window, p)
        y = read_tokens(hidden(informed, reader, p), matrix)
        mask = None if query_mask is None else query_mask[:, window]
        own = {n[5:]: t for n, t in p.items() if n.startswith("norm.")}
        return layer.finish(layer.join_heads(y), mask, query.dtype, own)

    names = tuple(name for name, _ in layer.named_parameters())
    return Plan(chunk_size, names, write, between, read, layer.group)
