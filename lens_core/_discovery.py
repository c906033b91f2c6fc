"""Finding plugins: the loop over entry points, and one record of what became of each.

A plugin that raises, or was written for other versions, costs a warning and its own status; it cannot break another.
Versions are compared twice: what the distribution requires, before its code is imported, and what the descriptor says.
"""

import difflib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from types import ModuleType
from typing import Any

import attrs
import pluggy
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from lens_core import __version__, _hookspecs
from lens_core._descriptor import API_VERSION, Architecture, find_problems
from lens_core.errors import ArgumentError, IncompatiblePluginError, PluginError, PluginLoadError, PluginWarning

GROUP = "lens_core.architectures"
_CORE = "lens-core"
_HEAVY = frozenset({"torch", "transformers"})


class PluginStatus(StrEnum):
    """What became of a plugin when it was discovered."""

    OK = "ok"
    BROKEN = "broken"
    INCOMPATIBLE = "incompatible"
    AMBIGUOUS = "ambiguous"
    DISABLED = "disabled"


@attrs.frozen(kw_only=True)
class PluginRecord:
    """What discovery found out about one plugin.

    Attributes:
        entry_name: Name of the entry point, or of the module or class registered by hand.
        distribution: Name of the distribution that brings the plugin; None when it was registered by hand.
        version: That distribution's version, None when unknown.
        status: Whether the plugin serves. An ambiguous one still serves the model types that nobody else claims.
        reason: Why it does not serve, and what to do; may hold a remark when it does.
        architectures: What it describes; empty when that could not be asked.
    """

    entry_name: str
    distribution: str | None
    version: str | None
    status: PluginStatus
    reason: str = ""
    architectures: tuple[Architecture, ...] = ()

    @property
    def model_types(self) -> tuple[str, ...]:
        """HF model types, in the order in which the plugin names them."""
        return tuple(name for architecture in self.architectures for name in architecture.model_types)

    @property
    def label(self) -> str:
        """What to call the plugin in a message: `lens-gpt2 0.1.0`."""
        if self.distribution is None:
            return f"{self.entry_name} (registered by hand)"
        return f"{self.distribution} {self.version or '(version unknown)'}"


@attrs.frozen(kw_only=True)
class _Source:
    """Where a plugin comes from: an entry point, or a caller's own object."""

    entry_name: str
    distribution: str | None
    version: str | None
    requires: tuple[str, ...] = ()
    load: Callable[[], object] = attrs.field(repr=False)

    def record(
        self, status: PluginStatus, reason: str = "", architectures: tuple[Architecture, ...] = ()
    ) -> PluginRecord:
        return PluginRecord(
            entry_name=self.entry_name,
            distribution=self.distribution,
            version=self.version,
            status=status,
            reason=reason,
            architectures=architectures,
        )


def discover() -> list[PluginRecord]:
    """Examine every installed plugin, in the order of their distributions' names.

    Raises:
        PluginLoadError: A plugin is broken and `LENS_PLUGIN_ERRORS=raise`.
        IncompatiblePluginError: A plugin does not fit and `LENS_PLUGIN_ERRORS=raise`.
        ArgumentError: `LENS_PLUGIN_ERRORS` is neither `warn` nor `raise`.
    """
    _errors_raise()  # a value that is neither is said at once, not when something breaks
    sources = list(_installed_sources())
    disabled = _disabled_names(sources)
    return [
        source.record(PluginStatus.DISABLED, "LENS_DISABLE_PLUGINS names it; take it out to use the plugin")
        if "all" in disabled or disabled & _names_of(source)
        else examine(source)
        for source in sources
    ]


def source_of_object(plugin: object) -> _Source:
    """Wrap a module, class or instance that implements the hooks and was given by the caller."""
    name = plugin.__name__ if isinstance(plugin, ModuleType | type) else type(plugin).__name__
    return _Source(entry_name=name, distribution=None, version=None, load=lambda: plugin)


def examine(source: _Source) -> PluginRecord:
    """Find out whether a plugin serves; warn, or raise under `LENS_PLUGIN_ERRORS=raise`, when it does not."""
    architectures: tuple[Architecture, ...] = ()
    remark = ""
    try:
        _check_requirements(source)
        plugin, remark = _load(source)
        architectures = _ask(plugin)
        _check_versions(architectures, source)
        _check_descriptors(architectures, source)
    except IncompatiblePluginError as error:
        _report(source, str(error), error)
        return source.record(PluginStatus.INCOMPATIBLE, str(error), architectures)
    except (Exception, SystemExit) as error:  # anything may be raised by a stranger's module
        reason = str(error) if isinstance(error, PluginError) else f"it raised {type(error).__name__}: {error}"
        _report(source, reason, error)
        return source.record(PluginStatus.BROKEN, reason)
    return source.record(PluginStatus.OK, remark, architectures)


def _installed_sources() -> Iterator[_Source]:
    seen: set[tuple[str, str]] = set()
    for entry in sorted(_entry_points(), key=lambda entry: (_distribution_name(entry), entry.name)):
        # An editable install and a folder on sys.path may both show the same distribution: the first found serves.
        key = (canonicalize_name(_distribution_name(entry)), entry.name)
        if key in seen:
            continue
        seen.add(key)
        yield _Source(
            entry_name=entry.name,
            distribution=_distribution_name(entry),
            version=_metadata_of(entry, lambda distribution: distribution.version),
            requires=tuple(_metadata_of(entry, lambda distribution: distribution.requires) or ()),
            load=entry.load,
        )


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    try:
        return list(importlib.metadata.entry_points(group=GROUP))
    except Exception:  # one unreadable entry_points.txt, of any distribution whatever, fails the whole call
        return [entry for distribution in importlib.metadata.distributions() for entry in _readable(distribution)]


def _readable(distribution: importlib.metadata.Distribution) -> list[importlib.metadata.EntryPoint]:
    try:
        return list(distribution.entry_points.select(group=GROUP))
    except Exception:
        return []


def _metadata_of(entry: importlib.metadata.EntryPoint, get: Callable[[importlib.metadata.Distribution], Any]) -> Any:
    try:
        return None if entry.dist is None else get(entry.dist)
    except Exception:  # a METADATA file that is damaged or absent
        return None


def _distribution_name(entry: importlib.metadata.EntryPoint) -> str:
    return _metadata_of(entry, lambda distribution: distribution.name) or f"unknown ({entry.value})"


def _names_of(source: _Source) -> set[str]:
    return {canonicalize_name(name) for name in (source.entry_name, source.distribution) if name}


def _disabled_names(sources: Iterable[_Source]) -> set[str]:
    """Read `LENS_DISABLE_PLUGINS`: entry names, distributions, or `all`; a name that fits nothing is reported."""
    wanted = os.environ.get("LENS_DISABLE_PLUGINS", "").split(",")
    names: set[str] = {canonicalize_name(name.strip()) for name in wanted if name.strip()}
    known = {"all"}.union(*map(_names_of, sources))
    for name in sorted(names - known):
        near = difflib.get_close_matches(name, sorted(known))
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
        warnings.warn(
            f"LENS_DISABLE_PLUGINS names {name!r}, which is not installed; {hint}", PluginWarning, stacklevel=2
        )
    return names


def _errors_raise() -> bool:
    mode = os.environ.get("LENS_PLUGIN_ERRORS", "warn")
    if mode not in {"warn", "raise"}:
        raise ArgumentError(f"LENS_PLUGIN_ERRORS is {mode!r}; set it to 'warn' or 'raise'.")
    return mode == "raise"


def _report(source: _Source, reason: str, error: BaseException) -> None:
    label = source.record(PluginStatus.BROKEN).label
    if _errors_raise():
        kind = IncompatiblePluginError if isinstance(error, IncompatiblePluginError) else PluginLoadError
        raise kind(f"The plugin {label} does not serve: {reason}.") from error
    warnings.warn(
        f"The plugin {label} is left out: {reason}. (LENS_PLUGIN_ERRORS=raise shows where;"
        f" LENS_DISABLE_PLUGINS={source.entry_name} silences this.)",
        PluginWarning,
        stacklevel=2,
    )


def _load(source: _Source) -> tuple[object, str]:
    """Import the plugin, and remark on a descriptor that is not light."""
    light = _HEAVY - sys.modules.keys()
    plugin = source.load()
    brought = sorted(light & sys.modules.keys())
    if not brought:
        return plugin, ""
    remark = f"importing its descriptor imports {' and '.join(brought)}; move that behind `implementation`"
    warnings.warn(f"Plugin {source.record(PluginStatus.OK).label}: {remark}.", PluginWarning, stacklevel=2)
    return plugin, remark


def _ask(plugin: object) -> tuple[Architecture, ...]:
    """Return what the plugin describes, from a plugin manager of its own: it can leave nothing behind in another's."""
    manager = pluggy.PluginManager(_hookspecs.PROJECT_NAME)
    manager.add_hookspecs(_hookspecs)
    manager.register(plugin)
    _refuse_unknown_hooks(manager, plugin)
    hook = manager.hook.lens_architectures
    if not hook.get_hookimpls():
        raise PluginLoadError("it implements no hook; decorate lens_architectures with lens_core.plugin.hookimpl")
    answers: list[object] = hook()  # empty when the function returned None
    if not answers or isinstance(answers[0], Architecture) or not isinstance(answers[0], Iterable):
        got = type(answers[0]).__name__ if answers else "None"
        raise PluginLoadError(f"lens_architectures() returned {got}; return a list of Architecture records")
    described: list[Any] = list(answers[0])  # pyright: ignore[reportUnknownArgumentType]
    for item in described:
        if not isinstance(item, Architecture):
            raise PluginLoadError(f"lens_architectures() returned a list with {item!r}; list Architecture records only")
    if not described:
        raise PluginLoadError("lens_architectures() returned nothing; describe at least one architecture")
    return tuple(described)


def _refuse_unknown_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    callers = manager.get_hookcallers(plugin) or []
    known = [caller.name for caller in callers if caller.has_spec()] or ["lens_architectures"]
    for caller in callers:
        if caller.has_spec() or all(implementation.optionalhook for implementation in caller.get_hookimpls()):
            continue
        near = difflib.get_close_matches(caller.name, known)
        hint = f"did you mean {near[0]}?" if near else f"lens-core {__version__} has {', '.join(known)}"
        raise PluginLoadError(f"it implements the unknown hook {caller.name}; {hint}")


def _check_requirements(source: _Source) -> None:
    """Compare what the distribution requires of lens-core and transformers with what is installed."""
    for line in source.requires:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name in {_CORE, "transformers"}:
            _check_range(name, requirement.specifier, source)


def _check_versions(architectures: Iterable[Architecture], source: _Source) -> None:
    plugin = source.record(PluginStatus.OK).label
    for architecture in architectures:
        written_for = architecture.api_version
        if type(written_for) is not int:
            raise PluginLoadError(f"api_version of {architecture.name} is {written_for!r}; write an integer")
        if written_for != API_VERSION:
            upgrade = _CORE if written_for > API_VERSION else (source.distribution or plugin)
            raise IncompatiblePluginError(
                f"{architecture.name} is written for plugin API {written_for} and lens-core {__version__} speaks"
                f" {API_VERSION}; upgrade {upgrade} (pip install --upgrade {upgrade})"
            )
        try:
            tested = SpecifierSet(architecture.transformers)
        except ValueError:
            continue  # among the descriptor's problems
        _check_range("transformers", tested, source)


def _check_range(name: str, wanted: SpecifierSet, source: _Source) -> None:
    installed = __version__ if name == _CORE else _installed_version(name)
    plugin = source.distribution or source.entry_name
    if installed is None:
        raise IncompatiblePluginError(
            f"it needs {name}{wanted}, and {name} is not installed; pip install '{name}{wanted}'"
        )
    if wanted.contains(installed, prereleases=True):
        return
    if _is_below(installed, wanted):
        remedy = f"upgrade {name} (pip install --upgrade '{name}{wanted}')"
    else:
        remedy = f"upgrade {plugin} (pip install --upgrade {plugin}), or install '{name}{wanted}'"
    raise IncompatiblePluginError(f"it is made for {name}{wanted} and {name} {installed} is installed; {remedy}")


def _is_below(installed: str, wanted: SpecifierSet) -> bool:
    """Tell whether a version fails a range at its lower end."""
    version = Version(installed)
    lower = [part.version for part in wanted if part.operator in {">=", ">", "~=", "=="}]
    return any(version <= Version(bound.removesuffix(".*")) for bound in lower)


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_descriptors(architectures: Iterable[Architecture], source: _Source) -> None:
    claimed: list[str] = []
    for architecture in architectures:
        problems = find_problems(architecture)
        if problems:
            raise PluginLoadError(f"the descriptor of {architecture.name!r} is unsound: {'; '.join(problems)}")
        claimed += architecture.model_types
    twice = sorted({name for name in claimed if claimed.count(name) > 1})
    if twice:
        raise PluginLoadError(f"it describes {', '.join(twice)} more than once")
    if source.distribution is not None and source.entry_name not in claimed:
        raise PluginLoadError(
            f"its entry point {source.entry_name!r} is none of the model types it describes ({', '.join(claimed)});"
            " name the entry point by one of them"
        )
