"""What is hung on modules so that streaming hears of their calls; none of it acts in a copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Hook:
    """A hook of a module that calls a function with what is given; idle in a copy of the model.

    Args:
        act: the function; None for a hook that does nothing.
        *given: its arguments.
    """

    def __init__(self, act: Callable[..., None] | None, *given: Any) -> None:
        self._act, self._given = act, given

    @property
    def acts(self) -> bool:
        """Whether this is no copy."""
        return self._act is not None

    def __call__(self, *_: Any) -> None:
        """Call the function, whatever the module is called with."""
        if self._act is not None:
            self._act(*self._given)

    def __reduce__(self) -> Any:
        """Lose the function in a copy."""
        return Hook, (None,)


class Instead:
    """A function in the place of a method of one module; a copy of the module has the method of its class.

    Args:
        module: the module.
        name: name of the method.
        act: the function.
    """

    def __init__(self, module: nn.Module, name: str, act: Callable[..., Any]) -> None:
        self._module, self._name, self._act = module, name, act
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._act(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Lose the function in a copy."""
        return partial, (_of_class, self._module, self._name)

    def remove(self) -> None:
        """Let the module have the method of its class again."""
        self._module.__dict__.pop(self._name, None)


class Interruptible(Instead):
    """Calls of a module after whose interrupt a function is called: torch's hooks then are not.

    Args:
        module: the module.
        undo: function that is called when a KeyboardInterrupt or the like leaves the module.
    """

    def __init__(self, module: nn.Module, undo: Callable[[], None]) -> None:
        super().__init__(module, "_call_impl", partial(_of_class, module, "_call_impl"))
        self._undo = undo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        try:
            return super().__call__(*args, **kwargs)
        except Exception:
            raise
        except BaseException:
            self._undo()
            raise


def _of_class(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(type(module), name)(module, *args, **kwargs)
