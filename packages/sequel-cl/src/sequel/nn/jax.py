"""Models for the JAX backend: a pure function with its parameters, a small zoo, and flax adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:  # pragma: no cover - tested in a process of its own
    raise ImportError(
        "the JAX backend needs jax, optax and flax: pip install sequel-cl[jax]"
    ) from error
import numpy as np

from sequel.rng import stream

__all__ = ["CNN", "MLP", "FunctionalModel", "as_functional", "from_linen", "from_nnx"]


@dataclass
class FunctionalModel:
    """A model for the JAX backend.

    Args:
        apply: ``apply(params, x) -> logits``; with ``stateful=True``
            ``apply(params, collections, x, train, key) -> (logits, collections)``.
        params: the trainable pytree.
        features: ``features(params, x)``, the encoder's output, for algorithms that need one.
        stateful: the model has running statistics or dropout.
        collections: its non-trainable pytree.
        encoder: prefix of the encoder's parameter names.
        layout: ``"NHWC"`` transposes images (N, C, H, W) of a scenario before ``apply`` sees them.

    >>> model = FunctionalModel(lambda p, x: x @ p["w"], {"w": jnp.zeros((4, 3))})
    >>> model.apply(model.params, jnp.ones((2, 4))).shape
    (2, 3)
    """

    apply: Callable[..., Any]
    params: Any
    features: Callable[[Any, Any], Any] | None = None
    stateful: bool = False
    collections: Any = None
    encoder: str = "encoder"
    layout: str = "NCHW"


def _linear(rng: np.random.Generator, fan_in: int, fan_out: int, dtype: Any) -> tuple[Any, Any]:
    bound = 1 / np.sqrt(fan_in)
    w = rng.uniform(-bound, bound, (fan_in, fan_out))
    return jnp.asarray(w, dtype), jnp.asarray(rng.uniform(-bound, bound, fan_out), dtype)


def MLP(
    inputs: int,
    hidden: Sequence[int] = (256, 256),
    outputs: int = 10,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    dtype: Any = jnp.float32,
) -> FunctionalModel:
    """Return the ReLU network of :class:`sequel.nn.MLP`; weights are (in, out).

    Its parameters are named as in PyTorch, so that :func:`sequel.nn.to_jax` maps one to the other.

    >>> sorted(MLP(4, (8,), 3).params)
    ['classifier.bias', 'classifier.weight', 'encoder.1.bias', 'encoder.1.weight']
    """
    rng, params, last = stream(seed, "init"), {}, inputs
    step = 3 if dropout else 2
    names = []
    for i, width in enumerate(hidden):
        names.append(f"encoder.{1 + step * i}")
        params[f"{names[-1]}.weight"], params[f"{names[-1]}.bias"] = _linear(
            rng, last, width, dtype
        )
        last = width
    params["classifier.weight"], params["classifier.bias"] = _linear(rng, last, outputs, dtype)

    def encode(p: Any, x: Any, train: bool = False, key: Any = None) -> Any:
        x = x.reshape(len(x), -1)
        for name in names:
            x = jax.nn.relu(x @ p[f"{name}.weight"] + p[f"{name}.bias"])
            if dropout and train:
                key, mine = jax.random.split(key)
                keep = jax.random.bernoulli(mine, 1 - dropout, x.shape)
                x = jnp.where(keep, x / (1 - dropout), 0)
        return x

    def head(p: Any, h: Any) -> Any:
        return h @ p["classifier.weight"] + p["classifier.bias"]

    if dropout:

        def noisy(p: Any, c: Any, x: Any, train: bool, key: Any) -> Any:
            return head(p, encode(p, x, train, key)), c

        return FunctionalModel(noisy, params, encode, stateful=True, collections={})
    return FunctionalModel(lambda p, x: head(p, encode(p, x)), params, encode)


def CNN(
    shape: tuple[int, int, int],
    outputs: int = 10,
    *,
    channels: Sequence[int] = (16, 32),
    seed: int = 0,
    dtype: Any = jnp.float32,
) -> FunctionalModel:
    """Return the strided convolutional network of :class:`sequel.nn.CNN`, NHWC inside.

    Inputs are (N, C, H, W) as everywhere in a scenario; kernels are (H, W, in, out).

    >>> CNN((1, 8, 8), channels=(4,)).params["encoder.0.weight"].shape
    (3, 3, 1, 4)
    """
    rng, params, last = stream(seed, "init"), {}, shape[0]
    h, w = shape[1:]
    for i, width in enumerate(channels):
        bound = 1 / np.sqrt(9 * last)
        kernel = rng.uniform(-bound, bound, (3, 3, last, width))
        params[f"encoder.{2 * i}.weight"] = jnp.asarray(kernel, dtype)
        params[f"encoder.{2 * i}.bias"] = jnp.asarray(rng.uniform(-bound, bound, width), dtype)
        last, h, w = width, (h + 1) // 2, (w + 1) // 2
    wide = last * h * w
    params["classifier.weight"], params["classifier.bias"] = _linear(rng, wide, outputs, dtype)

    def encode(p: Any, x: Any) -> Any:
        x = jnp.transpose(x, (0, 2, 3, 1))
        for i in range(len(channels)):
            x = jax.lax.conv_general_dilated(
                x,
                p[f"encoder.{2 * i}.weight"],
                (2, 2),
                ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + p[f"encoder.{2 * i}.bias"])
        # Features in PyTorch's order: what algorithms store of them is the same in both backends.
        return jnp.transpose(x, (0, 3, 1, 2)).reshape(len(x), -1)

    def apply(p: Any, x: Any) -> Any:
        return encode(p, x) @ p["classifier.weight"] + p["classifier.bias"]

    return FunctionalModel(apply, params, encode)


def from_linen(module: Any, variables: Any, *, dropout: bool = False) -> FunctionalModel:
    """Adapt a flax linen module with its variables; called as ``module.apply(v, x[, train=...])``.

    Collections other than ``"params"`` (running statistics) are carried in the training state. ``dropout=True``
    hands a key named ``"dropout"`` in training; the module then takes ``train``.
    """
    rest = {k: v for k, v in variables.items() if k != "params"}
    if not rest and not dropout:
        return FunctionalModel(lambda p, x: module.apply({"params": p}, x), variables["params"])

    def apply(p: Any, c: Any, x: Any, train: bool, key: Any) -> Any:
        rngs = {"dropout": key} if dropout and train else None
        full = {"params": p, **c}
        if train and c:
            out, new = module.apply(full, x, train=True, mutable=list(c), rngs=rngs)
            return out, dict(new)
        return module.apply(full, x, train=train, rngs=rngs), c

    return FunctionalModel(apply, variables["params"], stateful=True, collections=rest)


def from_nnx(model: Any) -> FunctionalModel:
    """Adapt a flax nnx module; parameters are ``nnx.Param``, all else is carried as state.

    An attribute ``encoder`` of the module, where there is one, gives the features.
    """
    from flax import nnx

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(p: Any, c: Any, x: Any, train: bool, key: Any) -> Any:
        # New variables: those of an outer trace may not be written to.
        p, c = jax.tree_util.tree_map(lambda leaf: leaf, (p, c))
        module = nnx.merge(graph, p, c)
        if train:
            module.train()
        else:
            module.eval()
        out = module(x)
        return out, nnx.state(module, nnx.Not(nnx.Param))

    def features(p: Any, x: Any) -> Any:
        module = nnx.merge(graph, p, rest)
        module.eval()
        return module.encoder(x)

    found = features if hasattr(model, "encoder") else None
    return FunctionalModel(apply, params, found, stateful=True, collections=rest)


def as_functional(model: Any) -> FunctionalModel:
    """Take a FunctionalModel, a flax nnx module, or a pair (linen module, variables)."""
    if isinstance(model, FunctionalModel):
        return model
    if isinstance(model, tuple) and len(model) == 2:
        return from_linen(*model)
    try:
        from flax import nnx
    except ImportError:  # pragma: no cover - flax comes with the extra
        nnx = None
    if nnx is not None and isinstance(model, nnx.Module):
        return from_nnx(model)
    raise TypeError(
        f"model must be a torch.nn.Module, a sequel.nn.jax.FunctionalModel, a flax nnx module or a "
        f"pair (linen module, variables), got {type(model).__name__}"
    )
