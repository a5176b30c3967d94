"""Strict YAML: plain values only, with one meaning in every version of YAML.

There are no tags, no aliases and no repeated keys. Numbers are decimal; `no`, `on`, `017`, `1_0`,
`1:30` and dates, which YAML's versions read differently, are text, and are written in quotes.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import yaml

from polyseg.errors import PolysegError

LONGEST_YAML = 50_000
"""Largest number of characters."""

_DEEPEST_NESTING = 30
_LARGEST_NUMBER = 2**63
_PLAIN = {
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "null": "~|null|Null|NULL|",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping after checking that no key is repeated."""
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            seen: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if name in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"{name!s:.60} is repeated in line {line}")
                seen.add(name)
        return mapping


class _Dumper(yaml.SafeDumper):
    # YAML 1.1's rules, which quote text that YAML 1.1 would read as another type.
    yaml_implicit_resolvers = copy.deepcopy(yaml.SafeDumper.yaml_implicit_resolvers)


for _kind, _pattern in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None
        )


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML from an untrusted source.

    Raises:
        PolysegError: one line that starts with `source`.

    >>> parse_yaml("[1, 1e-3, 1_0, no]", "here")
    [1, 0.001, '1_0', 'no']
    >>> parse_yaml("{a: 1, a: 2}", "here")
    Traceback (most recent call last):
    polyseg.errors.PolysegError: here: is not valid YAML: a is repeated in line 1
    """
    if len(text) > LONGEST_YAML:
        raise PolysegError(f"{source}: has over {LONGEST_YAML:,} characters; shorten it")
    try:
        _refuse_unsafe(text, source)
        tree = _Loader(text).get_single_data()
        if any(isinstance(value, int) and abs(value) > _LARGEST_NUMBER for value in parts(tree)):
            raise PolysegError(f"{source}: contains a whole number above 2 to the power of 63")
        return tree
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise PolysegError(f"{source}: is not valid YAML: {reason[:200]}") from None


def dump_yaml(tree: Any, *, in_a_line: bool = False) -> str:
    """Return plain values as YAML; the order of keys is kept.

    >>> dump_yaml({"b": 1e-9, "a": ["no", "1e-3"]}, in_a_line=True)
    "{b: 1.0e-09, a: ['no', '1e-3']}"
    """
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=in_a_line)
    return text.replace("\n...", "").strip() if in_a_line else text


def parts(tree: Any) -> Iterator[Any]:
    """Yield a tree and everything in it: mappings, lists, keys and values."""
    yield tree
    for part in tree if isinstance(tree, dict | list | tuple) else ():
        yield from parts(part)
        if isinstance(tree, dict):
            yield from parts(tree[part])


def _refuse_unsafe(text: str, source: str) -> None:
    """Raise on aliases, tags and deep nesting, before anything is built."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise PolysegError(f"{source}: YAML aliases (*name) are not supported; write it out")
        if tag := getattr(event, "tag", None):
            raise PolysegError(f"{source}: YAML tags ({tag:.60}) are not supported; remove it")
        if depth > _DEEPEST_NESTING:
            raise PolysegError(f"{source}: is nested over {_DEEPEST_NESTING} levels; flatten it")
