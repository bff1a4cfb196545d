"""Every interleaving of a small rollout: no key signs that a live verifier has not loaded.

An explicit search over all states of two replicas and two verifiers around one Vault and one store, in which each step
of rules 3 and 4 (`carnet_broker.core.rollout`, `carnet_broker.core.keyring`) is split where a crash or another party
can come between. The search is exhaustive, and each guard of the rules is shown to be needed: with it taken out, the
search finds the trace that breaks the promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import pytest


@dataclass(frozen=True, slots=True)
class Ring:
    """The keyring document: its generation, the signer, the standby, and all that is published."""

    generation: int
    active: int
    standby: int | None
    published: frozenset[int]


@dataclass(frozen=True, slots=True)
class Replica:
    """One broker: what it has loaded, and a step that it has prepared and not yet written."""

    ring: Ring
    prepared: Ring | None = None


@dataclass(frozen=True, slots=True)
class Verifier:
    """One verifier: what it has loaded, from whom, and whether its own rule lets it decide."""

    generation: int = 0
    keys: frozenset[int] = frozenset()
    replica: int | None = None
    stale: bool = True
    admitted: bool = False
    """Whether it was told that rotations wait for it, and has not been stale since."""


@dataclass(frozen=True, slots=True)
class Session:
    """The store's row of one verifier."""

    acknowledged: int
    lagging: bool = False


@dataclass(frozen=True, slots=True)
class World:
    """All of it."""

    document: Ring
    rollout: tuple[int, int]
    permit: tuple[int, int] | None
    replicas: tuple[Replica, ...]
    verifiers: tuple[Verifier, ...]
    sessions: tuple[Session | None, ...]


@dataclass(frozen=True, slots=True)
class Guards:
    """The guards of the rules, each of which a test takes out."""

    raise_rollout: bool = True
    join_wants_rollout: bool = True
    count_all: bool = True
    activate_wants_permit: bool = True
    verifier_never_goes_back: bool = True
    session_outlives_connection: bool = True


ALL = Guards()
Step: TypeAlias = tuple[str, World]


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it there is. Keys are numbers in the order of their making; 0 signs at the beginning."""

    replicas: int
    verifiers: int
    last_key: int


def start(size: Size) -> World:
    """A keyring with its signer and no standby; the replicas have loaded it."""
    ring = Ring(1, 0, None, frozenset({0}))
    count = size.verifiers
    return World(ring, (0, -1), None, (Replica(ring),) * size.replicas, (Verifier(),) * count, (None,) * count)


def canonical(world: World) -> World:
    """Return the one of the worlds that differ in the names of verifiers alone."""
    pairs = sorted(zip(world.verifiers, world.sessions, strict=True), key=repr)
    return replace(world, verifiers=tuple(pair[0] for pair in pairs), sessions=tuple(pair[1] for pair in pairs))


def put(items: tuple, place: int, item: object) -> tuple:
    """Return `items` with another one at `place`."""
    return (*items[:place], item, *items[place + 1 :])


def replica_steps(  # noqa: C901 - one branch for each step
    world: World, guards: Guards, last_key: int
) -> Iterator[Step]:
    """What the replicas can do: load, prepare a step (which touches the store), and write it with check-and-set."""
    for number, me in enumerate(world.replicas):
        ring = me.ring

        def with_me(changed: Replica, base: World = world, place: int = number) -> World:
            return replace(base, replicas=put(base.replicas, place, changed))

        if ring != world.document:
            yield f"{number} loads", with_me(Replica(world.document))
        if me.prepared is not None:
            yield f"{number} crashes before it writes", with_me(replace(me, prepared=None))
            if ring == world.document:
                written = replace(with_me(Replica(me.prepared)), document=me.prepared)
                yield f"{number} writes generation {me.prepared.generation}", written
            continue
        following = max(ring.published) + 1
        if ring.standby is None and following <= last_key:
            prepared = Ring(ring.generation + 1, ring.active, following, ring.published | {following})
            goal = (prepared.generation, following)
            raised = max(world.rollout, goal) if guards.raise_rollout else world.rollout
            ready = with_me(replace(me, prepared=prepared))
            yield f"{number} raises to {prepared.generation}", replace(ready, rollout=raised)
        if ring.standby is not None:
            goal = world.rollout if guards.raise_rollout else (ring.generation, ring.standby)
            if goal[1] == ring.standby and world.permit != goal:
                waiting = [s for s in world.sessions if s is not None and s.acknowledged < goal[0] and not s.lagging]
                if not waiting or not guards.count_all:
                    yield f"{number} permits", replace(world, permit=goal)
                else:
                    marked = tuple(replace(s, lagging=True) if s in waiting else s for s in world.sessions)
                    yield f"{number} permits overdue", replace(world, permit=goal, sessions=marked)
            if not guards.activate_wants_permit or (world.permit == goal and goal[1] == ring.standby):
                prepared = Ring(ring.generation + 1, ring.standby, None, ring.published)
                yield f"{number} is about to activate {ring.standby}", with_me(replace(me, prepared=prepared))


def verifier_steps(  # noqa: C901 - one branch for each step
    world: World, guards: Guards
) -> Iterator[Step]:
    """What happens to the verifiers: connect and load, be admitted, be pushed, acknowledge, lose the connection."""
    for number, (me, session) in enumerate(zip(world.verifiers, world.sessions, strict=True)):

        def become(changed: Verifier, base: World = world, place: int = number) -> World:
            return replace(base, verifiers=put(base.verifiers, place, changed))

        def with_session(row: Session | None, base: World = world, place: int = number) -> World:
            return replace(base, sessions=put(base.sessions, place, row))

        def loaded(ring: Ring, replica: int, mine: Verifier = me) -> Verifier | None:
            if ring.generation < mine.generation and guards.verifier_never_goes_back:
                return None  # It keeps its own, and tries another replica.
            return replace(mine, generation=ring.generation, keys=ring.published, replica=replica, stale=False)

        if me.replica is None:
            for replica, broker in enumerate(world.replicas):
                changed = loaded(broker.ring, replica)
                if changed is not None:
                    yield f"v{number} connects to {replica}", become(changed)
            if not me.stale:
                yield f"v{number} is stale by its own rule", become(replace(me, stale=True, admitted=False))
            elif session is not None:
                yield f"the session of v{number} ends", with_session(None)
            continue
        if world.replicas[me.replica].ring.generation > me.generation:
            changed = loaded(world.replicas[me.replica].ring, me.replica)
            assert changed is not None
            yield f"v{number} is pushed generation {changed.generation}", become(changed)
        if session is None or not me.admitted:
            if me.generation >= world.rollout[0] or not guards.join_wants_rollout:
                admitted = become(replace(me, admitted=True), with_session(Session(me.generation)))
                yield f"v{number} is admitted with {me.generation}", admitted
        elif session.acknowledged < me.generation:
            still_lagging = session.lagging and me.generation < world.rollout[0]
            yield f"v{number} acknowledges {me.generation}", with_session(Session(me.generation, still_lagging))
        lost = become(replace(me, replica=None))
        if not guards.session_outlives_connection:
            lost = replace(lost, sessions=put(lost.sessions, number, None))
        yield f"v{number} loses its connection", lost


def broken(world: World) -> str | None:
    """Say which live verifier would refuse a good token, if one would."""
    for replica in world.replicas:
        for number, (verifier, session) in enumerate(zip(world.verifiers, world.sessions, strict=True)):
            lagging = session is not None and session.lagging
            if verifier.admitted and not lagging and replica.ring.active not in verifier.keys:
                return f"verifier {number} has not loaded key {replica.ring.active}, which signs"
    return None


def search(
    size: Size, guards: Guards = ALL, *, is_broken: Callable[[World], str | None] = broken
) -> tuple[int, list[str] | None]:
    """Visit every state; return how many there are, and the shortest trace to a broken one if there is one."""
    first = start(size)
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    frontier = [first]
    while frontier:
        following: list[World] = []
        for world in frontier:
            steps = (*replica_steps(world, guards, size.last_key), *verifier_steps(world, guards))
            for name, reached in ((name, canonical(reached)) for name, reached in steps):
                if reached in came_from:
                    continue
                came_from[reached] = (world, name)
                if (why := is_broken(reached)) is not None:
                    return len(came_from), [*trace(came_from, reached), why]
                following.append(reached)
        frontier = following
    return len(came_from), None


def trace(came_from: dict[World, tuple[World, str] | None], world: World) -> list[str]:
    """Return the names of the steps that lead to `world`."""
    steps: list[str] = []
    while (step := came_from[world]) is not None:
        world, name = step
        steps.append(name)
    return steps[::-1]


@pytest.mark.parametrize(
    "size",
    [Size(replicas=2, verifiers=2, last_key=1), Size(replicas=2, verifiers=1, last_key=2)],
    ids=["two verifiers", "two rotations"],
)
def test_no_interleaving_lets_a_key_sign_that_a_live_verifier_has_not_loaded(size: Size):
    """K03, rules 3 and 4: with a verifier that joins between the last acknowledgement and the activation, a replica
    that lags, one that dies between store and Vault, and a verifier that is cut off and comes back elsewhere.
    """
    states, found = search(size)
    assert found is None
    assert states > 5_000


def test_the_search_reaches_a_rotation_with_both_verifiers_live():
    """Or the search would show nothing."""

    def rotated(world: World) -> str | None:
        live = all(session is not None and not session.lagging for session in world.sessions)
        return "reached" if live and world.document.active == 1 else None

    _, found = search(Size(replicas=2, verifiers=2, last_key=1), is_broken=rotated)
    assert found is not None
    assert found[-1] == "reached"
    assert not any("overdue" in step for step in found)


@pytest.mark.parametrize("without", [field.name for field in fields(Guards)])
def test_each_guard_is_needed(without: str):
    """With one guard out, there is a trace to a good token that is refused."""
    _, found = search(Size(replicas=2, verifiers=2, last_key=2), replace(ALL, **{without: False}))
    assert found is not None, f"the guard {without} guards nothing"
