"""Lists the open sockets of processes on Linux, and code that gives a process another host name."""

import contextlib
import ipaddress
import struct
from pathlib import Path

LISTENS, UNCONNECTED = "0A", "07"  # of TCP; of UDP

# Gives a process and its children a host name that resolves to an address that is not loopback, or to none. Does
# nothing if that is not permitted.
RENAMED = """
import ctypes
import fcntl
import socket
import struct

libc = ctypes.CDLL(None, use_errno=True)
if socket.gethostname() != {name!r} and libc.unshare(0x44000000) == 0:  # CLONE_NEWUTS | CLONE_NEWNET
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
        address = struct.pack("16sH2x4s8x", b"lo:1", socket.AF_INET, socket.inet_aton("192.0.2.7"))
        fcntl.ioctl(any_socket, 0x8916, address)  # SIOCSIFADDR
    socket.sethostname({name!r})
"""


def listening(pid):
    """Returns addresses and ports at which a process listens: TCP and UDP, IPv4 and IPv6; none if it has ended."""
    inodes, found = set(), []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                inodes.add(link.readlink().name)
    for table, state in (("tcp", LISTENS), ("tcp6", LISTENS), ("udp", UNCONNECTED), ("udp6", UNCONNECTED)):
        for line in _read_table(pid, table):
            fields = line.split()
            if fields[3] == state and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found.append((_address(address), int(port, 16)))
    return found


def _read_table(pid, table):
    """Returns the lines of a table of the kernel; none if the process has ended or there is no such table."""
    try:
        return Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _address(text):
    """Parses an address of the kernel's table: 32-bit words, each in the machine's byte order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return getattr(address, "ipv4_mapped", None) or address


def exposed(pids):
    """Returns pid, address and port where any of the processes listens at an address that is not loopback."""
    return [(pid, str(address), port) for pid in pids for address, port in listening(pid) if not address.is_loopback]
