"""Holding pictures out: a part of a source that nothing learns from."""

import hashlib
from dataclasses import replace

from data.source_items import Source, SourceError


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
    """(the rest, `count` held-out pictures), chosen by the sha256 of their keys.

    The choice depends on the keys alone: a picture that is held out stays so when others are added
    (as long as `count` grows with them). Raises SourceError where nothing would be left.
    """
    if not 0 < count < len(source.items):
        raise SourceError(
            f"cannot hold out {count} of {len(source.items)} pictures of {source.folder.url}; "
            f"use 1 to {len(source.items) - 1}"
        )
    ranked = sorted(source.items, key=lambda item: hashlib.sha256(item.key.encode()).digest())
    chosen = {item.key for item in ranked[:count]}
    kept = tuple(item for item in source.items if item.key not in chosen)
    held = tuple(item for item in source.items if item.key in chosen)
    return replace(source, items=kept), replace(source, items=held, left_out=())
