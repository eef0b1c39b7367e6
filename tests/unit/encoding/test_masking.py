"""No secret gets past `mask_secrets`, and other text does."""

import json
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoflow_worker.encoding.masking import mask_secrets

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
    ("text", "expected"),
    [
        ("token=s3cr3t user=u", "token=*** user=u"),
        ("https://h/d?access_token=s3cr3t&x=1", "https://h/d?access_token=***&x=1"),
        ('{"accessToken": "s3cr3t", "n": 1}', '{"accessToken": ***, "n": 1}'),
        ("{'api_key': 's3cr3t', 'apiKey': 's3'}", "{'api_key': ***, 'apiKey': ***}"),
        ("client_secret='s3cr3t', clientSecret=s3", "client_secret=***, clientSecret=***"),
        ("AWS_SECRET_ACCESS_KEY=s3cr3t", "AWS_SECRET_ACCESS_KEY=***"),
        ("{'private_key': '-----BEGIN\ns3cr3t\n'}", "{'private_key': ***}"),
        ("{'secret_key': 's3', 'SecretKey': 's3'}", "{'secret_key': ***, 'SecretKey': ***}"),
        ("{'pin_token': 123456, 'n': 1}", "{'pin_token': ***, 'n': 1}"),
        ('{"refresh-token":-1.5e3}', '{"refresh-token":***}'),
        ("{'token': b's3 cr3t'}", "{'token': b***}"),
        (r'"{\"token\": \"s3\\\" cr3t\", \"n\": 1}"', r'"{\"token\": ***, \"n\": 1}"'),
        ("Authorization: Basic dTpzM2NyM3Q=", "Authorization: Basic ***"),
        ("{'Authorization': 'Token s3 cr3t'}", "{'Authorization': ***}"),
        ("[(b'authorization', b'Basic s3cr3t')]", "[(b'authorization', b'Basic ***')]"),
        ("curl -H 'authorization: bearer abc' x", "curl -H 'authorization: bearer ***' x"),
        ("sent Bearer eyJhbGciOi.eyJzdWIi.s3-_ to h", "sent Bearer *** to h"),
        ("bearer s3cr3t, bearer abcdefghijklmnop", "bearer ***, bearer ***"),
        ("X-Api-Key: s3cr3t\nHost: h", "X-Api-Key: ***\nHost: h"),
        ("Set-Cookie: sid=s3cr3t; Path=/\nHost: h", "Set-Cookie: ***\nHost: h"),
        ("{'cookie': 'sid=s3cr3t', 'jwt': 'ey'}", "{'cookie': ***, 'jwt': ***}"),
        ("İ token=s3cr3t İ", "İ token=*** İ"),
    ],
)
def test_tokens_and_keys_are_masked(text: str, expected: str) -> None:
    assert mask_secrets(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{'tokens_used': 12, 'token_count': 3, 'max_tokens': 5, 'token_type': 'bearer'}",
        "{'passenger': 'Ann', 'secretary': 'Bob', 'author': 'Eve', 'authorized': 'yes'}",
        "{'correlationId': 'c-1', 'idempotencyKey': 'k-1', 'sort_key': 'name', 'key': 'k'}",
        "{'token': None, 'secret': True, 'cookies': [], 'public_key': 'p', 'access_key_id': 'a'}",
        "tokens_used=12 token_count=3 passenger=Ann secretary=Bob author=Eve key=k",
        "api_key: Field required; token: Input should be a valid string",
        "the bearer of this; Bearer token is missing; Bearer authentication failed",
        "basic plan, authorization: denied, a cookie: sweet",
        "if token == expected:",
        "KeyError: 'token'",
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


KEYS = [
    *("password", "db_password", "token", "access_token", "refreshToken", "apiKey", "api_key"),
    *("x-api-key", "client_secret", "clientSecret", "secret", "secretKey", "private_key"),
    *("Authorization", "cookie", "jwt", "aws_secret_access_key", "PGPASSWORD"),
]


@given(st.sampled_from(KEYS), st.text(max_size=12), st.text(max_size=12), st.integers(0, 3))
@example("token", '"', '"', 3)
@example("token", "'", "", 3)
def test_no_value_of_a_secret_key_is_left(key: str, head: str, tail: str, depth: int) -> None:
    value = f"{head}{SECRET}{tail}"
    assert SECRET not in mask_secrets(str({"a": 1, key: value, "b": 2}))
    text = json.dumps({"a": "x", key: value, "b": ["y"]})
    for _ in range(depth):
        assert SECRET not in mask_secrets(text)
        text = json.dumps({"body": text})


@pytest.mark.parametrize(
    "part",
    [
        "token",
        "token=",
        "token='",
        "token=\\'",
        "token\\\\\\'",
        "token':'",
        "secret_",
        "x-",
        "x-key: ",
        "bearer ",
        "bearer a",
        "cookie:",
        "cookie:a",
        "authorization:",
        "authorization: basic ",
        "\\",
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
@pytest.mark.parametrize(
    "start", ["", "redis://u:", "password=", "password='", "'password' :", "token='"]
)
@pytest.mark.timeout(30)  # Many minutes, if the time grew with the square of the length.
def test_long_texts_take_no_longer_than_they_are(start: str, part: str) -> None:
    mask_secrets(start + part * (200_000 // len(part)))
