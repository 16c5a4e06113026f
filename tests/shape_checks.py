"""The checker behind `--jaxtyping-packages`: beartype, taught that a method may return `Self`.

jaxtyping decorates each method by itself; beartype then cannot know its class, and raises.
"""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

checked = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))
