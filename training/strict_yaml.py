"""YAML for recipes: the core schema of YAML 1.2 with decimal numbers, and nothing else.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is False, `1:30` is ninety and a key given
twice is silently its last value. Here `1e-4` is a number, only `true` and `false` are booleans,
dates stay strings, and a key given twice is an error. The dumper quotes by the same rules, so what
is written reads back as the same values.
"""

import re
from collections.abc import Hashable

import yaml


def parse_yaml(text: str) -> object:
    """The value of one YAML document.

    Raises:
        yaml.YAMLError: not YAML, a key given twice, or a key that is not a string.
    """
    return yaml.load(text, Loader=_StrictLoader)


def dump_yaml(value: object) -> str:
    """YAML text in block style, keys in their own order; `parse_yaml` reads the same value."""
    return yaml.dump(
        value, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


class _StrictLoader(yaml.SafeLoader):
    """Constructs mappings with unique string keys."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        mapping: dict[Hashable, object] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            _check_key(key, mapping, key_node)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _StrictDumper(yaml.SafeDumper):
    """Quotes a string wherever `_StrictLoader` would read it as something else."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def _check_key(key: object, mapping: dict[Hashable, object], node: yaml.Node) -> None:
    if not isinstance(key, str):
        raise yaml.constructor.ConstructorError(
            None, None, f"the key {key!r} must be a word; quote it to make it one", node.start_mark
        )
    if key in mapping:
        raise yaml.constructor.ConstructorError(
            None, None, f"the key {key!r} is given twice; keep one of them", node.start_mark
        )


_NULL = re.compile(r"^(?:null|Null|NULL|~|)$")
_BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INTEGER = re.compile(r"^[-+]?[0-9]+$")
_NUMBER = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


def _integer(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node), 10)


def _number(loader: _StrictLoader, node: yaml.ScalarNode) -> float:
    return float(
        loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan")
    )


for _kind in (_StrictLoader, _StrictDumper):
    # A table of their own: the resolvers of the parent are shared with every other user of PyYAML.
    _kind.yaml_implicit_resolvers = {}
    _kind.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["n", "N", "~", ""])
    _kind.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _integer)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _number)
