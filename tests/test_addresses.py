"""Which addresses are anyone's, how a host may spell one, and what becomes of URLs on their way there."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from stages.addresses import MOST_LETTERS, Refused, checked_url, is_public, literal_address


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("64:ff9b::5db8:d70e", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("fec0::1", False),
        ("::7f00:1", False),
        ("2001:0:0:0:0:0:80ff:fffe", False),
        ("2002:7f00:1::", False),
        ("::ffff:10.0.0.1", False),
        ("100.100.100.200", False),
        ("168.63.129.16", False),
        ("192.168.0.1", False),
        ("172.16.5.4", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("ff02::1", False),
        ("::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("::1", "::1"),
        ("pictures.example", None),
        ("1.2.3.4.5", None),
        ("", None),
    ],
)
def test_how_a_host_may_spell_an_address(host: str, address: str | None) -> None:
    assert str(literal_address(host)) == str(address)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (" http://Pictures.example/a b.jpg ", "http://pictures.example/a%20b.jpg"),
        ("https://me:secret@pictures.example/a#part", "https://pictures.example/a"),
        ("http://bücher.example/ü.jpg", "http://xn--bcher-kva.example/%C3%BC.jpg"),
        ("http://pictures.example:8080/?q=1", "http://pictures.example:8080/?q=1"),
    ],
)
def test_what_a_url_is_asked_as(text: str, asked: str) -> None:
    assert str(checked_url(text)) == asked


def test_a_url_from_a_redirect_stands_beside_the_one_before() -> None:
    base = URL("https://pictures.example/a/b.jpg")
    assert str(checked_url("../c.jpg", base=base)) == "https://pictures.example/c.jpg"
    assert str(checked_url("//other.example/d", base=base)) == "https://other.example/d"


@pytest.mark.parametrize("port", [1, 22, 25, 110, 143, 587, 993, 1023])
def test_only_web_servers_are_asked(port: int) -> None:
    with pytest.raises(Refused, match="bad_port"):
        checked_url(f"http://pictures.example:{port}/")
    assert checked_url(f"http://pictures.example:{port}/", allow_private_hosts=True).port == port


def test_a_url_may_be_only_so_long() -> None:
    with pytest.raises(Refused, match="bad_url"):
        checked_url("http://pictures.example/" + "a" * MOST_LETTERS)


@given(
    st.one_of(st.text(), st.from_regex(r"(https?|file|ftp)?:?/{0,3}[^/]{0,20}@?[\[\]:.\d%]{0,20}/?.*", fullmatch=True))
)
def test_any_text_is_a_url_or_refused(text: str) -> None:
    try:
        url = checked_url(text)
    except Refused as refused:
        assert refused.reason in ("bad_url", "bad_scheme", "bad_port", "blocked_address")
    else:
        assert url.scheme in ("http", "https") and url.raw_host and url.user is None
        address = literal_address(url.raw_host.rstrip("."))
        assert address is None or is_public(address)


@given(st.ip_addresses(v=4))
def test_what_is_public_the_standard_library_calls_global(address: ipaddress.IPv4Address) -> None:
    assert address.is_global or not is_public(address)
    assert is_public(ipaddress.IPv6Address(f"::ffff:{address}")) is is_public(address)
