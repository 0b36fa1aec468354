"""Whether the other nodes are there: each counts up a number in the store of node 0, and looks at those of the others.

A broken line says nothing: the processes of both sides wait for each other until --ddp_timeout. So each launcher
takes a node whose number stands still for the agreed seconds for lost. Time is measured by the clock
of the one who looks, as those of two nodes differ.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import sys
import threading
import time
import uuid

import psutil
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from sftcore.cli.launch import Place
from sftcore.errors import ConfigError


def wait_for_first_node(place: Place, seconds: float) -> None:
    """Returns once the launcher of node 0 listens.

    Raises:
        ConfigError: It does not within so many seconds.
    """
    begun, is_said = time.monotonic(), False
    while True:
        try:
            with socket.create_connection((place.address, place.port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() - begun > seconds:
                raise ConfigError(
                    f"node 0 does not listen at {place.address}:{place.port} ({error.strerror or error}); expected the "
                    "same MASTER_ADDR and MASTER_PORT on all nodes, and a launcher with NODE_RANK=0"
                ) from error
        if not is_said:
            print(f"waiting for node 0 at {place.address}:{place.port}", file=sys.stderr)
            is_said = True
        time.sleep(1)


def interface_to(address: str, port: int) -> str:
    """Returns the network interface by which this node reaches another one, or on which it is that node itself.

    Left alone, gloo takes the interface of the host name, which on many systems is the loopback.

    Raises:
        ConfigError: There is no way to the address.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # nothing is sent
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={address} cannot be reached from this node ({error.strerror or error}); expected the address "
            "of node 0"
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return str(name)
    raise ConfigError(
        f"no network interface of this node has {own}, by which it reaches MASTER_ADDR={address}; name one with "
        "GLOO_SOCKET_IFNAME"
    )


class NodeWatch(threading.Thread):
    """Says that this node is there, and listens for the others."""

    def __init__(self, place: Place) -> None:
        super().__init__(name="node-watch", daemon=True)
        self.place = place
        self._is_over = threading.Event()
        # a launcher that is started again counts from 1, and must not look like one that stands still
        self._life = uuid.uuid4().hex
        self._others = [node for node in range(place.nodes) if node != place.node]
        self._seen: dict[int, bytes] = {}
        self._heard: dict[int, float] = {}
        self.start_over()

    def run(self) -> None:
        """Counts and looks until it is told to stop; a store that does not answer leaves all others unheard."""
        pause = min(2.0, self.place.seconds / 5)
        store: PrefixStore | None = None
        count = 0
        while not self._is_over.wait(pause):
            count += 1
            try:
                store = store or self._connect()
                store.set(str(self.place.node), f"{self._life} {count}")
                self._look(store)
            except (RuntimeError, OSError):
                store = None  # the next round connects anew

    def _connect(self) -> PrefixStore:
        limit = datetime.timedelta(seconds=max(1.0, self.place.seconds / 3))
        store = TCPStore(
            self.place.address,
            self.place.port,
            is_master=False,
            timeout=limit,
            wait_for_workers=False,
        )
        return PrefixStore("sftcore/nodes", store)

    def _look(self, store: PrefixStore) -> None:
        for node in self._others:
            if not store.check([str(node)]):
                continue
            found = store.get(str(node))
            if found != self._seen.get(node):
                self._seen[node] = found
                self._heard[node] = time.monotonic()

    def start_over(self) -> None:
        """Takes all nodes for heard of now, as they just met."""
        now = time.monotonic()
        self._heard = dict.fromkeys(self._others, now)

    def lost(self) -> int | None:
        """Returns the first node that is silent for too long; node 0 where none can be heard, as it keeps the store."""
        now = time.monotonic()
        silent = [node for node in self._others if now - self._heard[node] > self.place.seconds]
        return min(silent, default=None)

    def stop(self) -> None:
        """Ends the watch; where the store does not answer, the thread ends with the process."""
        self._is_over.set()
        with contextlib.suppress(RuntimeError):
            self.join(timeout=1)
