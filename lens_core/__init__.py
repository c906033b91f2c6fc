"""Load a language model, read any internal activation by a standard name, edit it, and trust the numbers.

Importing this package imports neither torch nor transformers: a name that needs them is loaded when it is touched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lens_core.errors import (
    AmbiguousArchitectureError,
    AnalysisFileError,
    ArgumentError,
    CacheError,
    CacheFileError,
    CompileWarning,
    ConfigWarning,
    ContextLengthError,
    CostWarning,
    EmptyFilterError,
    EmptyInputError,
    HookDidNotFireError,
    HookError,
    HookFunctionError,
    HookValueError,
    IncompatiblePluginError,
    InputError,
    LensError,
    LensWarning,
    LoadError,
    MissingPackageError,
    ModelNotFoundError,
    NotCachedError,
    PaddingError,
    PassWarning,
    PluginError,
    PluginLoadError,
    PluginWarning,
    SaeError,
    SaeWarning,
    StateError,
    StateFileError,
    StoreError,
    TokenIdError,
    TokenizerError,
    UnknownHookError,
    UnknownModelTypeError,
    UnsupportedConfigError,
    UnsupportedHookError,
    WeightError,
    WeightsError,
)

if TYPE_CHECKING:
    from lens_core import edits, passes, saes, store, view
    from lens_core._state import State
    from lens_core._watch import Hook
    from lens_core.analysis import patching
    from lens_core.analysis.comparing import compare
    from lens_core.cache import ActivationCache
    from lens_core.factored import FactoredMatrix
    from lens_core.hook_points import HookPoint, get_act_name
    from lens_core.model import LensModel, load

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "AmbiguousArchitectureError",
    "AnalysisFileError",
    "ArgumentError",
    "CacheError",
    "CacheFileError",
    "CompileWarning",
    "ConfigWarning",
    "ContextLengthError",
    "CostWarning",
    "EmptyFilterError",
    "EmptyInputError",
    "FactoredMatrix",
    "Hook",
    "HookDidNotFireError",
    "HookError",
    "HookFunctionError",
    "HookPoint",
    "HookValueError",
    "IncompatiblePluginError",
    "InputError",
    "LensError",
    "LensModel",
    "LensWarning",
    "LoadError",
    "MissingPackageError",
    "ModelNotFoundError",
    "NotCachedError",
    "PaddingError",
    "PassWarning",
    "PluginError",
    "PluginLoadError",
    "PluginWarning",
    "SaeError",
    "SaeWarning",
    "State",
    "StateError",
    "StateFileError",
    "StoreError",
    "TokenIdError",
    "TokenizerError",
    "UnknownHookError",
    "UnknownModelTypeError",
    "UnsupportedConfigError",
    "UnsupportedHookError",
    "WeightError",
    "WeightsError",
    "__version__",
    "compare",
    "edits",
    "get_act_name",
    "load",
    "passes",
    "patching",
    "saes",
    "store",
    "view",
]

_LAZY = {  # name -> the module that defines it, or that it is
    "ActivationCache": "lens_core.cache",
    "FactoredMatrix": "lens_core.factored",
    "Hook": "lens_core._watch",
    "HookPoint": "lens_core.hook_points",
    "LensModel": "lens_core.model",
    "State": "lens_core._state",
    "compare": "lens_core.analysis.comparing",
    "edits": "lens_core.edits",
    "get_act_name": "lens_core.hook_points",
    "load": "lens_core.model",
    "passes": "lens_core.passes",
    "patching": "lens_core.analysis.patching",
    "saes": "lens_core.saes",
    "store": "lens_core.store",
    "view": "lens_core.view",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    value = module if module.__name__.rpartition(".")[2] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
