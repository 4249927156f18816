"""Moved to zoo.interface; to be deleted."""
import sys
import types

from zoo.interface import *  # noqa
from zoo.interface import method as _m, refuse, _registered, _places  # noqa


class _Callable(types.ModuleType):
    def __call__(self, *a, **k):
        return _m(*a, **k)


sys.modules[__name__].__class__ = _Callable
