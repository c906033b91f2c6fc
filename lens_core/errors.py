"""Every error and warning that lens raises on purpose.

LensError
  PluginError                 an architecture plugin cannot serve
    UnknownModelTypeError     nobody provides this HF model type
    AmbiguousArchitectureError  two distributions claim one model type
    PluginLoadError           the plugin's code failed to import or misbehaved
    IncompatiblePluginError   written for another version of the plugin API or of transformers
  LoadError                   a model cannot be loaded
    ModelNotFoundError        no such id or folder
    WeightsError              weights are missing or corrupt
    UnsupportedConfigError    the config asks for something the architecture does not hold
  HookError                   hooks, hook points and filters
    UnknownHookError          no hook point of that name (also a KeyError)
    EmptyFilterError          a filter matches nothing
    HookFunctionError         a hook function raised
    HookValueError            a hook function returned what cannot stand in its place
    HookDidNotFireError       a name that was asked for was not reached
    UnsupportedHookError      the hook point cannot be served in this situation
  InputError                  input that the model cannot take
    EmptyInputError
    TokenIdError              a token id outside the vocabulary
    ContextLengthError        longer than the model's context
    PaddingError              a batch of unequal lengths without a pad token
    TokenizerError            text without a tokenizer, or a token that is not one
  ArgumentError               an argument of the wrong kind or value (also a TypeError)
  CacheError                  activation caches
    NotCachedError            a hook point that exists is not in this cache (also a KeyError)
    CacheFileError            not a cache file of ours, truncated, or unsafe
  StateError                  a state of a model's sequence that cannot be continued, copied or saved
    StateFileError            not a state file of ours, truncated, unsafe, or of another model
  AnalysisFileError           not a file of a result of ours, truncated, unsafe, or of another model
  WeightError                 a weight view that this model cannot give, or a pass that does not hold for it
  SaeError                    a sparse autoencoder that cannot be read, or does not fit the model
  StoreError                  an activation store that cannot be written, read, or gone on with
  MissingPackageError         what was asked for needs a package that is not installed (also an ImportError)
LensWarning
  CostWarning                 what was asked for costs much memory
  CompileWarning              a compiled model runs eagerly where lens looks into it
  PluginWarning               a plugin was left out
  ConfigWarning               config keys that nobody knows were ignored
  PassWarning                 a weight pass had nothing to do
  SaeWarning                  a sparse autoencoder is used otherwise than it was trained
"""

__all__ = [
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
    "HookDidNotFireError",
    "HookError",
    "HookFunctionError",
    "HookValueError",
    "IncompatiblePluginError",
    "InputError",
    "LensError",
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
]


class LensError(Exception):
    """Root of everything that lens raises on purpose."""


class PluginError(LensError):
    """An architecture plugin cannot serve."""


class UnknownModelTypeError(PluginError):
    """No installed plugin provides this HF model type."""


class AmbiguousArchitectureError(PluginError):
    """Two distributions claim the same HF model type."""


class PluginLoadError(PluginError):
    """A plugin's code failed to import, or did not return what the protocol asks for."""


class IncompatiblePluginError(PluginError):
    """A plugin was written for another version of the plugin API or of transformers."""


class LoadError(LensError):
    """A model cannot be loaded; raised itself where reading it needs a package that is not installed."""


class ModelNotFoundError(LoadError):
    """No model of that id, and no such folder."""


class WeightsError(LoadError):
    """A checkpoint's weights are missing or corrupt."""


class UnsupportedConfigError(LoadError):
    """A config asks for something that the architecture does not hold."""


class HookError(LensError):
    """Something about hooks, hook points or filters."""


class UnknownHookError(HookError, KeyError):
    """No hook point has that name; the message offers near matches."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class EmptyFilterError(HookError):
    """A filter matches no hook point."""


class HookFunctionError(HookError):
    """A hook function raised; its exception is the `__cause__`."""


class HookValueError(HookError):
    """A hook function returned what cannot stand in its place: type, shape or device."""


class HookDidNotFireError(HookError):
    """A hook point that was asked for was not reached, or was reached more than once."""


class UnsupportedHookError(HookError):
    """A hook point cannot be served in this situation."""


class InputError(LensError):
    """The model cannot take this input."""


class EmptyInputError(InputError):
    """No tokens, or no rows."""


class TokenIdError(InputError):
    """A token id lies outside the vocabulary."""


class ContextLengthError(InputError):
    """The input is longer than the model's context."""


class PaddingError(InputError):
    """A batch of unequal lengths cannot be padded."""


class TokenizerError(InputError):
    """Text was given and there is no tokenizer, or a string is not the one token it should be."""


class ArgumentError(LensError, TypeError):
    """An argument has the wrong kind or value."""


class CacheError(LensError):
    """An activation cache cannot do what was asked."""


class NotCachedError(CacheError, KeyError):
    """A hook point that exists is not in this cache."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class CacheFileError(CacheError):
    """A file is not a cache of ours, is damaged, or is unsafe to read."""


class StateError(LensError):
    """A state cannot be continued, copied or saved: another model's, another batch, a gap, or an unknown cache."""


class StateFileError(StateError):
    """A file is not a state of ours, is damaged or unsafe to read, or is of another model."""


class AnalysisFileError(LensError):
    """A file of a result, such as a steering vector, is not one of ours, is damaged, or is of another model."""


class StoreError(LensError):
    """An activation store cannot be written, is damaged or in use, or was begun with something else.

    What was complete in it stays as it is.
    """


class WeightError(LensError):
    """A weight view that this model cannot give, or a weight pass that does not hold for it."""


class SaeError(LensError):
    """A sparse autoencoder cannot be read, or does not fit the model or the hook point."""


class MissingPackageError(LensError, ImportError):
    """What was asked for needs a package that is not installed; the message says which."""


class LensWarning(UserWarning):
    """Root of lens' warnings."""


class CostWarning(LensWarning):
    """What was asked for costs much memory."""


class CompileWarning(LensWarning):
    """A compiled model runs eagerly where lens looks into it; calls without hooks stay compiled."""


class PluginWarning(LensWarning):
    """A plugin was left out, with the reason."""


class ConfigWarning(LensWarning):
    """Config keys unknown to HF were ignored."""


class PassWarning(LensWarning):
    """A weight pass was applied before, and had nothing to do."""


class SaeWarning(LensWarning):
    """A sparse autoencoder is used otherwise than it was trained."""
