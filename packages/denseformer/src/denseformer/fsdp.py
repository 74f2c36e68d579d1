"""FSDP2: keeping the averages in float32 under a 16-bit mixed-precision policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def shard_dwa(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Shard ``model.dwa`` as a group of its own with a float32 policy; return the model.

    Call it after :func:`densify` and before ``fully_shard`` of the model. Without it a policy with
    ``param_dtype=torch.bfloat16`` rounds α to steps of 0.004 to 0.008 near 1.

    Args:
        model: a densified model.
        **kwargs: for ``fully_shard``, such as ``mesh``.

    Raises:
        ValueError: the model has no ``dwa``.
    """
    dwa: Any = getattr(model, "dwa", None)
    if not hasattr(dwa, "begin"):
        raise ValueError(f"this {type(model).__name__} has no dwa; densify it first")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(dwa, mp_policy=policy, **kwargs)
    return model
