"""Where a server is, and what it wants to be told before it answers."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field

import httpx

from rlheals.errors import UserError

KEYS = ("VLLM_API_KEY", "OPENAI_API_KEY")
"""Environment variables that hold the server's API key; the first that is set counts."""

MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """The address of an API.

    Attributes:
        url: up to and with the version, no slash at the end.
        loopback: the server is on this machine.
        key: API key; empty where none is set. It is in no message and no ``repr``.
    """

    url: str
    loopback: bool
    key: str = field(default="", repr=False)


def address_of(text: str) -> Address:
    """The API behind ``inference.engine``, with the key from the environment.

    ``/v1`` is added where the path does not end in a version.

    >>> address_of("http://localhost:8000").url
    'http://localhost:8000/v1'
    >>> address_of("https://host/team/v2/").url
    'https://host/team/v2'

    Raises:
        UserError: it is no http or https address, holds more than host, port and path, or the key is no key.
    """
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise UserError(f"inference.engine is no web address with a host and a port; {_EXAMPLE}.") from None
    # The address itself is shown only where it cannot hold a password.
    if url.userinfo or url.query or url.fragment:
        raise UserError(
            "inference.engine holds a user name, password, query or fragment, which would be kept with every result; "
            f"give the key in the environment variable {KEYS[0]}, and {_EXAMPLE}."
        )
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > MAX_PORT:
        raise UserError(f"inference.engine is {text!r}, which is not an http or https address; {_EXAMPLE}.")
    path = url.path.rstrip("/")
    versioned = path if re.search(r"/v\d+$", path) else f"{path}/v1"
    return Address(str(url.copy_with(path=versioned)), _is_loopback(url.host), _key())


_EXAMPLE = "write one such as http://host:8000/v1"


def _is_loopback(host: str) -> bool:
    """Whether a host name or number means this machine."""
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return number.is_loopback or number.is_unspecified


def _key() -> str:
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    if name is None:
        return ""
    key = os.environ[name].strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"the environment variable {name} holds blanks or characters no API key has; set it again.")
    return key
