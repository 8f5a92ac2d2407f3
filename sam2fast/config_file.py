"""Reading and writing configuration files: one YAML file plus dotted overrides."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from .config import Config, ConfigError, Section, nearest


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply dotted overrides (`model.size=tiny`, `stages.0.steps=10`), resolve ${...} and validate.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), wrong type or impossible value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise ConfigError(f"no config file at {path}; see configs/ for the ones that ship with sam2fast")
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise ConfigError(f"{path} must hold a mapping of settings at its top, not a list or a single value")
        for override in overrides:
            _apply_override(tree, override)
        if "name" in tree:  # else `name` is what is missing
            tree.setdefault("output_dir", "runs/${name}")
        missing = [key for key, value in flatten(OmegaConf.to_container(tree)).items() if value == "???"]
        if missing:
            raise ConfigError(
                f"{path} leaves {', '.join(missing)} for you to set; add {missing[0]}=VALUE to the command"
            )
        values = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        source = ", ".join([str(path), *(f"override {text!r}" for text in overrides if "${" in text)])
        raise ConfigError(
            f"{source} cannot be read: {reason}; compare it with the configs that ship with sam2fast"
        ) from None
    return parse_config(values, source=str(path), overrides=overrides)


def parse_config(values: dict[str, Any], source: str = "config", overrides: Sequence[str] = ()) -> Config:
    """Validate plain values (see `load_config`); `overrides` are those that the values already hold."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        items = error.errors()
        # A list whose entries failed is also reported as too short; the entries say more.
        items = [item for item in items if item["type"] != "too_short" or not _has_entries(item, items)]
        causes = [_override_of(item, overrides) for item in items]
        if any(cause is None for cause in causes):
            source += " and the command line" if any(causes) else ""
        else:
            source = "the command line"
        lines = [
            _explain(item) + (f", set by {cause!r}" if cause else "") for item, cause in zip(items, causes, strict=True)
        ]
        raise ConfigError(f"{source}: " + "\n  ".join(dict.fromkeys(lines))) from None


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to an equal value."""
    from omegaconf import OmegaConf

    partial = Path(f"{path}.partial")
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), partial)
    partial.replace(path)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping from dotted keys to values."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if entries is None:
        return {prefix.rstrip("."): values}
    return {key: value for name, entry in entries for key, value in flatten(entry, f"{prefix}{name}.").items()}


def _apply_override(tree: Any, override: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, separator, text = override.partition("=")
    if not separator or not key or key.startswith("-"):
        raise ConfigError(f"cannot read override {override!r}; write key=value, for example model.size=tiny")
    # kept unresolved: an override may refer to other settings, ${data.root}
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (OmegaConfBaseException, YAMLError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"override {override!r}: its value cannot be read ({reason}); write it as YAML, and text that has "
            f"{{ }} [ ] : or # in it within quotes: {key}='\"TEXT\"'"
        ) from None
    node, parts = tree, key.split(".")
    for i, part in enumerate(parts[:-1]):
        if OmegaConf.is_list(node):
            part = _list_index(node, part, key)
        elif part not in node or node[part] is None:
            node[part] = {}
        node = node[part]
        if not OmegaConf.is_config(node):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[: i + 1])} is a single value, it has no entries")
    last = _list_index(node, parts[-1], key) if OmegaConf.is_list(node) else parts[-1]
    node[last] = value


def _list_index(node: Any, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key!r}: {part!r} is not an index of a list of {len(node)} (0 to {len(node) - 1})")
    return int(part)


def _has_entries(item: dict[str, Any], items: list[dict[str, Any]]) -> bool:
    """Whether others are about entries of what `item` is about."""
    loc = item["loc"]
    return any(len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in items)


def _override_of(item: dict[str, Any], overrides: Sequence[str]) -> str | None:
    """The last override that set what an error is about."""
    where = [str(part) for part in item["loc"]]
    for override in reversed(overrides):
        key = override.partition("=")[0].split(".")
        if where and key == where[: len(key)]:
            return override
    return None


def _explain(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section = _section_at(item["loc"][:-1])
        known = list(section.model_fields) if section else []
        return f"unknown key {where!r}{nearest(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{where} is required and not set"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    shown = "" if isinstance(value, (dict, list, BaseModel)) or not where else f" (got {value!r})"
    return f"{where}: {message}{shown}" if where else message


def _section_at(loc: tuple) -> type[Section] | None:
    """The section class that a validation error's location points into."""
    current: Any = Config
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel):
            if part not in current.model_fields:
                return None
            current = current.model_fields[part].annotation
        else:
            current = typing.get_args(current)[-1 if isinstance(part, str) else 0]
        while typing.get_origin(current) in (typing.Union, types.UnionType, Annotated):
            current = typing.get_args(current)[0]
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None
