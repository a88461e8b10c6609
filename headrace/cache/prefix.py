"""Index of exact prefixes: a chain of keys, one for each whole unit (page) of tokens.

key_k = H(key_{k-1}, tokens of unit k), and key_{-1} = H(namespace), where the namespace names everything
else that cached keys and values depend on. Tokens are compared on a hit, so a collision of the hash costs a
miss and never a wrong result. The idea of hashed units is that of PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from headrace.registry import Registry

REUSE: Registry[PrefixIndex] = Registry("cache reuse", "enable_prefix_caching")


@dataclass
class PrefixNode:
    """One published unit."""

    key: bytes
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    """The page of this unit in each pool; 0 where there is none, or it has been given to somebody else."""


@REUSE.register(
    "exact_prefix",
    label="exact",
    option="enable_prefix_caching=True",
    example={"enable_prefix_caching": True},
    summary="Pages of exact common prefixes are shared; the last token is always recomputed.",
    source="hashed blocks: PagedAttention, arXiv 2309.06180",
    composes="everything; requests with prompt_logprobs evaluate their whole prompt",
)
class PrefixIndex:
    """Published units by key."""

    def __init__(self, unit: int, namespace: str, seen: Sequence[Callable[[int], range] | None] = ()) -> None:
        """`seen`: by pool the units that rows from a token index on read there; None: all before it.

        A prefix needs pages only where they are seen: a window's are those before its end, sealed pages stand in
        front of open ones.
        """
        self.unit = unit
        self._seen = tuple(seen)
        self._root = hashlib.blake2b(namespace.encode(), digest_size=16).digest()
        self._nodes: dict[bytes, PrefixNode] = {}
        self._by_page: dict[tuple[int, int], bytes] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int], salt: bytes = b"") -> None:
        """Append to `keys` those of the whole units of `tokens` that it lacks. Other salts have other keys."""
        while (len(keys) + 1) * self.unit <= len(tokens):
            parent = keys[-1] if keys else self._root + salt
            chunk = tokens[len(keys) * self.unit : (len(keys) + 1) * self.unit]
            keys.append(hashlib.blake2b(parent + array("q", chunk).tobytes(), digest_size=16).digest())

    def match(self, keys: Sequence[bytes], tokens: Sequence[int], units: int) -> Iterator[PrefixNode]:
        """The published nodes of the longest known prefix, at most `units` of them."""
        for k in range(min(units, len(keys))):
            node = self._nodes.get(keys[k])
            if node is None or node.tokens != tuple(tokens[k * self.unit : (k + 1) * self.unit]):
                return
            yield node

    def seen(self, pool: int, tokens: int) -> range:
        """The whole units that rows from index `tokens` on see in a pool."""
        rule = self._seen[pool] if self._seen else None
        return rule(tokens) if rule else range(tokens // self.unit)

    def usable(self, nodes: Sequence[PrefixNode]) -> int:
        """Units of a chain up to the last place where every pool has the pages that the next token sees."""
        if not any(self._seen):
            return len(nodes)
        # Pages that the first units have, by pool and number of units.
        have = [list(accumulate((page > 0 for page in column), initial=0)) for column in zip(*(n.pages for n in nodes))]
        for k in range(len(nodes), 0, -1):
            needed = [self.seen(pool, k * self.unit) for pool in range(len(have))]
            if all(sums[r.stop] - sums[r.start] == len(r) for sums, r in zip(have, needed, strict=True)):
                return k
        return 0

    def publish(self, key: bytes, tokens: Sequence[int], pages: Sequence[int]) -> bool:
        """Enter a unit. False if the key is known already; the caller's pages then stay private, but for those that
        the unit has lost."""
        node = self._nodes.get(key)
        if node is None:
            self._nodes[key] = PrefixNode(key, tuple(tokens), tuple(pages))
            for pool, page in enumerate(pages):
                if page:
                    self._by_page[pool, page] = key
            return True
        if node.tokens == tuple(tokens):
            lost = [pool for pool, page in enumerate(pages) if page and not node.pages[pool]]
            self._by_page.update({(pool, pages[pool]): key for pool in lost})
            node.pages = tuple(mine or page for mine, page in zip(node.pages, pages, strict=True))
        return False

    def holds(self, pool: int, page: int) -> bool:
        """Whether the page belongs to a published unit."""
        return (pool, page) in self._by_page

    def forget(self, pool: int, page: int) -> PrefixNode | None:
        """The page is given to somebody else. Takes out the unit that it belongs to, whose other pools' pages are no
        longer published; a unit that loses a page that not every row sees is good for other prefixes and stays."""
        key = self._by_page.pop((pool, page), None)
        if key is None:
            return None
        node = self._nodes[key]
        node.pages = (*node.pages[:pool], 0, *node.pages[pool + 1 :])
        if self._seen and self._seen[pool] and any(node.pages):
            return None
        del self._nodes[key]
        for other, twin in enumerate(node.pages):
            self._by_page.pop((other, twin), None)
        return node

    def clear(self) -> None:
        """Forget everything."""
        self._nodes.clear()
        self._by_page.clear()
