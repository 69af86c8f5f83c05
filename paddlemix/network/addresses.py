"""Addresses on the network: which of them may be asked, and how they are shown.

Knows no connection.  Sources: the special-purpose registries of RFC 6890, and the documents named at each range.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from paddlemix.errors import UserError

# IPv6 addresses that lead to the IPv4 address in their last four bytes.
_CARRIERS = (
    ipaddress.IPv6Network("64:ff9b::/96"),  # RFC 6052, the translators' well-known prefix
    ipaddress.IPv6Network("::ffff:0:0/96"),  # RFC 4291, IPv4-mapped
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291: nothing outside of it belongs to a public machine
_NOT_PUBLIC = (ipaddress.IPv6Network("3fff::/20"),)  # RFC 9637, documentation; Python's table may be older
_LOCAL_NAMES = ("localhost", ".localhost")  # RFC 6761


class LocalAddressError(UserError):
    """An address of this machine or of its network where that is not allowed."""


def is_local(address: str) -> bool:
    """Whether an IP address is anything but a public one of a single machine.

    Args:
        address: IPv4 or IPv6; an IPv6 address that leads to an IPv4 one is judged by that one.

    Returns:
        True for loopback, private, link-local, shared, reserved, documentation, multicast and unspecified addresses,
        and for every IPv6 address outside of 2000::/3 that carries no public IPv4 address: among these are
        64:ff9b:1::/48 (RFC 8215), ::a.b.c.d (RFC 4291), ::ffff:0:a.b.c.d (RFC 2765), 5f00::/16 (RFC 9602) and
        fec0::/10 (RFC 3879).

    Raises:
        ValueError: not an IP address.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_multicast or not ip.is_global
    # judged by the IPv4 address inside: ::ffff:127.0.0.1 is this machine
    if any(ip in network for network in _CARRIERS):
        return is_local(str(ipaddress.IPv4Address(ip.packed[12:])))
    if ip.sixtofour is not None:  # 2002::/16, RFC 3056
        return is_local(str(ip.sixtofour))
    # An allowed list rather than a forbidden one: ranges that are assigned later are refused until they are known.
    return ip not in _GLOBAL_UNICAST or not ip.is_global or any(ip in network for network in _NOT_PUBLIC)


def check_address(url: str, allow_local_network: bool) -> None:
    """Refuses what is not an http(s) address with a host, and a local one where that is not allowed.

    Raises:
        UserError: says why, without the address.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"not an address: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise UserError(f"the scheme '{parts.scheme}' is neither http nor https")
    if not host:
        raise UserError("it names no host")
    if not allow_local_network:
        check_literal(url)


def check_literal(url: str) -> None:
    """Refuses an address that names the local network by number or as localhost.

    This is all that can be checked where a proxy makes the connection.

    Raises:
        LocalAddressError: it does.
    """
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host == _LOCAL_NAMES[0] or host.endswith(_LOCAL_NAMES[1]):
        raise refusal(host, host)
    try:
        local = is_local(host)
    except ValueError:
        try:
            # what the system's resolver accepts as a number must not pass for a name
            address = socket.inet_ntoa(socket.inet_aton(host))  # also 127.1, 0x7f000001 and 2130706433
        except (OSError, UnicodeError):
            return
        local = is_local(address)
    if local:
        raise refusal(host, host)


def refusal(host: str, address: str) -> LocalAddressError:
    """The error about a host with a local address."""
    shown = host if host == address else f"{host} ({address})"
    return LocalAddressError(
        f"{shown} belongs to the local network; set allow_local_network to true if the data may name such addresses"
    )


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: what is secret to one origin is sent to no other."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").rstrip("."), port
