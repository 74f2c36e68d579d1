"""A torch optimizer around another one: what `Lookahead` and `Optimistic` have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Passes as a `torch.optim.Optimizer` and shares groups, state and defaults with its base.

    Learning-rate schedulers, `GradScaler`, hooks and `add_param_group` work on the wrapper or on the base,
    whichever the user holds: the groups are the same objects.
    """

    _key: str  # of the wrapper's own entry in the state dict

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        self.base = base
        # Makes the hook tables and the profiled step, as unpickling does; Optimizer.__init__ would
        # copy the groups.
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups themselves."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base's state itself."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults themselves."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base's parameters."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base."""
        self.base.add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Run the base's step, then the wrapper's own part."""
        before = self._before_step()
        loss = self.base.step(closure) if closure is not None else self.base.step()
        with torch.no_grad():
            self._after_step(before)
        return loss

    def _before_step(self) -> Any:
        """Return what `_after_step` needs of the weights before the base's step."""
        return None

    def _after_step(self, before: Any) -> None:
        """Do the wrapper's part."""
        raise AssertionError("a wrapper defines its own part")  # pragma: no cover

    def _own_state(self) -> dict[str, Any]:
        """Return the wrapper's part of the state dict."""
        raise AssertionError("a wrapper defines its own state")  # pragma: no cover

    def _load_own_state(self, state: dict[str, Any]) -> None:
        """Take over the wrapper's part of a state dict."""
        raise AssertionError("a wrapper defines its own state")  # pragma: no cover

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict with one more entry, the wrapper's own."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        result = {**self.base.state_dict(), self._key: self._own_state()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned into the base and the wrapper.

        Raises:
            ValueError: the state dict was not made by such a wrapper, or does not fit.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        if self._key not in state_dict:
            raise ValueError(
                f"the state dict has no entry {self._key!r}: it was saved by a "
                f"{type(self.base).__name__}, load it into `.base`"
            )
        own = state_dict.pop(self._key)
        self._load_own_state(own)
        self.base.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Keep the base and the wrapper's own attributes; hooks are not copied, as in torch."""
        return {
            key: value
            for key, value in vars(self).items()
            # "step": a scheduler counts calls by an attribute of that name, bound to this object.
            if not key.startswith(("_optimizer_", "_zero_grad_profile_name")) and key != "step"
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the attributes and make empty hook tables."""
        vars(self).update(state)
        super().__setstate__({})

    def __repr__(self) -> str:
        """Show the wrapper around its base."""
        return f"{type(self).__name__}({self._describe()}{self.base!r})"

    def _describe(self) -> str:
        return ""
