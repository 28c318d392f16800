"""A run file: what to train, as frozen, checked values.

A value comes from, later wins: its default, the run file (TOML), the environment
(HPCTRAIN_<SECTION>_<KEY>), `--set section.key=value`. Unknown keys are errors that name the
nearest known one. `Resolved` keeps each value's origin for `hpctrain config`.

Layer 0: knows nothing of what the values are used for.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import tomli_w

from hpctrain.errors import UsageError, nearest
from hpctrain.sections import RunConfig, Section

__all__ = ["Resolved", "from_text", "resolve"]


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each value, by dotted key, came from."""

    config: RunConfig
    origins: dict[str, str]

    def items(self) -> Iterator[tuple[str, Any, str]]:
        """(dotted key, value, origin) of every value, in the order of the sections."""
        for section, values in msgspec.to_builtins(self.config).items():
            for key, value in values.items():
                dotted = f"{section}.{key}"
                yield dotted, value, self.origins.get(dotted, "default")

    def to_toml(self) -> str:
        """A run file with every value written out."""
        return tomli_w.dumps(msgspec.to_builtins(self.config))


def resolve(
    path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] = os.environ
) -> Resolved:
    """Read the run file at `path`, apply environment and overrides ("section.key=value").

    Raises `UsageError` naming key, value, rule and nearest known key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the run file {path}: {error.strerror}") from None
    return from_text(text, str(path), overrides, environment)


def from_text(
    text: str,
    name: str = "run file",
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """As `resolve`, from the text of a run file called `name` in messages."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from None
    origins = {f"{s}.{k}": name for s, v in values.items() if isinstance(v, dict) for k in v}
    for dotted, value, origin in [*_environment(environment or {}), *_overrides(overrides)]:
        section, _, key = dotted.partition(".")
        if not isinstance(values.setdefault(section, {}), dict):
            raise UsageError(f"{name}: {section} must be a section, [{section}]")
        values[section][key] = value
        origins[dotted] = origin
    _check_names(values, origins, name)
    try:
        return Resolved(msgspec.convert(values, RunConfig), origins)
    except msgspec.ValidationError as error:
        raise UsageError(_explain(error, values, origins, name)) from None


SECTIONS = RunConfig.__struct_fields__
SHORT = {"HPCTRAIN_GPU_MPI": ("parallel", "gpu_mpi")}  # variables with a name of their own


def _environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for variable in sorted(environment):
        if variable in SHORT and environment[variable]:
            section, key = SHORT[variable]
            yield f"{section}.{key}", environment[variable].strip().lower(), f"${variable}"
        parts = variable.lower().split("_", 2)
        if len(parts) == 3 and parts[0] == "hpctrain" and parts[1] in SECTIONS:
            yield f"{parts[1]}.{parts[2]}", _value(environment[variable]), f"${variable}"


def _overrides(overrides: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    for item in overrides:
        dotted, equals, text = item.partition("=")
        if not equals or dotted.count(".") != 1:
            raise UsageError(
                f"--set {item}: write section.key=value, for example --set optimizer.lr=0.01"
            )
        yield dotted.strip(), _value(text.strip()), "--set"


def _value(text: str) -> Any:
    """A TOML value; text that is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _structs(section: str) -> tuple[type[Section], ...]:
    """The struct types a section may be: several for a tagged union."""
    kind = next(f.type for f in msgspec.structs.fields(RunConfig) if f.name == section)
    return get_args(kind) or (kind,)


def _default_name(section: str) -> Any:
    """The name that a section has when a run file does not give it; None if it must."""
    default = next(f.default for f in msgspec.structs.fields(RunConfig) if f.name == section)
    return None if default is msgspec.NODEFAULT else default.__struct_config__.tag


def _check_names(values: dict[str, Any], origins: dict[str, str], name: str) -> None:
    """Refuse unknown sections, keys and tags, with the nearest known name."""
    for section, content in values.items():
        if section not in SECTIONS:
            raise UsageError(
                f"{name}: there is no section [{section}]{nearest(section, SECTIONS)}; "
                f"there are {', '.join(SECTIONS)}"
            )
        if not isinstance(content, dict):
            raise UsageError(f"{name}: {section} must be a section, [{section}]")
        structs = {s.__struct_config__.tag: s for s in _structs(section)}
        if len(structs) > 1:
            tag = content.setdefault("name", _default_name(section))
            if tag not in structs:
                raise UsageError(
                    f"{name}: {section}.name is {tag!r}{nearest(str(tag), map(str, structs))}; "
                    f"it must be one of {', '.join(map(str, structs))}"
                )
            known = (*structs[tag].__struct_fields__, "name")
        else:
            known = next(iter(structs.values())).__struct_fields__
        for key in content:
            if key not in known:
                origin = origins.get(f"{section}.{key}", name)
                raise UsageError(
                    f"{origin}: there is no key {section}.{key}{nearest(key, known)}; "
                    f"[{section}] has {', '.join(known)}"
                )


def _explain(
    error: msgspec.ValidationError, values: dict[str, Any], origins: dict[str, str], name: str
) -> str:
    """Where the value came from, its key, the rule and the value; of choices, all of them."""
    message, _, path = str(error).partition(" - at `$.")
    section, _, rest = path.rstrip("`").partition(".")
    if not rest:
        return f"{name}: {section}: {message}" if section else f"{name}: {message}"
    key = re.split(r"\W", rest)[0]
    origin, given = origins.get(f"{section}.{key}", name), values[section].get(key)
    choices = _choices(section, key)
    if given in choices or not choices:
        return f"{origin}: {section}.{rest}: {message}, not {given!r}"
    return (
        f"{origin}: {section}.{key} is {given!r}{nearest(str(given), choices)}; it must be one of "
        f"{', '.join(choices)}"
    )


def _choices(section: str, key: str) -> tuple[str, ...]:
    """The values that a key may have, where these can be listed."""
    for struct in _structs(section):
        for field in msgspec.structs.fields(struct):
            if field.name == key and get_origin(field.type) is Literal:
                return get_args(field.type)
    return ()
