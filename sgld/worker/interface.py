"""Which network interface of this machine leads to another one."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # netdevice(7): the IPv4 address of an interface, in struct ifreq
_IFREQ = "16s24x"
_ADDRESS = slice(20, 24)


def interface_to(host: str, port: int) -> str | None:
    """Name the interface whose first IPv4 address is the source of packets to `host`; None if there is none.

    Raises OSError where `host` is unknown or no route leads there.
    """
    address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack(_IFREQ, name.encode()))
            except OSError:  # it has no such address
                continue
            if answer[_ADDRESS] == own:
                return name
    return None
