"""No password gets past `mask_secrets`, and other text does."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoflow_worker.masking import mask_secrets

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://user:s3cr3t@host:6379/0", "redis://user:***@host:6379/0"),
        ("redis://:s3cr3t@host", "redis://:***@host"),
        ("postgresql://u:p%40s3cr3t@h/db", "postgresql://u:***@h/db"),
        ("rediss://u:s3@cr3t@h.example", "rediss://u:***@h.example"),
        ("postgresql://u:s3/cr3t@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:s3?cr#3t@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:s3'cr\"3t@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:12345@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:pw@h1:5432,h2:5433/db", "postgresql://u:***@h1:5432,h2:5433/db"),
        ("redis://a:pw@x,redis://b:pw2@y", "redis://a:***@x,redis://b:***@y"),
        ("connect to 'redis://u:pw@h' failed", "connect to 'redis://u:***@h' failed"),
        ("<redis://u:pw@h>, (amqp://u:pw@h)", "<redis://u:***@h>, (amqp://u:***@h)"),
        ("https://u:@host", "https://u:***@host"),
        ("host=h password=s3cr3t dbname=d", "host=h password=*** dbname=d"),
        ("host=h password = 's3 cr\\'3t' user=u", "host=h password = *** user=u"),
        ('password="s3 cr3t", host="h"', 'password=***, host="h"'),
        ("password='s3cr3t never closed", "password=*** never closed"),
        ("password=s3'cr3t\"x user=u", "password=*** user=u"),
        ("password=s3&cr3t user=u", "password=*** user=u"),
        ("postgresql://h/d?user=u&password=s3cr3t&sslmode=on", None),
        ("PGPASSWORD=s3cr3t sslpassword=s3cr3t", "PGPASSWORD=*** sslpassword=***"),
        ("passwd=a pwd=b passphrase=c", "passwd=*** pwd=*** passphrase=***"),
        ("{'password': 's3cr3t', 'user': 'u'}", "{'password': ***, 'user': 'u'}"),
        ('{"password":"s3\\"cr3t","user":"u"}', '{"password":***,"user":"u"}'),
    ],
)
def test_passwords_are_masked(text: str, expected: str | None) -> None:
    expected = expected or "postgresql://h/d?user=u&password=***&sslmode=on"
    assert mask_secrets(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words",
        "redis://host:6379/0",
        "redis://user@host/0",
        "https://example.com:8080/users/a@b.example?x=c:d@e",
        "https://example.com/a:b@c",
        '{"url":"redis://h:6379","mail":"a@b"}',
        "a://b",
        "mail me: x:y@z",
        "the password is wrong",
        "password: at least 8 characters",
        "if password == expected:",
        'FATAL:  password authentication failed for user "u"',
        "10:20 user@host",
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    assert mask_secrets(text) == text


words = st.text(string.ascii_letters + string.digits + "-._~!$&()*+,;=%@/?#[]|^{}", max_size=12)
# Whatever surrounds it must not bring it to light.
around = st.lists(st.sampled_from([*"ab:/@'\" \n=&\\,?", "://", "password="]), max_size=6).map(
    "".join
)


@given(around, words, words, around)
@example("", "1/", "", "")
def test_no_password_of_a_url_is_left(before: str, head: str, tail: str, after: str) -> None:
    masked = mask_secrets(f"{before} redis://user:x{head}{SECRET}{tail}@host/0 {after}")
    assert SECRET not in masked


@given(around, words, words, around)
def test_no_password_of_a_conninfo_is_left(before: str, head: str, tail: str, after: str) -> None:
    # An & and a name look like a query's next part; what goes before is masked.
    head = head.replace("&", "+")
    for value in (f"x{head}{SECRET}{tail}", f"'x {head}{SECRET}{tail}'"):
        masked = mask_secrets(f"{before} host=h password={value} {after}")
        assert SECRET not in masked


@pytest.mark.parametrize(
    "part",
    [
        "a",
        "p",
        "://",
        "://x:",
        "://x:'",
        "password=",
        "password='",
        "password=&a",
        "passw",
        "passw ",
        "@",
        '"\\',
        " ",
    ],
)
@pytest.mark.parametrize("start", ["", "redis://u:", "password=", "password='", "'password' :"])
@pytest.mark.timeout(20)  # Hours, if the time grew with the square of the length.
def test_long_texts_take_no_longer_than_they_are(start: str, part: str) -> None:
    mask_secrets(start + part * (1_000_000 // len(part)))
