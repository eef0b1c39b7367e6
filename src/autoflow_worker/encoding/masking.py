"""Passwords, tokens and keys out of texts that people read: rows, log lines, messages."""

import re

MASK = "***"

# A key ends with one of these: client_secret, accessToken, X-Api-Key. A longer word does not:
# token_count, secretary, author.
_KEY = (
    "password|passphrase|passwd|pwd|token|secret(?:[_-]?key)?|authorization|cookie|jwt|"
    "api[_-]?key|access[_-]?key|auth[_-]?key|encryption[_-]?key|private[_-]?key|signing[_-]?key"
)
# What a secret may stand behind, in a text of lower case. Each alternative begins with a letter of
# its own, not with a group: only then does the search skip what begins no alternative.
_START = re.compile(rf"://|bearer |x-[a-z-]{{0,30}}(?:key|token|secret)|{_KEY}")
# One of these is in every text that _START finds something in.
_HINTS = (
    *("://", "pass", "pwd", "token", "secret", "key"),
    *("authorization", "cookie", "jwt", "bearer "),
)

# Each is tried where _START has found what it stands behind; its group `shown` is left. None looks
# past the next such place, so the time is linear in the text's length.

# user:password@host. To the last @ of the word, for an @ or / that should have been
# percent-encoded; with quotes in it only if there is no @ before them. What a path, a query or a
# quote ends is a port.
_IN_URL = re.compile(
    r"""
    (?P<shown> [^\s/:@"'<>]* : )
    (?! \d{1,5} [/?\#"'<>,;)\]}] )
    (?> (?: (?!://) [^\s"'<>] )* (?=@) | (?: (?!://) \S )*? (?=@) )
    """,
    re.VERBOSE,
)
# password=..., as in a conninfo or a query; 'password': '...', as in a printed dict or JSON, or
# \"password\": \"...\", as in JSON inside of JSON. A quote that another of these follows was never
# closed. Numbers are secrets too; null, true, lists and objects are not.
_OF_KEY = re.compile(
    rf"""
    (?P<shown> (?: [ \t]*=(?!=)[ \t]* | \\{{0,3}}['"][ \t]*:[ \t]*(?=b?\\{{0,3}}['"]|-?\d) )
      (?: b(?=['"]) )? )
    (?> ' (?: (?! (?i:{_KEY}) [ ]? = ) (?: [^'\\] | \\. ) )*+ '
      | " (?: (?! (?i:{_KEY}) [ ]? = ) (?: [^"\\] | \\. ) )*+ "
      | \\{{1,3}}(?P<quote>['"])
        (?: (?!(?P=quote)) [^\\] | \\(?!(?P=quote)|\\). | \\\\(?:\\.|[^\\]) )*+
        (?: \\(?P=quote) )?
      | -? \d [\w.+-]*+ (?= [,}}\])\s] | $ )
      | (?: [^\s'"&] | & (?! \w+= ) | ['"] (?! [,:}}\])\s] | $ ) )++ )
    """,
    re.VERBOSE | re.DOTALL,
)
# Authorization: Basic ..., also as a pair of strings or bytes.
_OF_AUTHORIZATION = re.compile(
    r"""
    (?P<shown> ['"]? [ ]* [:,] [ ]* b? ['"]? (?i: apikey | basic | bearer | token ) [ ]+ )
    [^\s'",;\\]++
    """,
    re.VERBOSE,
)
_OF_COOKIE = re.compile(r"(?P<shown>[ ]*:[ ]*)(?=[^\s=;:'\"]{1,64}=)[^\r\n'\"\\]++")
_OF_HEADER = re.compile(r"(?P<shown>[ ]*:[ ]*)[^\s'\",;\\]++")
# "The bearer of this" goes on in words: a digit or a length tells a token.
_OF_BEARER = re.compile(
    r"(?P<shown>[ ]*)(?=[\w.~+/=-]{0,63}\d|[\w.~+/=-]{16})[\w.~+/=-]++", re.ASCII
)

_RULES = {
    "://": (_IN_URL,),
    "bearer ": (_OF_BEARER,),
    "authorization": (_OF_KEY, _OF_AUTHORIZATION),
    "cookie": (_OF_KEY, _OF_COOKIE),
}
_ASCII_LOWER = {ord(upper): upper.lower() for upper in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def mask_secrets(text: str) -> str:
    """Return the text with every secret in it replaced by `***`.

    A secret is a password in a URL, or what stands under a key such as `password`, `api_key`,
    `accessToken`, `client_secret` or `Authorization` in a conninfo, query, printed dict, JSON or
    header. Where a text can be read in two ways, more of it is masked, not less.
    """
    lower = text.lower()
    # Most texts hold nothing of the kind, and this costs a tenth of the search.
    for hint in _HINTS:
        if hint in lower:
            return _masked(text, lower)
    return text


def _masked(text: str, lower: str) -> str:
    if len(lower) != len(text):  # İ has two characters in lower case
        lower = text.translate(_ASCII_LOWER)
    parts: list[str] = []
    end = 0
    for start in _START.finditer(lower):
        if start.start() < end:
            continue
        word = start[0]
        rules = (_OF_KEY, _OF_HEADER) if word.startswith("x-") else _RULES.get(word, (_OF_KEY,))
        for rule in rules:
            if secret := rule.match(text, start.end()):
                parts += (text[end : secret.end("shown")], MASK)
                end = secret.end()
                break
    return "".join((*parts, text[end:])) if parts else text
