"""Imports Gradio without its stub files, which takes half as long.

Gradio parses the source of each of its components when it is imported, to write files that editors read. Nothing here
reads them. A release of Gradio that has no such function is imported as it is.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODULE, _FUNCTION = "gradio.component_meta", "create_or_modify_pyi"


class _Finder(PathFinder):
    """Finds the one module, whose function does nothing then."""

    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None):
        spec = super().find_spec(fullname, path, target) if fullname == _MODULE else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        if hasattr(module, _FUNCTION):
            setattr(module, _FUNCTION, lambda *_: None)


def quickly() -> None:
    """Imports Gradio, unless that was done before."""
    sys.meta_path.insert(0, _Finder)
    try:
        import gradio  # noqa: F401
    finally:
        sys.meta_path.remove(_Finder)
