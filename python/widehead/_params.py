"""_params.py -- the parameters of a scikit-learn style object without scikit-learn: its constructor's arguments."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from . import _core

if TYPE_CHECKING:
    from typing_extensions import Self


class Params:
    """Gives a class whose constructor only stores its arguments what ``sklearn.base.clone`` and pipelines use."""

    @classmethod
    def _argument_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, by name; with `deep`, those of arguments that have this method as well."""
        params = {name: getattr(self, name) for name in self._argument_names()}
        if deep:
            for name, value in list(params.items()):
                if hasattr(value, "get_params") and not isinstance(value, type):
                    params |= {f"{name}__{key}": v for key, v in value.get_params().items()}
        return params

    def set_params(self, **params: Any) -> Self:
        """Changes arguments of the constructor, `outer__inner` those of an argument; ShapeError for an unknown name."""
        for name, value in params.items():
            outer, _, inner = name.partition("__")
            if outer not in self._argument_names():
                raise _core.ShapeError(
                    f"{outer}: {type(self).__name__} has no such parameter; it has {', '.join(self._argument_names())}"
                )
            if inner:
                getattr(self, outer).set_params(**{inner: value})
            else:
                setattr(self, outer, value)
        return self

    def __repr__(self) -> str:
        default = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        shown = (f"{name}={value!r}" for name, value in self.get_params(False).items() if value != default[name])
        return f"{type(self).__name__}({', '.join(shown)})"
