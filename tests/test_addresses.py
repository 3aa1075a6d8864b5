# SPDX-License-Identifier: Apache-2.0
"""HARDENING rows 1-3 as far as a URL and an address can be judged without dialling."""

from __future__ import annotations

import pytest

from dynamo_epd.errors import UrlNotAllowed
from dynamo_epd.images.addresses import check_address, check_url
from dynamo_epd.images.config import MediaConfig

STRICT = MediaConfig()
OPEN = MediaConfig(allow_http=True, allow_private=True)

REFUSED_HOSTS = {
    "loopback": "127.0.0.1",
    "loopback, elsewhere in the block": "127.8.9.10",
    "private 10": "10.0.0.1",
    "private 172": "172.31.255.255",
    "private 192": "192.168.1.1",
    "link-local": "169.254.1.1",
    "metadata": "169.254.169.254",
    "metadata of Alibaba": "100.100.100.200",
    "metadata of Azure": "168.63.129.16",
    "shared, RFC 6598": "100.64.0.1",
    "unspecified": "0.0.0.0",
    "this network": "0.1.2.3",
    "multicast": "224.0.0.1",
    "broadcast": "255.255.255.255",
    "reserved": "240.0.0.1",
    "benchmark": "198.18.0.1",
    "documentation": "203.0.113.7",
    "6to4 relay": "192.88.99.1",
    "decimal": "2130706433",
    "hex": "0x7f000001",
    "hex, upper": "0X7F000001",
    "hex parts": "0x7f.0x0.0x0.0x1",
    "octal": "017700000001",
    "octal parts": "0177.0.0.1",
    "mixed parts": "0x7f.0.0.01",
    "short form": "127.1",
    "short form of three": "127.0.1",
    "zero alone": "0",
    "hex without digits": "0x",
    "root dot": "127.0.0.1.",
    "full-width digits": "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
    "full-width dots": "127\uff0e0\uff0e0\uff0e1",
    "ideographic full stops": "127\u30020\u30020\u30021",
    "circled digits": "\u2460\u2461\u2466.0.0.1",
    "full-width localhost": "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54",
    "percent-encoded": "%31%32%37.0.0.1",
    "IPv6 loopback": "[::1]",
    "IPv6 loopback, long": "[0:0:0:0:0:0:0:1]",
    "IPv6 unspecified": "[::]",
    "IPv6 link-local": "[fe80::1]",
    "IPv6 with a zone": "[fe80::1%25eth0]",
    "IPv6 unique-local": "[fd12:3456::1]",
    "IPv6 metadata": "[fd00:ec2::254]",
    "IPv6 site-local": "[fec0::1]",
    "IPv6 multicast": "[ff02::1]",
    "IPv6 documentation": "[2001:db8::1]",
    "mapped loopback": "[::ffff:127.0.0.1]",
    "mapped loopback in hex": "[::ffff:7f00:1]",
    "mapped public": "[::ffff:8.8.8.8]",
    "compatible loopback": "[::127.0.0.1]",
    "translated": "[::ffff:0:127.0.0.1]",
    "NAT64": "[64:ff9b::127.0.0.1]",
    "NAT64 of a public address": "[64:ff9b::808:808]",
    "local-use NAT64": "[64:ff9b:1::7f00:1]",
    "6to4": "[2002:7f00:1::]",
    "Teredo": "[2001:0:4136:e378:8000:63bf:3fff:fdd2]",
    "localhost": "localhost",
    "localhost, any case": "LocalHost",
    "localhost with root dot": "localhost.",
    "below localhost": "a.localhost",
    "localhost.localdomain": "localhost.localdomain",
    "one label": "redis",
    "metadata name": "metadata.google.internal",
    "metadata name, short": "metadata",
    "metadata name, root dot and case": "Metadata.Google.Internal.",
    "cluster name": "api.default.svc.cluster.local",
    "cluster name, short": "nats.default.svc",
    "mDNS name": "printer.local",
    "empty": "",
    "empty label": "a..example.com",
    "too long": "a" * 64 + ".example.com",
    "space": "exa mple.com",
    "five numbers": "1.1.1.1.1",
    "number over 255": "1.1.1.256",
}


@pytest.mark.parametrize("host", REFUSED_HOSTS.values(), ids=REFUSED_HOSTS)
def test_a_host_inside_or_in_disguise_is_refused(host: str) -> None:
    for scheme, media in (("https", STRICT), ("http", MediaConfig(allow_http=True))):
        with pytest.raises(UrlNotAllowed) as caught:
            check_url(f"{scheme}://{host}/a.png", media)
        assert caught.value.status == 400 and caught.value.code == "url_not_allowed"
        assert not host or host not in caught.value.message


REFUSED_URLS = {
    "file": "file:///etc/passwd",
    "bare path": "/etc/passwd",
    "relative path": "a.png",
    "ftp": "ftp://example.com/a.png",
    "gopher": "gopher://example.com/_",
    "javascript": "javascript:alert(1)",
    "unix socket": "unix:///run/docker.sock",
    "scheme-relative": "//example.com/a.png",
    "http when only https is allowed": "http://example.com/a.png",
    "user": "https://user@example.com/",
    "user and password": "https://user:secret@example.com/",
    "userinfo that looks like a host": "https://example.com@127.0.0.1/",
    "empty userinfo": "https://@example.com/",
    "CR LF": "https://example.com/\r\nHost: evil",
    "LF in the host": "https://exam\nple.com/",
    "tab": "https://exam\tple.com/",
    "NUL": "https://example.com/\x00",
    "DEL": "https://example.com/\x7f",
    "leading space": " https://example.com/",
    "backslash": "https://example.com\\@127.0.0.1/",
    "port of ssh": "https://example.com:22/",
    "port of etcd": "https://example.com:2379/",
    "port zero": "https://example.com:0/",
    "port too high": "https://example.com:65536/",
    "port not a number": "https://example.com:abc/",
    "negative port": "https://example.com:-1/",
    "unclosed bracket": "https://[::1/",
    "bad bracket": "https://[v1.x]/",
    "no host": "https:///a.png",
    "empty": "",
    "too long": "https://example.com/" + "a" * 9000,
}


@pytest.mark.parametrize("url", REFUSED_URLS.values(), ids=REFUSED_URLS)
def test_a_url_outside_the_rules_is_refused(url: str) -> None:
    with pytest.raises(UrlNotAllowed):
        check_url(url, STRICT)


def test_a_url_keeps_the_case_of_its_path_and_loses_its_fragment() -> None:
    target = check_url("HTTPS://Images.Example.COM./A/b%20C.png?Q=1#part", STRICT)
    assert (target.scheme, target.host, target.port, target.path) == (
        "https",
        "images.example.com",
        443,
        "/A/b%20C.png?Q=1",
    )
    assert target.authority == "images.example.com"


def test_names_and_paths_in_other_alphabets_are_encoded() -> None:
    target = check_url("https://b\u00fccher.example/\u00e4 b?\u00f6".replace(" ", "%20"), STRICT)
    assert (target.host, target.path) == ("xn--bcher-kva.example", "/%C3%A4%20b?%C3%B6")


@pytest.mark.parametrize("text", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111"])
def test_a_public_address_may_be_dialled(text: str) -> None:
    assert str(check_address(text, STRICT)) == text
    host = f"[{text}]" if ":" in text else text
    assert check_url(f"https://{host}/", STRICT).host == text


@pytest.mark.parametrize("text", ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.9", "100.64.1.1", "::1", "fd12::1"])
def test_private_addresses_open_by_configuration_only(text: str) -> None:
    assert str(check_address(text, OPEN)) == text
    with pytest.raises(UrlNotAllowed):
        check_address(text, STRICT)


@pytest.mark.parametrize(
    "text",
    ["169.254.169.254", "100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fe80::1", "0.0.0.0", "::", "224.0.0.1",
     "ff02::1", "255.255.255.255", "64:ff9b::7f00:1", "2002:7f00:1::", "::ffff:127.0.0.1", "not an address"],
)  # fmt: skip
def test_some_addresses_stay_shut_even_when_private_ones_are_open(text: str) -> None:
    with pytest.raises(UrlNotAllowed):
        check_address(text, OPEN)


def test_private_names_and_ports_open_with_private_addresses() -> None:
    assert check_url("http://localhost:8123/a", OPEN).port == 8123
    assert check_url("http://images:9000/a", OPEN).authority == "images:9000"
    assert check_url("http://[::1]:8123/a", OPEN).authority == "[::1]:8123"
    for host in ("metadata", "metadata.google.internal", "127.1", "2130706433", "0177.0.0.1"):
        with pytest.raises(UrlNotAllowed):
            check_url(f"http://{host}/", OPEN)


def test_only_allowed_hosts_pass_when_there_are_any() -> None:
    media = MediaConfig(allowed_hosts=("Images.example.com", "*.cdn.example"))
    assert check_url("https://images.EXAMPLE.com:8443/", media).port == 8443
    assert check_url("https://a.b.cdn.example/", media).host == "a.b.cdn.example"
    for host in ("example.com", "cdn.example", "evilcdn.example", "images.example.com.evil.test", "8.8.8.8"):
        with pytest.raises(UrlNotAllowed):
            check_url(f"https://{host}/", media)


def test_an_allowed_host_does_not_open_private_addresses() -> None:
    with pytest.raises(UrlNotAllowed):
        check_url("https://127.0.0.1/", MediaConfig(allowed_hosts=("127.0.0.1",)))


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "max_images", "timeout"])
def test_a_bound_of_nothing_is_a_mistake_in_the_configuration(name: str) -> None:
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        MediaConfig(**{name: 0})  # type: ignore[arg-type]
