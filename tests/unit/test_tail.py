# SPDX-License-Identifier: BSD-3-Clause
"""The tail of a backing: found, whole or not there, whatever was torn, and never taken for another's."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.harness import MIB
from tests.support.tails import SIZE, MemoryStore, identity_for, new_tail
from tmemd.store import tail
from tmemd.store.bitmapfile import REGION
from tmemd.store.poolfile import PoolError
from tmemd.store.tail import BLOCK, Claim, Identity, Renewal, Request, State, Tail

SECTOR = 512
ids = st.uuids()
numbers = st.integers(0, 2**64 - 1)
names = st.text("abc0._-", min_size=1, max_size=63)
identities = st.builds(Identity, numbers, numbers, st.integers(0, 2**32 - 1), ids, names, st.booleans(), st.booleans())
claims = st.builds(Claim, numbers, ids, numbers, numbers, names)
renewals = st.builds(
    Renewal, numbers, ids, numbers, st.sampled_from(State), st.none() | ids.filter(lambda one: one.int != 0)
)
requests = st.builds(Request, numbers, ids, names)


@given(identities | claims | renewals | requests)
def test_what_is_written_is_read(record: Identity | Claim | Renewal | Request) -> None:
    block = record.pack()
    assert len(block) == BLOCK
    assert not block[SECTOR:].strip(b"\0")
    read = [kind.unpack(block) for kind in (Identity, Claim, Renewal, Request)]
    assert [found for found in read if found] == [record]


@given(claims, st.integers(0, 8 * SECTOR - 1))
def test_a_flipped_bit_is_seen(claim: Claim, bit: int) -> None:
    block = bytearray(claim.pack())
    block[bit // 8] ^= 1 << bit % 8
    assert Claim.unpack(bytes(block)) in (None, claim)


@given(st.integers(1, 2**48))
def test_what_is_left_of_a_backing_is_the_device(size: int) -> None:
    length = tail.length_for(size)
    assert length - tail.tail_bytes(length) >= size
    assert (length - BLOCK) - tail.tail_bytes(length - BLOCK) < size
    beyond = length + size % BLOCK
    assert (beyond - tail.tail_bytes(beyond)) % BLOCK == 0


@pytest.mark.parametrize("more", [0, 1, SECTOR, BLOCK - 1])
def test_a_tail_is_found_from_the_end(more: int) -> None:
    store = MemoryStore(bytearray(SIZE + more))
    made = new_tail(store)
    found = tail.find(store, "here")
    assert found
    assert found.identity == made.identity
    assert found.map_offset == made.map_offset >= made.identity.size


def test_what_has_no_tail_has_none() -> None:
    store = MemoryStore(bytearray(SIZE))
    assert tail.find(store, "here") is None
    store.data[:] = b"data" * (SIZE // 4)
    assert tail.find(store, "here") is None
    assert tail.find(MemoryStore(bytearray(3 * BLOCK)), "here") is None
    assert not tail.is_unfinished(store)


class TornStore(MemoryStore):
    """One whose nth write is torn after so many bytes, and the last."""

    def __init__(self, data: bytearray, writes: int, torn_at: int) -> None:
        super().__init__(data)
        self.left, self._torn_at = writes, torn_at

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:
        if self.left < 0:
            raise OSError("the host died")
        super().write(offset, data if self.left else data[: self._torn_at], durable=durable)
        self.left -= 1
        if self.left < 0:
            raise OSError("the host died")


def writes_of(change: Callable[[Tail], None], torn_at: int, start: Callable[[MemoryStore], Tail]) -> list[MemoryStore]:
    """What each of the writes that a change takes leaves when it is torn."""
    left: list[MemoryStore] = []
    while True:
        store = MemoryStore(bytearray(SIZE))
        identity = start(store).identity
        torn = TornStore(store.data, len(left), torn_at)
        try:
            change(Tail(torn, identity))
        except OSError:
            left.append(store)
        else:
            return left


@pytest.mark.parametrize("torn_at", range(0, BLOCK + 1, SECTOR))
def test_a_tail_that_is_being_made_is_none_until_it_is_whole(torn_at: int) -> None:
    claim = Claim(1, uuid.uuid4(), 20_000, 0, "maker")
    stores = writes_of(
        lambda one: one.create(claim, trusted=False), torn_at, lambda store: Tail(store, identity_for(store.size))
    )
    assert len(stores) >= 5
    for store in stores:
        found = tail.find(store, "here")
        if found:
            assert found.ownership().claim == claim
            assert all(found.read_bits())
        else:
            assert tail.is_unfinished(store) or not any(store.data)
    assert tail.find(stores[-1], "here") or torn_at == 0


@pytest.mark.parametrize("torn_at", range(0, BLOCK + 1, SECTOR))
def test_a_torn_claim_leaves_the_one_before(torn_at: int) -> None:
    claim = Claim(2, uuid.uuid4(), 20_000, 0, "taker")
    (store,) = writes_of(lambda one: one.write_claim(claim), torn_at, new_tail)
    found = tail.find(store, "here")
    assert found
    ownership = found.ownership()
    assert ownership.claim == claim if torn_at else ownership.is_released


@pytest.mark.parametrize("torn_at", range(0, BLOCK + 1, SECTOR))
def test_a_device_is_half_restored_or_it_is_not(torn_at: int) -> None:
    stores = writes_of(lambda one: one.note(restoring=True, unused=False), torn_at, new_tail)
    assert [store.identity.restoring for store in stores] == [False, torn_at > 0]


def test_a_late_renewal_is_not_taken_for_the_successors() -> None:
    made = new_tail(MemoryStore(bytearray(SIZE)))
    claim = Claim(3, uuid.uuid4(), 20_000, 0, "taker")
    made.write_claim(claim)
    assert made.ownership().claim == claim
    assert made.ownership().renewal is None  # though that of epoch 1 is in the same block
    made.write_renewal(Renewal(3, claim.owner, 7))
    made.write_renewal(Renewal(2, uuid.uuid4(), 9))
    assert made.ownership().renewal == Renewal(3, claim.owner, 7)


def test_a_request_is_to_one_owner() -> None:
    made = new_tail(MemoryStore(bytearray(SIZE)))
    before = made.ownership().seen
    made.write_request(Request(1, uuid.uuid4(), "asker"))
    found = made.ownership()
    assert found.request
    assert found.request.host == "asker"
    assert found.seen == before  # who asks does not renew
    made.write_claim(Claim(2, uuid.uuid4(), 20_000, 0, "taker"))
    assert made.ownership().request is None


def test_nobody_can_tell_who_has_it_if_both_claims_are_damaged() -> None:
    store = MemoryStore(bytearray(SIZE))
    made = new_tail(store)
    store.write(made.map_offset - 5 * BLOCK, b"\1" * 2 * BLOCK, durable=True)
    with pytest.raises(PoolError, match="damaged"):
        made.ownership()


@pytest.mark.parametrize("length", [SIZE - BLOCK, SIZE // 2, SIZE + BLOCK])
def test_a_backing_that_has_shrunk_or_grown_has_no_tail(length: int) -> None:
    store = MemoryStore(bytearray(SIZE))
    new_tail(store)
    store.data = store.data[:length].ljust(length, b"\0")
    assert tail.find(store, "here") is None


def test_one_that_shrank_to_where_an_old_copy_lies_is_refused() -> None:
    store = MemoryStore(bytearray(SIZE))
    made = new_tail(store)
    store.data = store.data[: SIZE - (made.blocks - 1) * BLOCK]
    with pytest.raises(PoolError, match=rf"here: its tail is of a backing of {SIZE} bytes, and it has {store.size}"):
        tail.find(store, "here")


@pytest.mark.parametrize("copy", ["first", "last"])
def test_either_copy_of_the_identity_will_do(copy: str) -> None:
    store = MemoryStore(bytearray(SIZE))
    made = new_tail(store)
    at = SIZE - BLOCK if copy == "last" else SIZE - made.blocks * BLOCK
    store.write(at, bytes(BLOCK), durable=True)
    found = tail.find(store, "here")
    assert found
    assert found.identity == made.identity


@pytest.mark.parametrize(("at", "why"), [(8, "format version 255"), (40, "damaged")])
def test_what_is_no_whole_tail_of_this_version_is_refused(at: int, why: str) -> None:
    store = MemoryStore(bytearray(SIZE))
    made = new_tail(store)
    for block in (SIZE - BLOCK, SIZE - made.blocks * BLOCK):
        store.data[block + at] = 255
    with pytest.raises(PoolError, match=f"here: .*{why}"):
        tail.find(store, "here")


def test_two_that_make_a_tail_at_once_notice_it() -> None:
    store = MemoryStore(bytearray(SIZE))
    made = new_tail(store)
    made.check()
    Tail(store, replace(made.identity, uuid=uuid.uuid4())).create(Claim(1, uuid.uuid4(), 1, 0, "other"), trusted=True)
    with pytest.raises(PoolError, match="another host has changed its tail"):
        made.check()


def test_the_maps_bits_are_in_its_order() -> None:
    store = MemoryStore(bytearray(320 * MIB))
    made = new_tail(store)
    store.write(made.map_offset, b"\x05\x02", durable=True)
    assert [i for i, bit in enumerate(made.read_bits()) if bit] == [0, 2, 9]
    assert len(made.read_bits()) == -(-made.identity.size // REGION)
