"""Addresses of remote stores, and the passwords in them: the one place that takes them apart and strikes them out."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?P<user>[^/@:]*)(?P<colon>:?)(?P<rest>.*)", re.DOTALL)


class Address(NamedTuple):
    url: str  # without name and password
    user: str = ""
    password: str = ""


def split_address(url: str) -> Address:
    """scheme://user:password@host/folder taken apart; what is percent-encoded in name and password is decoded.

    A password may hold @ and /: it ends at the last @ of the address. (An @ in the folder's name beside a password must
    be written as %40.)
    """
    match = _CREDENTIALS.match(url)
    if not match or "@" not in match["rest"]:
        return Address(url)
    secret, host = match["rest"].rsplit("@", 1)
    authority = match["rest"].split("/", 1)[0]
    if "@" not in authority and (not match["colon"] or authority.isdigit()):
        return Address(url)  # host or host:port, and an @ in the folder's name
    if not match["colon"]:  # a name alone
        return Address(match["scheme"] + host, unquote(match["user"] + secret))
    return Address(match["scheme"] + host, unquote(match["user"]), unquote(secret))


def without_passwords(text: str, *secrets: str) -> str:
    """`text` with the passwords of addresses in it, and `secrets`, struck out. For whatever is shown or kept."""
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    if "://" not in text or "@" not in text:
        return text
    return re.sub(r"\S+://\S*@\S*", lambda found: _shown(found.group()), text)


def _shown(url: str) -> str:
    start = re.search(r"[a-zA-Z][\w+.-]*://", url)  # behind --fs_name=
    url, before = (url[start.start() :], url[: start.start()]) if start else (url, "")
    address = split_address(url)
    return before + (address.url if address.url == url else address.url.replace("://", f"://{address.user}:***@", 1))
