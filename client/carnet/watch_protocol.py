"""One Watch stream, without the stream: what comes in, and what is to be said. No clock, no I/O.

The rules are those of `carnet.trust_state`; here are those that need the order of what was said:

- Every response is answered. What a response tells is as fresh as the last answer that the broker had when it wrote.
- A broker that is behind what is loaded is left: at once when it is so from the start, else after a moment, for brokers
  read the keyring and the store by turns.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Final

from carnet.keysets import Moment, Supply
from carnet.trust_messages import Answer, Goodbye, Hello, PartCollector, RefusedResponseError, Response
from carnet.trust_state import Outcome, TrustState

__all__ = ["WatchProtocol"]

_NOTHING: Final = timedelta()
_HEARTBEATS: Final = 2
"""So many may be missed before a stream counts as dead."""
_MARGIN: Final = timedelta(seconds=1)
_LONGEST_HEARTBEAT: Final = timedelta(minutes=1)
_LONGEST_STALENESS: Final = timedelta(days=1)
"""More is nothing that a broker waits for."""
_BEHIND_FOR: Final = timedelta(seconds=2)


class WatchProtocol:
    """One stream of one verifier. Changes the state, so it is called under the lock of that."""

    def __init__(self, state: TrustState, *, instance_id: str, audience: str, accepts_stale: bool) -> None:
        self._state = state
        self._instance_id = instance_id
        self._audience = audience
        self.accepts_stale = accepts_stale
        self._sent: deque[tuple[int, Moment]] = deque()
        self._number = 0
        self._parts = PartCollector()
        self._heard = False
        self._behind_since: Moment | None = None
        self.live = False
        """Whether rotations wait for this verifier, as the broker said last."""
        self.patience = _HEARTBEATS * _LONGEST_HEARTBEAT + _MARGIN
        """For how long nothing may come before the stream counts as dead."""

    def hello(self, now: Moment) -> Hello:
        """Return the first message, which goes out now."""
        self._sent.append((0, now))
        state = self._state
        # One that decides for longer than a broker would wait for it is like one that decides with whatever is old.
        too_long = state.max_staleness > _LONGEST_STALENESS
        return Hello(
            self._instance_id,
            self._audience,
            None if state.wants_all else state.position,
            min(state.max_staleness, _LONGEST_STALENESS),
            self.accepts_stale or too_long,
        )

    def receive(self, response: Response, now: Moment) -> Outcome:
        """Take a response in. Raises `RefusedResponseError`: then the stream is to be ended, and another one opened."""
        asked_at = self._asked_at(response.answered)
        if response.heartbeat <= _NOTHING:
            msg = f"the heartbeat is {response.heartbeat}"
            raise RefusedResponseError(msg)
        self.patience = _HEARTBEATS * min(response.heartbeat, _LONGEST_HEARTBEAT) + _MARGIN
        self.live = response.live
        whole = self._parts.add(response, asked_at, now)
        if whole is None:
            return Outcome.PART
        response, asked_at = whole
        outcome = self._state.apply(response, asked_at=asked_at, now=now)
        self._state.keys.supply = Supply.PUSH
        self._note_lag(outcome, now)
        return outcome

    def answer(self, now: Moment) -> Answer:
        """Return the answer to the last response, which goes out now."""
        self._number += 1
        self._sent.append((self._number, now))
        return Answer(self._number, self._state.position)

    def goodbye(self) -> Goodbye:
        """Return the last message."""
        return Goodbye()

    def _asked_at(self, answered: int) -> Moment:
        while self._sent and self._sent[0][0] < answered:
            self._sent.popleft()
        if not self._sent or self._sent[0][0] != answered:
            msg = f"the broker says that it had answer {answered}, and {self._number} were given"
            raise RefusedResponseError(msg)
        return self._sent[0][1]

    def _note_lag(self, outcome: Outcome, now: Moment) -> None:
        """Give up a broker that is behind at the start, and one that stays behind (rule 1)."""
        first, self._heard = not self._heard, True
        if outcome is not Outcome.BEHIND:
            self._behind_since = None
            return
        if self._behind_since is None:
            self._behind_since = now
        if first or now.since(self._behind_since) >= _BEHIND_FOR:
            msg = "the broker knows less than what is loaded here: it lags behind another replica"
            raise RefusedResponseError(msg)
