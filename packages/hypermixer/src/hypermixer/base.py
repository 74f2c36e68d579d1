"""What a HyperMixing layer is made of: its parameters, and the steps that all ways to run it share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from hypermixer import _checks, kernels
from hypermixer.checkpoint_keys import (
    drop_second,
    is_reference,
    rename_reference_keys,
    second_repeats_first,
)
from hypermixer.distributed import GroupRef, all_reduce_sum
from hypermixer.functional import (
    Activation,
    accumulation_dtype,
    get_activation,
    hidden_from_state,
    output_dtype,
    read_matrix,
    read_tokens,
)
from hypermixer.hypernet import INITS, Hypernet, project_heads
from hypermixer.positions import make_token_info


class HyperMixingBase(nn.Module):
    """Parameters and shared steps of :class:`hypermixer.HyperMixing`, which documents them."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        num_heads: int = 1,
        *,
        tied: bool = False,
        head_hidden: Literal["split", "full"] = "split",
        hypernet_dim: int | None = None,
        bias: bool = False,
        activation: str | Activation = "gelu",
        norm: bool | nn.Module = True,
        norm_eps: float = 1e-5,
        token_info: str | nn.Module | Callable[..., Tensor] | None = "sinusoidal",
        max_length: int | None = None,
        causal: bool = False,
        block_size: int | None = None,
        chunk_size: int | None = None,
        length_scale: Literal["mean", "sqrt"] | None = None,
        init: Literal["reference", "xavier"] = "reference",
        algorithm: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive("embed_dim", embed_dim)
        hidden_dim = 2 * embed_dim if hidden_dim is None else hidden_dim
        hypernet_dim = embed_dim if hypernet_dim is None else hypernet_dim
        sizes = {"hidden_dim": hidden_dim, "num_heads": num_heads, "hypernet_dim": hypernet_dim}
        for name, size in sizes.items():
            _checks.positive(name, size)
        _checks.one_of("head_hidden", head_hidden, ("split", "full"))
        _checks.one_of("length_scale", length_scale, (None, "mean", "sqrt"))
        _checks.one_of("init", init, INITS)
        kernels.check_algorithm(algorithm)
        _checks.divisible("embed_dim", embed_dim, num_heads)
        _checks.divisible("hypernet_dim", hypernet_dim, num_heads)
        _checks.divisible("hidden_dim", hidden_dim, num_heads)
        for name, limit in {"block_size": block_size, "chunk_size": chunk_size}.items():
            if limit is not None:
                _checks.positive(name, limit)

        self.embed_dim, self.hidden_dim, self.num_heads = embed_dim, hidden_dim, num_heads
        self.hypernet_dim, self.head_hidden = hypernet_dim, head_hidden
        self.tied, self.bias, self.init, self.algorithm = tied, bias, init, algorithm
        self.block_size = 1 if causal and block_size is None else block_size
        self.causal = self.block_size is not None
        self.chunk_size, self.length_scale = chunk_size, length_scale
        self.activation = get_activation(activation)
        self.group = None if process_group is None else GroupRef(process_group)

        def hypernet() -> Hypernet:
            return Hypernet(
                num_heads,
                embed_dim // num_heads,
                hypernet_dim // num_heads,
                hidden_dim // num_heads if head_hidden == "split" else hidden_dim,
                bias=bias,
                activation=self.activation,
                init=init,
                device=device,
                dtype=dtype,
            )

        self.w1 = hypernet()
        self.w2 = None if tied else hypernet()
        self.token_info = make_token_info(token_info, embed_dim, max_length, device, dtype)
        if not isinstance(norm, (bool, nn.Module)):
            raise TypeError(f"norm must be a bool or a module, got {norm!r}")
        self.norm: nn.Module | None
        if isinstance(norm, nn.Module):
            self.norm = norm
        else:
            self.norm = (
                nn.LayerNorm(embed_dim, eps=norm_eps, device=device, dtype=dtype) if norm else None
            )

    def reset_parameters(self) -> None:
        """Draw all parameters anew, after ``to_empty`` of a module made on the meta device."""
        for module in self.children():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def extra_repr(self) -> str:
        """Return what print(module) shows."""
        text = f"{self.embed_dim}, {self.hidden_dim}, num_heads={self.num_heads}, tied={self.tied}"
        options = {
            "head_hidden": (self.head_hidden, "split"),
            "bias": (self.bias, False),
            "block_size": (self.block_size, None),
            "chunk_size": (self.chunk_size, None),
            "length_scale": (self.length_scale, None),
            "algorithm": (self.algorithm, "auto"),
        }
        return text + "".join(f", {n}={v!r}" for n, (v, default) in options.items() if v != default)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Accept the authors' and SpeechBrain's names too; see :mod:`hypermixer.checkpoint_keys`."""
        if is_reference(state_dict, prefix):
            rename_reference_keys(state_dict, prefix)
            if self.tied and second_repeats_first(state_dict, prefix):
                drop_second(state_dict, prefix)
        weight = state_dict.get(f"{prefix}w1.fc1_weight")
        if weight is not None and weight.shape[0] != self.num_heads:
            error_msgs.append(
                f"{prefix}w1.fc1_weight has num_heads={weight.shape[0]}, "
                f"but this layer was made with num_heads={self.num_heads}"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @property
    def _reader(self) -> Hypernet:
        return self.w1 if self.w2 is None else self.w2

    def _output_layers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        w1, w2 = self.w1, self._reader
        return w1.fc2_weight, w1.fc2_bias, w2.fc2_weight, w2.fc2_bias

    def split_heads(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, d) as a head-major view (H, B, N, f)."""
        width = self.embed_dim // self.num_heads
        batch, length, _ = x.shape
        return x.view(batch, length, self.num_heads, width).permute(2, 0, 1, 3)

    def _inform(self, x: Tensor, ids: Tensor | None, start: int) -> Tensor:
        if self.token_info is None:
            return x
        informed: Tensor = self.token_info(x, ids, start)
        return informed

    def _hidden_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return both sides' hidden layers of the same tokens.

        On accelerators by one product with the stacked weights; on CPUs two are faster, since
        their results are contiguous and nothing is copied.
        """
        if self.w2 is None:
            g = self.w1.hidden(x)
            return g, g
        if x.device.type == "cpu":
            return self.w1.hidden(x), self.w2.hidden(x)
        return self._hidden_stacked(x)

    def _hidden_stacked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nets = [self.w1, self._reader]
        weight = torch.cat([net.fc1_weight for net in nets], dim=1)
        biases: list[Tensor] = [net.fc1_bias for net in nets if net.fc1_bias is not None]
        bias = torch.cat(biases, dim=1) if biases else None
        g1, g2 = self.activation(project_heads(x, weight, bias)).chunk(2, dim=-1)
        return g1, g2

    def _read(self, state: Tensor, g2: Tensor, scale: Tensor | None) -> Tensor:
        """Return Y (H, B, M, f) from S (H, B, h(+1), f)."""
        u1, c1, u2, c2 = self._output_layers()
        hidden = hidden_from_state(state, u1, c1)
        if scale is not None:
            hidden = hidden * scale.to(hidden.dtype).view(1, -1, 1, 1)
        return read_tokens(g2, read_matrix(self.activation(hidden), u2, c2))

    def join_heads(self, y: Tensor) -> Tensor:
        """Return the heads' Y (H, B, M, f) as (B, M, d)."""
        return y.permute(1, 2, 0, 3).flatten(2)

    def finish(
        self,
        out: Tensor,
        query_mask: Tensor | None,
        dtype: torch.dtype,
        norm_parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return norm(Y) (B, M, d), masked rows zero before the norm."""
        if query_mask is not None:
            out = out.masked_fill(query_mask.unsqueeze(-1), 0.0)
        if self.norm is None:
            return out.to(dtype) if output_dtype(dtype) != dtype else out
        if norm_parameters is None:
            own: Mapping[str, Tensor] = dict(self.norm.named_parameters())
        else:
            own = norm_parameters
        if output_dtype(dtype) != dtype:  # float16: LayerNorm works on what would overflow
            if not isinstance(self.norm, nn.LayerNorm):
                out = out.to(dtype)
            own = {name: p.to(out.dtype) for name, p in own.items()}
        elif norm_parameters is None:
            return self.norm(out)  # type: ignore[no-any-return]
        normed: Tensor = functional_call(self.norm, dict(own), (out,))
        return normed.to(dtype) if output_dtype(dtype) != dtype else normed

    def _count(self, keys: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """Return the number of keys of each sequence (B,), over all ranks; None where not needed."""
        if self.length_scale is None:
            return None
        dtype = accumulation_dtype(keys.dtype)
        if key_mask is None:
            count = torch.full(keys.shape[:1], keys.shape[1], device=keys.device, dtype=dtype)
        else:
            count = (~key_mask).sum(1, dtype=dtype)
        return count if self.group is None else all_reduce_sum(count, self.group)

    def _scale(self, count: Tensor | None) -> Tensor | None:
        """Return the factor of P for a number of keys; None where P is not scaled."""
        if count is None or self.length_scale is None:
            return None
        count = count.clamp(min=1.0)
        return count.reciprocal() if self.length_scale == "mean" else count.rsqrt()


def clear(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x with masked tokens zero; masked_fill, since 0·NaN is NaN, in gradients too."""
    return x if mask is None else x.masked_fill(mask.unsqueeze(-1), 0.0)
