"""A proposal as a package: the text that is printed, tried and written is one and the same."""

import textwrap
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs

from lens_conformance.doctor.norms import KINDS
from lens_conformance.doctor.proposal import Proposal
from lens_core import plugin

__all__ = ["Skeleton"]

_IGNORED = ("initializer_range",)


@attrs.frozen(kw_only=True, eq=False)
class Skeleton:
    """A plugin for one model type.

    Attributes:
        handled: Config fields that the description is right for, whatever their values.
        config: Fields of the tiny config, for the kit.
        axes: Fields that the kit varies.
        dropout: Fields that switch dropouts on.
    """

    model_type: str
    proposal: Proposal
    handled: tuple[str, ...]
    config: Mapping[str, Any]
    axes: Mapping[str, tuple[Any, ...]]
    dropout: Mapping[str, float]

    @property
    def package(self) -> str:
        """The Python package's name."""
        return f"lens_{self.model_type.replace('-', '_')}"

    @property
    def distribution(self) -> str:
        """The distribution's name."""
        return self.package.replace("_", "-")

    @property
    def title(self) -> str:
        """What to call the architecture."""
        return self.model_type.replace("_", " ").title()

    # ------------------------------------------------------------------ the two modules

    def declaration(self) -> str:
        """Give the module that declares the type."""
        norm, call = self.proposal.norm, _wrapped(_call(self.proposal.fields), "    decoder = ", "    ")
        is_core = norm in plugin.__all__
        used = [name for name in ("Attn", "Mlp", "Moe", "QkNorm") if f"{name}(" in call]
        names = sorted(["Declaration", "Decoder", "declare", *used, *([norm] if is_core and norm in call else [])],
                       key=_isort)  # fmt: skip
        own = "" if is_core else f"\nfrom {self.package}._norms import {norm}\n"
        name = "".join(part.title() for part in self.model_type.replace("-", "_").split("_"))
        return (
            f'"""{self.title} as one description of a decoder; what is not said is Llama\'s.\n\n'
            f'Source: transformers `models/{self.model_type}/modeling_{self.model_type}.py`.\n"""\n\n'
            f"from typing import Any\n\n{_imports(names)}{own}\n\n"
            f"def {name}(config: Any) -> Declaration:\n"
            f'    """Declare {self.title} at one HF config."""\n'
            f"    decoder = {call}\n    return declare(decoder, config)\n"
        )

    @property
    def implementation(self) -> str:
        """Where the declaration is."""
        return f"{self.package}._architecture:{''.join(part.title() for part in self.package.split('_')[1:])}"

    def descriptor(self) -> str:
        """Give the package's top module."""
        has_positions = "pos_embed" in self.proposal.fields
        capabilities = ['    Capability.SSM_STATE: (Support.ABSENT, "no state-space layer"),']
        if not has_positions:
            told = '(Support.ABSENT, "no embedding of positions is added to the stream")'
            capabilities.append(f"    Capability.POSITION_EMBEDDING: {told},")
        if self.proposal.has_experts:
            told = '(Support.PARTIAL, "W_in, W_gate and W_out are given for dense MLPs only")'
            capabilities.append(f"    Capability.WEIGHT_VIEWS: {told},")
        told = '(Support.PARTIAL, "in training, hooks inside a checkpointed block refuse")'
        capabilities.append(f"    Capability.GRADIENT_CHECKPOINTING: {told},")
        told = '(Support.PARTIAL, "a compiled model runs eagerly while it is hooked")'
        capabilities.append(f"    Capability.TORCH_COMPILE: {told},")
        rows = [row.rstrip(",") for row in textwrap.wrap(", ".join(f'"{name}"' for name in self.handled), 100)]
        handled = "\n".join(f"    *({row}{'' if ',' in row else ','})," for row in rows)
        listed = "\n".join(capabilities)
        return _DESCRIPTOR.format(
            title=self.title,
            model_type=self.model_type,
            capabilities=listed,
            handled=handled,
            implementation=self.implementation,
            ignored=", ".join(f'"{name}"' for name in _IGNORED),
        )

    def family(self) -> str:
        """Give what the kit needs to try the type."""
        has_experts = self.proposal.has_experts
        plain = "from lens_conformance import Family"
        imports = f"from typing import Any\n\n{plain}, edits" if has_experts else plain
        edit = _EDIT if has_experts else ""
        given = {"model_type": self.model_type, "config": dict(self.config), "axes": dict(self.axes)}
        given |= {"dropout": dict(self.dropout), "implementations": self.proposal.implementations}
        body = ",\n".join(f"    {name}={_literal(value)}" for name, value in given.items())
        body += ",\n" + ("    edit_at=edit_at,\n" if has_experts else "")
        return (
            f'"""What the conformance kit needs to try {self.title}: a tiny config, and what is varied."""\n\n'
            f"{imports}\n{edit}\nFAMILY = Family(\n{body})\n"
        )

    # ------------------------------------------------------------------ files

    def files(self) -> dict[str, str]:
        """Give all files by their paths in the folder."""
        found = {
            "pyproject.toml": _PYPROJECT.format(
                distribution=self.distribution, package=self.package, title=self.title, model_type=self.model_type
            ),
            "README.md": _README.format(
                distribution=self.distribution, title=self.title, model_type=self.model_type, remarks=self._remarks()
            ),
            f"{self.package}/__init__.py": self.descriptor(),
            f"{self.package}/_architecture.py": self.declaration(),
            f"{self.package}/family.py": self.family(),
            f"{self.package}/py.typed": "",
            "tests/test_conformance.py": _TEST.format(title=self.title, model_type=self.model_type),
        }
        if self.proposal.norm not in plugin.__all__:
            assert self.proposal.norm in KINDS
            source = files("lens_conformance.doctor").joinpath("kinds.py").read_text(encoding="utf-8")
            code = source.split('"""', 2)[2].replace("from torch import Tensor\n\n", "", 1)
            code = code.replace(
                "\n\n__all__", "\nfrom torch import Tensor\n\n__all__", 1
            )  # the core is third party there
            found[f"{self.package}/_norms.py"] = f'"""Kinds of norms that the core has not."""{code}'
        return found

    def _remarks(self) -> str:
        return "".join(f"- {remark}\n" for remark in self.proposal.remarks)

    def write(self, folder: Path) -> None:
        """Write all files; what is there with the same names is overwritten."""
        for name, text in self.files().items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _isort(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def _imports(names: list[str]) -> str:
    line = f"from lens_core.plugin import {', '.join(names)}\n"
    return line if len(line) <= 120 else f"from lens_core.plugin import (\n    {', '.join(names)},\n)\n"


def _call(fields: Mapping[str, str]) -> str:
    return f"Decoder({', '.join(f'{name}={value}' for name, value in fields.items())})"


def _wrapped(call: str, before: str, indent: str) -> str:
    """Break a call that a line does not hold: an argument a line, and those again."""
    if len(before) + len(call) <= 115 or not call.endswith(")") or "(" not in call:
        return call
    name, _, rest = call.partition("(")
    inner, lines = indent + "    ", list[str]()
    for argument in _arguments(rest[:-1]):
        field, equals, value = argument.partition("=")
        is_named = field.isidentifier() and bool(equals)
        told = f"{field}={_wrapped(value, f'{inner}{field}=', inner)}" if is_named else argument
        lines.append(f"{inner}{told},\n")
    return f"{name}(\n{''.join(lines)}{indent})" if name.isidentifier() and len(lines) > 0 else call


def _arguments(text: str) -> list[str]:
    """Cut arguments at the commas that no bracket holds."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [one.strip() for one in found if one.strip()]


def _literal(value: Any, indent: str = "    ") -> str:
    """Write a value; a mapping that a line does not hold has a line for each key."""
    text = repr(value).replace("'", '"')
    if not isinstance(value, dict) or len(text) < 90:
        return text
    inner = f"{indent}    "
    rows = "".join(f'{inner}"{name}": {_literal(one, inner)},\n' for name, one in value.items())
    return f"{{\n{rows}{indent}}}"


_EDIT = '''

def edit_at(name: str, *, causal: bool = False) -> Any:
    """Choose the edit for a name; of chosen experts, the next one."""
    return (lambda x, hook=None: (x + 1) % 5) if name.endswith("expert_indices") else edits.edit_at(name, causal=causal)

'''
_DESCRIPTOR = '''"""{title} for lens: the descriptor, which imports neither torch nor transformers."""

from lens_core.plugin import Architecture, Capability, Support, hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "lens_architectures"]

_CAPABILITIES = dict.fromkeys(Capability, Support.FULL) | {{
{capabilities}
}}
# Fields of HF's config class for which the declaration is right whatever their values. A model that has another field
# at another value than the default refuses to load.
_HANDLED = (
{handled}
)


@hookimpl
def lens_architectures() -> list[Architecture]:
    """Describe {title}."""
    return [
        Architecture(
            name="{title}",
            model_types=("{model_type}",),
            api_version=1,
            transformers=">=5.20,<6",
            implementation="{implementation}",
            capabilities=_CAPABILITIES,
            config_handled=_HANDLED,
            config_ignored=({ignored},),
        )
    ]
'''
_TEST = '''"""{title}, held to the laws of lens."""

from lens_conformance import conformance

test_conformance = conformance("{model_type}")
'''
_README = """# {distribution}

{title} for lens: where each internal activation and each weight of HuggingFace's own `{model_type}` models is.

    pip install --editable .
    pytest --lens-level fast

Proposed by `lens doctor {model_type}` from tiny random models; `_architecture.py` is the whole of it. The kit's checks
that need a golden forward are "not judged" until `family.py` has one.

{remarks}"""
_PYPROJECT = """[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
dynamic = ["version"]
description = "{title} for lens: every internal activation of HuggingFace's own models by a standard name."
readme = "README.md"
requires-python = ">=3.11"
dependencies = [
    "lens-core>=0.1,<0.2",
    "torch>=2.6",
    "transformers>=5.20,<6",
]

[project.optional-dependencies]
test = ["lens-conformance>=0.1,<0.2", "pytest>=8"]

# The name of this entry point is one of the model types that the descriptor serves.
[project.entry-points."lens_core.architectures"]
{model_type} = "{package}"

[project.entry-points."lens_conformance.families"]
{model_type} = "{package}.family:FAMILY"

[tool.hatch.version]
path = "{package}/__init__.py"

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.pytest.ini_options]
addopts = ["-ra", "--import-mode=importlib"]
testpaths = ["tests"]
"""
