"""The tables of ``docs/scale.md``, made of the figures of `fleet_simulation`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["page_with_tables", "tables"]


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page, by name."""
    sizes, sent, fleets = result["message_bytes"], result["wire_bytes"], result["fleets"]
    names = {
        "heartbeat": "heartbeat",
        "answer": "answer",
        "key_set_of_3": "key set of 3 keys",
        "delta_of_1": "1 revocation",
        "delta_of_100": "100 revocations",
        "snapshot_of_10000": "snapshot of 10,000 revocations",
    }
    return {
        "sizes": _table(
            ("message", "protobuf, bytes", "on the network, bytes"),
            [(text, sizes[name], sent[name]) for name, text in names.items()]
            + [("opening: handshake, first words, key set", "", sent["opening_up"] + sent["opening_down"])],
        ),
        "costs": _table(
            ("what", "measured", "bare gRPC"),
            [
                (text, result["costs"][name], result["bare_costs"][name])
                for name, text in {
                    "heartbeat_cpu_us": "heartbeat and its answer, us of processor time",
                    "push_cpu_us": "push, its answer and the row in the store, us",
                    "open_cpu_us": "new stream: handshake, first words, join, us",
                    "send_share": "part of a push that passes before it is out",
                    "memory_bytes": "memory of a stream, bytes",
                }.items()
            ],
        ),
        "fleet": _table(
            ("", *(f"{count} processes" for count in fleets)),
            [
                ("streams of a process", *(each["streams_of_a_process"] for each in fleets.values())),
                *((text, *(each[part][name] for each in fleets.values())) for part, name, text in _ROWS),
            ],
        ),
        "bend": _table(
            ("most streams of one process", "measured", "bare gRPC"),
            [
                (text, *(result["bend"][costs]["streams"][name] for costs in ("measured", "bare")))
                for name, text in {
                    "heartbeats": "70 % of a core by heartbeats and reconnections alone",
                    "push": "a change reaches 99 % of its streams within 250 ms",
                    "memory": "1 GiB of memory",
                    "connections": "`limits.connections`, unless it is raised",
                }.items()
            ]
            + [("processes for 100,000", *(result["bend"][c]["processes_for_100000"] for c in ("measured", "bare")))],
        ),
    }


_ROWS: Final = (
    ("quiet", "messages_per_s", "**quiet**: messages a second, both ways"),
    ("quiet", "connections_per_s", "of these new connections, by age"),
    ("quiet", "bytes_up_per_s", "bytes a second up"),
    ("quiet", "bytes_down_per_s", "bytes a second down"),
    ("quiet", "cpu_share_mean", "share of a core for each process"),
    ("generation", "p50_ms", "**one generation of keys**: half of all have it after, ms"),
    ("generation", "p99_ms", "99 %, ms"),
    ("generation", "last_ms", "the last one, ms"),
    ("generation", "last_answer_ms", "the last answer is in after, ms"),
    ("generation", "bytes_down", "bytes down"),
    ("generation", "bytes_up", "bytes up"),
    ("generation", "rows_in_the_store", "rows written in the store"),
    ("revocation", "p50_ms", "**one revocation**: half of all have it after, ms"),
    ("revocation", "p99_ms", "99 %, ms"),
    ("revocation", "last_ms", "the last one, ms"),
    ("revocation", "bytes_down", "bytes down"),
    ("revocation", "bytes_up", "bytes up"),
    ("revocation", "rows_in_the_store", "rows written in the store"),
    ("burst", "p50_ms", "**100 revocations a second, for 3 s**: half are told after, ms"),
    ("burst", "p99_ms", "99 %, ms"),
    ("burst", "last_ms", "the last one, ms"),
    ("burst", "revocations_in_a_push", "revocations in one push, on average"),
    ("burst", "bytes_down_per_s", "bytes a second down"),
    ("burst", "cpu_share_most", "share of a core, the busiest process"),
    ("death", "streams", "**one process dies**: its streams"),
    ("death", "back_p50_ms", "half are back after, ms"),
    ("death", "back_p99_ms", "99 %, ms"),
    ("death", "back_last_ms", "the last one, ms"),
)


def _table(head: tuple[Any, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def page_with_tables(page: str, result: dict[str, Any]) -> str:
    """Return the page with its tables made of `result`."""
    for name, table in tables(result).items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page, found = pattern.subn(lambda match, table=table: match[1] + table + match[2], page)
        if found != 1:
            msg = f"the page has {found} places for the table {name!r}"
            raise ValueError(msg)
    return page
