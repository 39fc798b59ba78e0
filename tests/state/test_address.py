"""A store's URL: everything it may say, and errors that name the part and repeat no secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.redis.address import Address, BadStoreUrl, Credentials, Deployment, Host, Tls, parse_url
from tests.servers import make_certificates

HERE = (Host("h", 6379),)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address(Deployment.SERVER, HERE)),
        ("valkey://h/3", Address(Deployment.SERVER, HERE, database=3)),
        ("redis://[::1]:7000/", Address(Deployment.SERVER, (Host("::1", 7000),))),
        ("redis://:p%40s%2Fs@h", Address(Deployment.SERVER, HERE, login=Credentials(None, "p@s/s"))),
        ("redis://u:p:q@h", Address(Deployment.SERVER, HERE, login=Credentials("u", "p:q"))),
        (
            "redis://u@h?password_file=/run/p",
            Address(Deployment.SERVER, HERE, login=Credentials("u", None, Path("/run/p"))),
        ),
        ("rediss://h", Address(Deployment.SERVER, HERE, tls=Tls())),
        ("valkeys://h?tls_insecure=yes", Address(Deployment.SERVER, HERE, tls=Tls(insecure=True))),
        (
            "rediss://h?tls_ca=/a.pem&tls_certificate=/c.pem&tls_key=/k.pem",
            Address(Deployment.SERVER, HERE, tls=Tls(Path("/a.pem"), Path("/c.pem"), Path("/k.pem"))),
        ),
        ("unix:///run/r.sock", Address(Deployment.SOCKET, path=Path("/run/r.sock"))),
        (
            "unix://u:p@/run/r%20s?db=2",
            Address(Deployment.SOCKET, path=Path("/run/r s"), database=2, login=Credentials("u", "p")),
        ),
        (
            "redis+sentinel://u:p@a,b:7/main?sentinel_password=s",
            Address(
                Deployment.SENTINEL,
                (Host("a", 26379), Host("b", 7)),
                service="main",
                login=Credentials("u", "p"),
                sentinel_login=Credentials(None, "s"),
            ),
        ),
        (
            "rediss+sentinel://a/main/1",
            Address(Deployment.SENTINEL, (Host("a", 26379),), service="main", database=1, tls=Tls()),
        ),
        ("redis+cluster://a:1,b", Address(Deployment.CLUSTER, (Host("a", 1), Host("b", 6379)))),
        ("rediss+cluster://h/0", Address(Deployment.CLUSTER, HERE, tls=Tls())),
    ],
)
def test_what_a_url_says(url: str, address: Address) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://h", "must begin with redis://"),
        ("redis+file://h", "must begin with redis://"),
        ("redis:h", "has no host"),
        ("redis://", "has no host"),
        ("redis://:p@", "has no host"),
        ("redis://h:port", "cannot be read"),
        ("redis://h:0", "1 to 65535"),
        ("redis://h:70000", "1 to 65535"),
        ("redis://[::1", "cannot be read"),
        ("redis://a,b", r"redis\+cluster"),
        ("redis://h/one", "a number such as 0"),
        ("redis://h/-1", "a number such as 0"),
        ("redis://h/0/1", "/DATABASE"),
        ("redis://u@h", "a user without a password"),
        ("redis://u:p@h?password_file=/p", "give one of them"),
        ("redis://h?tls_ca=/a", "begin the URL with rediss"),
        ("redis://h?sentinel_password=x", r"only with redis\+sentinel"),
        ("rediss://h?tls_certifcate=/c", "unknown option 'tls_certifcate'; did you mean tls_certificate"),
        ("rediss://h?zzz=1", "there are password_file, tls_ca"),
        ("rediss://h?tls_certificate=/c", "give both or neither"),
        ("rediss://h?tls_insecure=maybe", "yes or no"),
        ("rediss://h?tls_insecure=yes&tls_ca=/a", "give one of them"),
        ("rediss://h?tls_ca=", "given once, with a value"),
        ("rediss://h?tls_ca=/a&tls_ca=/b", "given once, with a value"),
        ("rediss://h?tls_ca", "name=value"),
        ("unix://run/r.sock", "absolute path"),
        ("unix:///", "absolute path"),
        ("unix:///r.sock?db=x", "a number such as 0"),
        ("redis+sentinel://a", "the service's name"),
        ("redis+sentinel://a/main/0/1", "the service's name"),
        ("redis+cluster://a/1", "database 0 only"),
    ],
)
def test_a_wrong_url_is_told_what_is_wrong(url: str, told: str) -> None:
    with pytest.raises(BadStoreUrl, match=told):
        parse_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:hush/hush@h",
        "redis://u:hush?hush@h",
        "redis://u:hush#hush@h",
        "redis://:hush[hush@h",
        "redis://:hush@h:hush",
        "redis://:hush@h/hush",
        "redis://:hush@h?hush",
        "hush://hush",
        "unix://:hush@hush/hush",
    ],
)
def test_no_error_repeats_what_may_be_a_password(url: str) -> None:
    with pytest.raises(BadStoreUrl) as caught:
        parse_url(url)
    assert "hush" not in str(caught.value)


@given(
    st.text(), st.sampled_from(["redis://", "rediss://", "unix://", "redis+sentinel://", "redis+cluster://", ""])
)
def test_any_text_is_read_or_refused(text: str, scheme: str) -> None:
    try:
        address = parse_url(scheme + text)
    except BadStoreUrl:
        return
    assert isinstance(address, Address)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:hush@h:1/2",
        "rediss://:hush@[::1]:1/0",
        "unix://:hush@/run/s?db=1",
        "redis+sentinel://u:hush@a:1,b:2/main/3?sentinel_password=hush",
        "rediss+cluster://:hush@a:1,b:2",
    ],
)
def test_an_address_is_shown_without_secrets_and_reads_back(url: str) -> None:
    address = parse_url(url)
    assert "hush" not in str(address) + repr(address)
    again = parse_url(str(address))
    assert (again.deployment, again.hosts, again.path, again.service, again.database) == (
        address.deployment,
        address.hosts,
        address.path,
        address.service,
        address.database,
    )


def test_files_are_checked_before_they_are_needed(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    parse_url("redis://h").check_files()
    parse_url(
        f"rediss://h?tls_ca={made.authority}&tls_certificate={made.client_certificate}&tls_key={made.client_key}"
    ).check_files()
    for query, told in (
        (f"tls_ca={tmp_path}/none", "tls_ca: .*No such file"),
        (f"tls_ca={made.client_key}", "tls_ca: "),
        (f"tls_certificate={made.client_certificate}&tls_key={made.key}", "tls_certificate and tls_key: "),
        (f"password_file={tmp_path}/none", "password_file: .*No such file"),
    ):
        with pytest.raises(BadStoreUrl, match=told):
            parse_url(f"rediss://h?{query}").check_files()
