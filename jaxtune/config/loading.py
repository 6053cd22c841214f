"""From a YAML file and ``dotted.key=value`` overrides to a validated :class:`~jaxtune.config.schema.Config`."""

from __future__ import annotations

import copy
import difflib
import re
import shlex
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from jaxtune.config.aliases import our_keys, sections_of
from jaxtune.config.paths import with_folders
from jaxtune.config.rule import RuleConfig
from jaxtune.config.schema import Config
from jaxtune.config.section import Section
from jaxtune.config.update_rules import Rule, method_names, reference_update, section_of
from jaxtune.errors import UserError, nearest
from jaxtune.layout import CONFIG_FILE, RunFiles

SectionType = TypeVar("SectionType", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of YAML 1.2, in which a key given twice and an alias inside itself are errors.

    ``1e-4`` is a number, ``010`` is ten, ``1:30`` and ``2024-01-01`` are text.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            # What an anchor names has no end yet while it is being read.
            if getattr(self.anchors.get(alias.anchor), "end_mark", alias) is None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the alias *{alias.anchor} stands inside what it names", alias.start_mark
                )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^([-+]?(0|[1-9][\d_]*)|0x[\da-fA-F]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """A YAML value as written in an override: ``1e-4`` → float, ``[1, 2]`` → list, ``abc`` → str.

    What is no YAML is text, and so is ``{name}`` without a value: templates need no second quotes in a shell.
    """
    try:
        value, _ = _read_yaml(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, dict) and value and all(item is None for item in value.values()):
        return text
    return value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides and validates a configuration.

    An override of a section changes the keys that it names and leaves the others: ``train={steps: 3}``. Of what is one
    value it takes the place: a list, a mapping with keys of one's own (``search.space``), a rule with its ``method``.

    The ``config.yaml`` of a run directory means that directory: its ``run_dir`` says where it was when the run began,
    and the directory may have been moved or copied since. An override of ``run_dir`` means what it says. Relative paths
    are meant from the folder of the file (``paths_from``); in overrides, from the working directory.

    Args:
      path: a YAML file.
      overrides: ``"dotted.key=value"`` each; the value is YAML.

    Raises:
      UserError: the file is missing or malformed, or a key or value is wrong; the message names the line.
    """
    file = Path(path)
    text = _read(file)
    try:
        raw, node = _read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"{place}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected keys such as model:, data: and train:, found {_kind(raw)}")
    lines: dict[str, int] = {}
    _collect_lines(node, "", lines)
    begun = file.name == CONFIG_FILE and RunFiles(file.parent).has_begun
    if begun:
        # Told from a home: in front of a path of the file system, ~ is the name of a folder.
        raw["run_dir"] = str(file.parent) if not str(file.parent).startswith("~") else f"./{file.parent}"
    changed: dict[str, str] = {}
    given: list[str] = []
    parsed: dict[int, tuple[str, Any]] = {}
    for place, override in enumerate(overrides):
        key, separator, value = override.partition("=")
        follows = overrides[place + 1] if place + 1 < len(overrides) else "="
        if not separator or not all(key.split(".")) or key != key.strip() or (not value and "=" not in follows):
            raise UserError(f"override {override!r}: {_expected(overrides, place)}")
        parsed[place] = key, parse_value(value)
        changed[key] = override
        given += _leaves(*parsed[place])
    for key, value in _kinds_first(parsed.values()):
        _set(raw, key, value)

    def where(key: str) -> str:
        for name, override in changed.items():
            if name == key or key.startswith(f"{name}.") or name.startswith(f"{key}."):
                return f"override {override}: "
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            if (line := lines.get(".".join(parts[:end]))) is not None:
                return f"{file}:{line}: "
        return f"{file}: "

    return with_folders(_validate(Config, raw, where), file, given, begun=begun)


def _expected(overrides: Sequence[str], place: int) -> str:
    """What was to be written where an override is none, or where a shell parted its key and its value."""
    parted = re.fullmatch(r"-*([\w.]+)(?:\s*=|:)\s*(\S.*)", overrides[place]) or re.match(
        r"-*([\w.]+)(?:\s*=\s*|:\s+|\s+)([^\s=]+)(?:\s|$)", " ".join(overrides[place : place + 3])
    )
    if parted is None or not all(parted[1].split(".")):
        return "expected dotted.key=value"
    return f"expected dotted.key=value, without spaces; did you mean {parted[1]}={shlex.quote(parted[2])}?"


def with_overrides(config: Config, overrides: Mapping[str, Any], *, origin: str = "") -> Config:
    """A copy with some dotted keys changed, validated again.

    Args:
      config: the configuration to start from.
      overrides: dotted key → value.
      origin: what to name in an error message, before the key.

    Raises:
      UserError: a key does not exist, or its value does not fit.
    """
    raw = config.model_dump(mode="python", exclude_unset=False)
    for key, value in _kinds_first(overrides.items()):
        _set(raw, key, value)
    return _validate(Config, raw, lambda _: origin)


def _kinds_first(overrides: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The overrides with those in front that choose what section a key is of: the others are meant for that.

    The method of a rule goes before other keys of the rule, and after what gives the whole of it.
    """
    given = list(overrides)

    def place(at: int) -> tuple[int, bool]:
        parent, _, name = given[at][0].rpartition(".")
        if name == "kind":
            return -1, False
        if name == "method":
            return min(other for other, (key, _) in enumerate(given) if key.startswith(f"{parent}.")), False
        return at, True

    return [given[at] for at in sorted(range(len(given)), key=place)]


def dump_config(config: BaseModel) -> str:
    """The configuration as YAML; reading it again gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read_yaml(text: str) -> tuple[Any, Any]:
    """The value that a YAML text holds, and its node, which knows the lines.

    Raises:
      yaml.YAMLError: it is no YAML, whatever it is that Python stumbles over.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except ValueError as error:  # such as an integer of ten thousand digits
        raise yaml.YAMLError(str(error)) from error


def _kind(value: Any) -> str:
    """What a value is, in the words of YAML."""
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _read(file: Path) -> str:
    if not file.exists():
        folder = file.parent
        siblings = [str(folder / item.name) for item in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise UserError(f"{file}: no such file{nearest(str(file), siblings, listed=False)}")
    if file.is_dir():
        inside = RunFiles(file).config_path
        hint = f"; did you mean '{inside}'?" if inside.is_file() else ""
        raise UserError(f"{file}: a directory, not a YAML file{hint}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    return text


def _first_line(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _collect_lines(node: Any, prefix: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            _collect_lines(value, f"{prefix}{key.value}.", lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
            _collect_lines(item, f"{prefix}{index}.", lines)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Writes ``value`` at a dotted key, through lists by index; what is missing on the way is made.

    Of a section that is there only the keys change that a mapping names. One with a ``method`` is a whole rule.

    Pydantic reports keys that do not exist, afterwards and with a better message than could be given here.
    """
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = ".".join(parts[: depth + 1])
        # Keys of the search space hold dots themselves: everything behind search.space is one key, and the like.
        if depth == 2 and parts[0] == "search" and parts[1] in ("space", "fixed", "reference"):
            part, last = ".".join(parts[2:]), True
        if isinstance(node, list):
            place = _place(part, len(node))
            if place is None:
                raise UserError(f"{here}: {'.'.join(parts[:depth])} has {len(node)} entries, numbered from 0")
            if last and not _changed_within(tree, parts, node[place], value):
                node[place] = value
            if last:
                return
            node = node[place]
            continue
        if last:
            if part in TAGS:
                _leave_kind(node, sections_at(parts[:-1]), part, value)
            if not _changed_within(tree, parts, node.get(part), value):
                node[part] = copy.deepcopy(value)
            return
        child = node.get(part)
        if child is None:
            child = [rule.model_dump() for rule in reference_update()] if here == "update" else {}
        elif isinstance(child, str) and parts[0] == "data":
            child = {"path": child}
        elif child == "own" and here == "search.reference":
            child = {}
        elif isinstance(child, str) and here == "search.space":
            node["preset"], child = child, {}
        elif not isinstance(child, dict | list):
            raise UserError(f"{key}: {here} is the value {child!r} and has no keys below it")
        node[part] = child
        node = child


def _leaves(key: str, value: Any) -> Iterator[str]:
    """The dotted keys that an override gives, those within a mapping among them."""
    if not isinstance(value, Mapping):
        yield key
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _changed_within(tree: dict[str, Any], parts: Sequence[str], present: Any, value: Any) -> bool:
    """Changes the keys of a section that a mapping names; False where the mapping is to stand for all that is there."""
    if not isinstance(value, Mapping) or not isinstance(present, dict | str):
        return False
    sections = sections_at(parts)
    # Of several that a tag tells apart, one with its tag is meant as a whole.
    if not sections or (
        len(sections) > 1
        and any(_tag(section) is not None for section in sections)
        and not value.keys().isdisjoint(TAGS)
    ):
        return False
    for name, inner in value.items():
        _set(tree, ".".join((*parts, str(name))), inner)
    return True


def _leave_kind(node: dict[str, Any], sections: Sequence[type[BaseModel]], tag: str, kind: Any) -> None:
    """Takes out of a section what its kind so far has by default, where it is to be of another: that has its own.

    Of a rule, what its new method has not goes too.
    """
    if len(sections) < 2:
        return
    now = node.get(tag, _tag(sections[0]) if tag == "kind" else None)
    before = section_of_kind(sections, now)
    if before is None or kind == now:
        return
    after = section_of_kind(sections, kind) if tag == "method" else None
    for name, field in before.model_fields.items():
        lacking = after is not None and name not in after.model_fields
        if name in node and (lacking or node[name] == field.default):
            del node[name]


def sections_at(parts: Sequence[str]) -> list[type[BaseModel]]:
    """The sections that can stand at a dotted key; none where it is a value, or a key of one's own."""
    current: Any = Config
    for part in parts:
        if part.isdecimal():
            current = _element(current)
            continue
        holder = next((item for item in sections_of(current) if part in item.model_fields), None)
        if holder is None:
            return []
        current = holder.model_fields[part].annotation
    return sections_of(current)


def section_of_kind(sections: Sequence[type[BaseModel]], kind: Any) -> type[BaseModel] | None:
    """The one of several sections in one place that has a tag; a method's may be another package's.

    Raises:
      UserError: such a method was named and cannot be imported.
    """
    found = next((section for section in sections if _tag(section) == kind), None)
    if found is None and isinstance(kind, str) and any(issubclass(section, RuleConfig) for section in sections):
        return section_of(kind)
    return found


def _place(part: str, length: int) -> int | None:
    """The place that a part of a dotted key names in a list; None if it names none of the list's."""
    # Other digits than these ten count as digits too for Python, ² among them.
    number = int(part) if re.fullmatch(r"[0-9]{1,9}", part) else length
    return number if number < length else None


def _validate(model: type[SectionType], raw: Any, where: Any) -> SectionType:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        messages = []
        for item in error.errors():
            keys, section = _resolve(model, item["loc"], raw)
            messages.append(f"{where('.'.join(keys))}{_explain(item, keys, section)}")
        raise UserError("\n".join(dict.fromkeys(messages))) from None


def _resolve(
    model: type[BaseModel], location: Iterable[int | str], raw: Any
) -> tuple[list[str], type[BaseModel] | None]:
    """The dotted key behind a pydantic location (which also holds union tags), and the section that the key is in."""
    keys: list[str] = []
    current: Any = model
    section: type[BaseModel] | None = model
    for part in location:
        sections = sections_of(current)
        kind = raw.get("kind") if isinstance(raw, dict) else None
        sections = [item for item in sections if len(sections) > 1 and _tag(item) == kind] or sections
        tagged = [item for item in sections if _tag(item) == part]
        if not tagged and any(issubclass(item, RuleConfig) for item in sections) and isinstance(part, str):
            tagged = [found for found in [section_of(part)] if found is not None]
        if tagged:
            current = tagged[0]
            continue
        if isinstance(part, str) and any(part in {item.__name__, "tuple", "list", "dict"} for item in sections):
            continue
        keys.append(str(part))
        raw = raw.get(part) if isinstance(raw, dict) else None
        holder = next((item for item in sections if part in item.model_fields), None)
        if holder is not None:
            section, current = holder, holder.model_fields[str(part)].annotation
        elif sections:
            section = sections[0]
            current = None
        else:
            current = _element(current)
    return keys, section


def _all_sections(base: type[BaseModel] = Section) -> list[type[BaseModel]]:
    return [base, *(found for child in base.__subclasses__() for found in _all_sections(child))]


def _element(annotation: Any) -> Any:
    """The type of a list's items or a mapping's values, looking through ``| None``."""
    if typing.get_origin(annotation) in (list, dict, tuple):
        return typing.get_args(annotation)[-1]
    return next((inner for item in typing.get_args(annotation) if (inner := _element(item)) is not None), None)


def _elsewhere(keys: Sequence[str]) -> list[str]:
    """Our keys that an unknown one stands for: another tool's name, or ours in the wrong section; of the same rule."""
    found = our_keys(keys[-1])[:3]
    if keys[0] == "update" and len(keys) > 1:
        found = [key.replace("update.0.", f"update.{keys[1]}.") for key in found]
    return [] if ".".join(keys) in found else found


TAGS = ("method", "kind")
"""Keys that tell the sections apart that can stand in one place."""


def _tag(section: type[BaseModel]) -> str | None:
    return next((section.model_fields[name].default for name in TAGS if name in section.model_fields), None)


def _explain(item: Any, keys: list[str], section: type[BaseModel] | None) -> str:
    key = ".".join(keys)
    kind = item["type"]
    if kind == "extra_forbidden":
        valid = list(section.model_fields) if section is not None else []
        # A slip of the pen here is likelier than a key's proper name in the wrong place.
        if not difflib.get_close_matches(keys[-1], valid, 1, cutoff=0.85) and (ours := _elsewhere(keys)):
            return f"{key}: unknown key; did you mean {' or '.join(map(repr, ours))}?"
        return f"{key}: unknown key{nearest(keys[-1], valid)}"
    if kind == "missing":
        return f"{key}: this {'entry' if keys[-1].isdigit() else 'key'} is required"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = item["input"].get("method") if isinstance(item["input"], dict) else None
        wrong = "method is required" if given is None else f"unknown method {given!r}"
        return f"{key}: {wrong}{nearest(given, method_names())}"
    if kind == "literal_error":
        # pydantic words the choices "'a', 'b' or 'c'".
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return f"{key}: {item['input']!r} is not a choice{nearest(item['input'], choices)}"
    if kind in ("model_type", "model_attributes_type"):
        wanted = next(
            (part for part in _all_sections() if part.__name__ == item.get("ctx", {}).get("class_name")), None
        )
        fields = list((wanted or sections_of(Rule)[0]).model_fields)
        return f"{key}: expected keys such as {', '.join(fields[:4])}; found {_kind(item['input'])}"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if kind in ("value_error", "model_type") else f" (found {item['input']!r})"
    return f"{key}: {message}{shown}" if key else message
