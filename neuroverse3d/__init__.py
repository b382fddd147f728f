"""Neuroverse3D as an installed package: this folder is the bundle's root in a wheel, and lies in it in a checkout.

::

    from neuroverse3d import ICLInferer

The bundle calls its own code ``scripts``, as MONAI Bundles do, and other projects have a ``scripts`` of their own. Here
it is the sub-package ``neuroverse3d.scripts``, whose modules find each other under that name, so that neither gets in
the other's way. (The console command runs in a process of its own, where ``scripts`` is the bundle's.)
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).resolve().parent
ROOT = _HERE if (_HERE / "scripts").is_dir() else _HERE.parent
"""The bundle's root: configs, scripts and models are in it."""
_OWN = f"{__name__}.scripts"
_PUBLIC = {"ICLInferer": "inferer", "load_network": "checkpoint"}

__all__ = ["ROOT", "ICLInferer", "load_network"]
if ROOT != _HERE:
    __path__.append(str(ROOT))


def _import(
    name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
) -> ModuleType:
    """``import`` as the bundle's modules have it: their ``scripts`` is this package's."""
    is_own = name == "scripts" or name.startswith("scripts.")
    module = builtins.__import__(f"{__name__}.{name}" if is_own else name, globals, locals, fromlist, level)
    return sys.modules[_OWN] if is_own and not fromlist else module


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _import}
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _OWN and not name.startswith(f"{_OWN}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder())


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{_OWN}.{_PUBLIC[name]}"), name)
