"""Where every rank is in its training, told over the hosts' network so that a rank that hangs can be named."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.ranks import every_rank

_SILENT = 4
"""Beats that a rank misses before it counts as silent; single ones get lost on the way."""
_MOST = 16
"""Ranks that one answer names: it has to fit a packet."""
_HELLO_SECONDS = 10.0
"""Time for the first rank to answer at the beginning."""


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        count: How many marks of its training it has passed; the same marks on every rank.
        step: Optimiser steps it has done.
        doing: What came last.
        left: Whether it ended by itself.
    """

    count: int = 0
    step: int = 0
    doing: str = "setting up"
    left: bool = False


@dataclass(frozen=True)
class Seen:
    """What the first rank knows of another one.

    Attributes:
        rank: Which.
        missed: Beats since it was last heard of.
        place: Where it was then.
    """

    rank: int
    missed: int
    place: Place

    @property
    def silent(self) -> bool:
        """Whether it is not heard of any more."""
        return self.missed >= _SILENT


@dataclass(frozen=True)
class Home:
    """Where a rank's process lives: on a machine, in a namespace of processes."""

    host: str
    space: str
    pid: int

    @classmethod
    def here(cls) -> Home:
        """This process's."""
        space = Path("/proc/self/ns/pid")
        return cls(socket.gethostname(), str(space.readlink()) if space.is_symlink() else "", os.getpid())

    def is_gone(self, here: Home) -> bool:
        """Whether the process is known to have ended; of other machines nothing is known."""
        if not self.space or (self.host, self.space) != (here.host, here.space):
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"


class RollCall:
    """Every rank sends a packet to the first one at each beat, and may ask it which ranks are silent or behind.

    Packets are UDP: nothing here waits for a rank that hangs, and lost ones do no harm. They carry a token that the
    ranks agreed on over their own connection; others are not read. All ranks make this at the same point.

    Args:
        rank: This one.
        address: The first rank's host, as the other ranks reach it.
    """

    def __init__(self, rank: int, address: str) -> None:
        self.rank, self.beats, self.answered, self.answers = rank, 0, 0, 0
        """This rank, its beats so far, the last one with an answer to a question, and how many answers there were."""
        self.board: list[Seen] = []
        self.left: set[int] = set()
        self._places: dict[int, tuple[int, Place]] = {}
        self._lock = threading.Lock()
        family = socket.getaddrinfo(address, None, type=socket.SOCK_DGRAM)[0][0]
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        if rank == 0:
            self._socket.bind(("", 0))
        self._token, port = every_rank((secrets.token_hex(8), self._socket.getsockname()[1]))[0]
        self._first = (address, port)
        self.homes: list[Home] = every_rank(Home.here())
        if rank == 0:
            self._places = {other: (0, Place()) for other in range(len(self.homes))}
            threading.Thread(target=self._listen, name="roll-call", daemon=True).start()
        self.works = all(every_rank(self._hello()))

    def beat(self, place: Place, ask: bool = False) -> None:
        """Tell the first rank where this one is, at every beat.

        Args:
            place: Where.
            ask: Whether `board` and `left` are to be brought up to date.
        """
        with self._lock:
            self.beats += 1
        self.tell(place, ask)

    def tell(self, place: Place, ask: bool = False) -> None:
        """The same between two beats."""
        with self._lock:
            self._places[self.rank] = (self.beats, place)
            if self.rank == 0:
                self.board, self.left, self.answered = self._seen(), self._left(), self.beats
                self.answers += 1
                return
        try:
            self._socket.sendto(self._packet(place, ask), self._first)
            while ask:
                self._read(self._socket.recv(65536))
        except (OSError, ValueError, TypeError):
            return  # nothing to read, or from a stranger, or nobody there to send to: `answered` tells

    def gone(self) -> list[int]:
        """Ranks of this machine whose processes have ended, and that did not say so."""
        here = self.homes[self.rank]
        others = [(rank, home) for rank, home in enumerate(self.homes) if rank not in self.left | {self.rank}]
        return [rank for rank, home in others if home.is_gone(here)]

    def _hello(self) -> bool:
        """Whether the first rank answers."""
        if self.rank == 0:
            return True
        self._socket.settimeout(_HELLO_SECONDS / 10)
        try:
            return any(self._is_answered() for _ in range(10))
        finally:
            self._socket.setblocking(False)

    def _is_answered(self) -> bool:
        try:
            self._socket.sendto(self._packet(Place(), ask=True), self._first)
            self._read(self._socket.recv(65536))
        except (OSError, ValueError, TypeError):
            return False
        return True

    def _packet(self, place: Place, ask: bool) -> bytes:
        return json.dumps([self._token, self.rank, ask, *vars(place).values()]).encode()

    def _read(self, packet: bytes) -> None:
        token, rows, left = json.loads(packet)
        if token == self._token:
            self.left = set(left)
            self.board = [Seen(rank, missed, Place(*place)) for rank, missed, place in rows]
            self.answered = self.beats
            self.answers += 1

    def _listen(self) -> None:
        """Be the first rank: note who is where, and answer."""
        while True:
            try:
                packet, sender = self._socket.recvfrom(4096)
                token, rank, ask, *place = json.loads(packet)
                if token != self._token:
                    continue
                with self._lock:
                    self._places[rank] = (self.beats, Place(*place))
                    rows: list[Any] = [[s.rank, s.missed, list(vars(s.place).values())] for s in self._seen()]
                    left = sorted(self._left())
                if ask:
                    self._socket.sendto(json.dumps([self._token, rows, left]).encode(), sender)
            except (ValueError, TypeError, OSError):  # a stranger's packet; a rank that cannot be reached
                continue

    def _seen(self) -> list[Seen]:
        """Of the ranks that have not ended, the silent ones, then those that are farthest behind."""
        there = [(rank, *known) for rank, known in self._places.items() if not known[1].left]
        seen = [Seen(rank, self.beats - beat, place) for rank, beat, place in there]
        return sorted(seen, key=lambda one: (not one.silent, one.place.count, one.rank))[:_MOST]

    def _left(self) -> set[int]:
        return {rank for rank, (_, place) in self._places.items() if place.left}
