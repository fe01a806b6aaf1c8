# SPDX-License-Identifier: BSD-3-Clause
"""Models of caches: ours (docs/decisions/0011-what-a-cache-keeps.md), and the classics that it is held against.

Each is told of pages one by one as they are read or written, and says whether it had them. All pages are of one size.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final, Protocol

Pages = OrderedDict[int, None]
"""Page numbers, those used last at the end."""


class Cache(Protocol):
    """What all of them do."""

    def use(self, page: int, is_read: bool) -> bool:
        """The page is read, or written; returns whether it was there."""


class LRU:
    """What was not used for longest goes first."""

    def __init__(self, capacity: int, _pages: int) -> None:
        self._capacity = capacity
        self._kept = Pages()

    def use(self, page: int, is_read: bool) -> bool:  # noqa: ARG002
        """See Cache."""
        hit = page in self._kept
        self._kept[page] = None
        self._kept.move_to_end(page)
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return hit


class TwoQ:
    """2Q, full version, with the sizes its authors advise (Johnson and Shasha, 1994)."""

    def __init__(self, capacity: int, _pages: int) -> None:
        self._capacity, self._most_new, self._most_ghosts = capacity, max(1, capacity // 4), max(1, capacity // 2)
        self._new, self._hot, self._ghosts = Pages(), Pages(), Pages()

    def use(self, page: int, is_read: bool) -> bool:  # noqa: ARG002
        """See Cache."""
        if page in self._hot:
            self._hot.move_to_end(page)
            return True
        if page in self._new:
            return True
        seen = page in self._ghosts
        if seen:
            del self._ghosts[page]
        self._make_room()
        (self._hot if seen else self._new)[page] = None
        return False

    def _make_room(self) -> None:
        if len(self._new) + len(self._hot) < self._capacity:
            return
        if self._hot and len(self._new) <= self._most_new:
            self._hot.popitem(last=False)
            return
        self._ghosts[self._new.popitem(last=False)[0]] = None
        if len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)


class ARC:
    """The adaptive replacement cache (Megiddo and Modha, 2003), by the names of the paper."""

    def __init__(self, capacity: int, _pages: int) -> None:
        self._c, self._p = capacity, 0.0
        self._t1, self._t2, self._b1, self._b2 = Pages(), Pages(), Pages(), Pages()

    def use(self, page: int, is_read: bool) -> bool:  # noqa: ARG002
        """See Cache."""
        for kept in (self._t1, self._t2):
            if page in kept:
                del kept[page]
                self._t2[page] = None
                return True
        if page in self._b1:
            self._p = min(self._c, self._p + max(1, len(self._b2) / len(self._b1)))
            self._come_back(page, self._b1)
        elif page in self._b2:
            self._p = max(0, self._p - max(1, len(self._b1) / len(self._b2)))
            self._come_back(page, self._b2)
        else:
            self._forget()
            self._t1[page] = None
        return False

    def _come_back(self, page: int, ghosts: Pages) -> None:
        self._replace(ghosts is self._b2)
        del ghosts[page]
        self._t2[page] = None

    def _replace(self, in_b2: bool) -> None:
        is_t1 = self._t1 and (len(self._t1) > self._p or (in_b2 and len(self._t1) == self._p))
        kept, ghosts = (self._t1, self._b1) if is_t1 else (self._t2, self._b2)
        ghosts[kept.popitem(last=False)[0]] = None

    def _forget(self) -> None:
        once, all_known = len(self._t1) + len(self._b1), sum(map(len, (self._t1, self._t2, self._b1, self._b2)))
        if once == self._c:
            (self._b1 or self._t1).popitem(last=False)
            if len(self._t1) == self._c or not self._b1:
                return
            self._replace(False)
        elif all_known >= self._c:
            if all_known == 2 * self._c:
                self._b2.popitem(last=False)
            self._replace(False)


class Ours:
    """The rule of ephemeral pools, with index words of a byte."""

    GENERATIONS: Final = 16  # 15 that take turns, and 0: ancient
    ANCIENT: Final = 15
    AGAIN: Final = 1 << 4
    IN_TMEM: Final = 1 << 5
    TURN: Final = 4  # a generation lasts until so many have missed: this part of the pages held
    LEAST_TURN: Final = 64
    EVICTED: Final = 64  # this part of the pages at once
    LOT: Final = 64  # misses in a row share a lot

    def __init__(self, capacity: int, pages: int) -> None:
        self._capacity, self._batch = capacity, max(1, capacity // self.EVICTED)
        self._words = bytearray(pages)
        self._count = [0] * 64  # of pages, by word
        self._once = self._again = 0  # pages in tmem
        self._share = 0  # how many of them may be pages that were used once
        self._now = 1
        self._hand = 0
        self._misses = self._turned = 0

    def use(self, page: int, is_read: bool) -> bool:
        """See Cache."""
        word = self._words[page]
        is_again = word & self.AGAIN and word % self.GENERATIONS
        is_recent = self._age(word) < self.TURN  # LRU would have it
        if is_read:
            self._learn(word & self.IN_TMEM, is_again, is_recent)
        if word & self.IN_TMEM:
            self._set(page, self.IN_TMEM | self.AGAIN)
            return True
        if is_again or is_recent:
            self._put(page, self.AGAIN)
        elif self._is_admitted():
            self._put(page, 0)
        else:
            self._set(page, 0)
        self._note_miss()
        return False

    def _learn(self, hit: int, is_again: int, is_recent: bool) -> None:
        if (not is_recent) if hit else is_again:
            self._share = max(0, self._share - 1)
        elif is_recent and not hit:
            self._share = min(self._capacity, self._share + 1)

    def _is_admitted(self) -> bool:
        if self._once + self._again < self._capacity - self._batch or self._once < self._share:
            return True
        lot = self._misses // self.LOT * 40503 % 65536
        return lot < 65536 // 16 + 65536 * 8 * self._share // self._capacity

    def _put(self, page: int, again: int) -> None:
        if self._once + self._again >= self._capacity:
            self._evict()
        self._set(page, self.IN_TMEM | again)

    def _evict(self) -> None:
        among = 0 if self._once and (self._once >= self._share or not self._again) else self.AGAIN
        wanted = self._batch
        oldest = re.compile(b"[%s]" % re.escape(self._oldest(self.IN_TMEM | among, wanted)))
        for start in (self._hand, 0):
            for found in oldest.finditer(self._words, start):
                if not wanted:
                    return
                self._hand = found.end()
                self._set(found.start(), among, self._words[found.start()] % self.GENERATIONS)
                wanted -= 1

    def _oldest(self, kind: int, wanted: int) -> bytes:
        """The words of the oldest pages of a kind, down to the age that makes up as many as wanted."""
        words, n = bytearray(), 0
        for age in range(self.ANCIENT, -1, -1):
            word = kind | (0 if age == self.ANCIENT else (self._now - 1 - age) % self.ANCIENT + 1)
            words.append(word)
            n += self._count[word]
            if n >= wanted:
                break
        return bytes(words)

    def _age(self, word: int) -> int:
        generation = word % self.GENERATIONS
        return (self._now - generation) % self.ANCIENT if generation else self.ANCIENT

    def _set(self, page: int, kind: int, generation: int | None = None) -> None:
        old, new = self._words[page], kind | (self._now if generation is None else generation)
        self._words[page] = new
        for word, change in ((old, -1), (new, 1)):
            self._count[word] += change
            if word & self.IN_TMEM:
                self._once += 0 if word & self.AGAIN else change
                self._again += change if word & self.AGAIN else 0

    def _note_miss(self) -> None:
        self._misses += 1
        if self._misses - self._turned >= max((self._once + self._again) // self.TURN, self.LEAST_TURN):
            self._turned = self._misses
            self._now = self._now % self.ANCIENT + 1
            self._forget_generation()

    def _forget_generation(self) -> None:
        """The pages that bear the number of the new generation become ancient."""
        becomes = bytearray(range(256))
        for kind in (0, self.AGAIN, self.IN_TMEM, self.IN_TMEM | self.AGAIN):
            becomes[kind | self._now] = kind
            self._count[kind] += self._count[kind | self._now]
            self._count[kind | self._now] = 0
        self._words[:] = self._words.translate(becomes)


CACHES: Final[Mapping[str, Callable[[int, int], Cache]]] = {"LRU": LRU, "2Q": TwoQ, "ARC": ARC, "ours": Ours}
"""By name, made of how many pages they hold, and how many there are."""
