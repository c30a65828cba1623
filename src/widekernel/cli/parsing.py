"""Parsing of arguments, YAML files and dotted overrides, with errors that suggest the nearest key."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from widekernel.cli.paths import expand_paths
from widekernel.errors import ArgumentError, ConfigError, nearest
from widekernel.settings import flatten

FREE_KEYS = ("model.args", "model_args", "distillation.teacher.args", "slurm.sbatch")
"""Keys whose contents depend on the model or the cluster: everything below them is accepted."""
_OF_THE_COMMAND_LINE = {"config", "print_config"}
"""Options that a file of settings cannot contain."""

_REPLACED = {
    "loop.accumulate": "It was replaced: loop.batch_size is now the number of images per optimizer step (formerly "
    "loop.batch_size × loop.accumulate), and loop.micro_batch the number per forward pass.",
}
"""Settings of earlier versions, and what takes their place."""

T = TypeVar("T")


def new_parser(command: str, description: str, takes: str = "") -> jsonargparse.ArgumentParser:
    """Return a parser that raises instead of exiting, and accepts no abbreviations.

    Args:
        command: name of the command.
        description: what the command does.
        takes: positional arguments for the usage line, such as SOURCE.
    """
    prog = f"widekernel {command}"
    usage = " ".join(part for part in (prog, takes, "[OPTIONS]") if part)
    return jsonargparse.ArgumentParser(
        prog=prog, usage=usage, description=description, exit_on_error=False, allow_abbrev=False, print_config=None
    )


def parse(
    parser: jsonargparse.ArgumentParser, arguments: list[str], layers: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Parse `arguments` into nested plain values.

    Args:
        parser: parser of the command.
        arguments: the arguments of the command line.
        layers: nested settings between the defaults and the command line, such as those of a file; later ones override
            earlier ones.

    Raises:
        ConfigError: an argument or key is unknown, or a value has the wrong type.
    """
    with _errors_explained(parser):
        values = parser.parse_args(arguments)
        if layers:  # lists start from their defaults, so that `--list+ x` adds to that of a layer, and once
            defaults = parser.get_defaults()
            for key in [key for key, value in values.items() if isinstance(value, (list, tuple))]:
                values[key] = defaults[key]
        for settings in layers:
            values = parser.parse_object(dict(settings), values, defaults=False)
        if layers:  # parse the command line again, on top: `--model.args.x 3` adds to the mapping of a layer
            values = parser.parse_args(arguments, values)
    return expand_paths(values.as_dict())


def parse_given(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """Parse `arguments` into nested plain values, without defaults.

    Raises:
        ConfigError: an argument is unknown, or a value has the wrong type.
    """
    with _errors_explained(parser):
        given = parser.parse_args(arguments, defaults=False)
    return expand_paths(given.as_dict())


def build(kind: type[T], values: dict[str, Any], key: str = "") -> T:
    """Build the dataclass `kind` from nested plain values; `key` is its dotted key, for messages.

    Raises:
        ConfigError: a value is out of range or null, or there is a value in place of nested settings.
    """
    if not isinstance(values, dict):
        names = ", ".join(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
        raise ConfigError(f"{key} is {values!r}, but must hold settings: {names}.")
    prefix = f"{key}." if key else ""
    arguments = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            name, value = f"{prefix}{field.name}", values[field.name]
            nested = _nested_type(field)
            if value is None and nested is None:
                _require_nullable(name, hints[field.name])
            arguments[field.name] = build(nested, value, name) if nested is not None else _tuples(value)
    try:
        return kind(**arguments)
    except ArgumentError as error:
        # Classes that are used outside of settings, too, name their arguments without the key.
        first = re.match(r"\w+(?=[ =])", str(error))
        if first is None or first.group() not in arguments or not prefix:
            raise
        raise ConfigError(f"{prefix}{error}") from error


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of settings, without looking at their keys.

    Raises:
        ConfigError: the file is missing, or is not a YAML mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path!r} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The configuration file {path!r} is not valid YAML: {_one_line(error)}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"The configuration file {path!r} holds {type(content).__name__}, but must hold settings.")
    return content


def read_settings(path: str, parser: jsonargparse.ArgumentParser) -> dict[str, Any]:
    """Read the settings in a YAML file, and check every key against `parser`.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or contains an unknown key.
    """
    content = read_yaml(path)
    known = known_keys(parser) - _OF_THE_COMMAND_LINE
    for key, value in flatten(content, FREE_KEYS).items():
        if key not in known:
            advice = f" {_REPLACED[key]}" if key in _REPLACED else nearest(key, known)
            raise ConfigError(f"{path} holds the unknown key {key!r}.{advice}")
        inside = sorted(name.removeprefix(f"{key}.") for name in known if name.startswith(f"{key}."))
        if inside and (value is None or (isinstance(value, str) and not Path(value).is_file())):
            raise ConfigError(f"{path}: {key} is {value!r}, but must hold settings: {', '.join(inside)}.")
    return content


def known_keys(parser: jsonargparse.ArgumentParser) -> set[str]:
    """Return the dotted names of all settings and sections that `parser` accepts."""
    return set(parser.get_defaults().keys(branches=True))


def typed(args: dict[str, Any]) -> dict[str, Any]:
    """Convert strings among the arguments of a model to values: `--model.args.x 3` may arrive as the string '3'."""
    values = {}
    for key, value in args.items():
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = {"True": True, "False": False, "None": None}.get(value, value)
        values[key] = value
    return values


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {key.value!r} occurs twice in one section, again in line {line}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _require_nullable(name: str, hint: Any) -> None:
    """Raise unless `hint`, the type of the setting `name`, includes null, which a file may give for any setting."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if type(None) in parts or Any in parts:
        return
    kinds = dict.fromkeys((get_origin(part) or part).__name__ for part in parts)
    choices = [repr(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    words = [", ".join(choices) if kind == "Literal" else _WORDS.get(kind, "a list") for kind in kinds]
    raise ConfigError(f"{name} is null, but must be {' or '.join(words)}; leave it out for the default.")


def _nested_type(field: dataclasses.Field) -> Any:
    if field.default_factory is dataclasses.MISSING:
        return None
    default = field.default_factory()
    return type(default) if dataclasses.is_dataclass(default) else None


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# -- messages --------------------------------------------------------------------------------------------------------

_WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null",
    "tuple": "a list of numbers such as [0.5, 1]", "list": "a list such as [a, b]", "dict": "settings",
}  # fmt: skip
_COUNTS = {"2": "two", "3": "three"}


@contextmanager
def _errors_explained(parser: jsonargparse.ArgumentParser) -> Iterator[None]:
    """Convert errors of jsonargparse in the block to a `ConfigError` of one line that suggests the nearest option."""
    try:
        yield
    except jsonargparse.ArgumentError as error:
        text = _one_line(error)
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", text, re.IGNORECASE)
        if unknown is not None:
            options = [f"--{key}" for key in known_keys(parser)]
            name = unknown.group(1)
            replaced = _REPLACED.get(name.removeprefix("--"))
            text = f"{parser.prog} has no option {name}.{f' {replaced}' if replaced else _nearest_option(name, options)}"
        else:
            text = f"{parser.prog}: {_readable(text)}."
        raise ConfigError(f"{text} See `{parser.prog} --help`.") from error


def _nearest_option(name: str, options: Sequence[str]) -> str:
    """Return a suggestion of an option: of the same name in another section if there is one, else the closest."""
    last = name.lstrip("-").rpartition(".")[2]
    elsewhere = [option for option in options if option.endswith(f".{last}")]
    return nearest(name, elsewhere, cutoff=0.0) or nearest(name, options)


def _readable(text: str) -> str:
    """Rephrase the message of jsonargparse about a value of the wrong type in the form of our other errors."""
    of_a_key = re.match(r'Parser key "([^"]+)": .*(?:Got|Given) value: (.*)$', text)
    wanted = list(dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", text)))
    if of_a_key is None or not wanted or any(kind not in _WORDS for kind in wanted):
        return text
    words = [_WORDS[kind] for kind in wanted]
    of_length = re.search(r"Expected a tuple with (\d+) elements", text)
    if of_length is not None:
        words.insert(0, f"{_COUNTS.get(of_length.group(1), of_length.group(1))} numbers")
    return f"{of_a_key.group(1)} is {of_a_key.group(2)}, but must be {(', or ' if of_length else ' or ').join(words)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
