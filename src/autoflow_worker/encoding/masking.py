"""Masks passwords, tokens and keys in texts that people read: rows, log lines, messages."""

import re

MASK = "***"

# A secret's key ends with one of these words: client_secret, accessToken, X-Api-Key. A key that
# goes on after the word is not secret: token_count, secretary, author.
_KEY = (
    "password|passphrase|passwd|pwd|token|secret(?:[_-]?key)?|authorization|cookie|jwt|"
    "api[_-]?key|access[_-]?key|auth[_-]?key|encryption[_-]?key|private[_-]?key|signing[_-]?key"
)
# What may precede a secret, in lower case. Each alternative begins with a literal, not with a
# group. Only then does the regex engine skip characters that begin no alternative.
_START = re.compile(rf"://|bearer |x-[a-z-]{{0,30}}(?:key|token|secret)|{_KEY}")
# Every text in which _START matches contains one of these.
_HINTS = (
    *("://", "pass", "pwd", "token", "secret", "key"),
    *("authorization", "cookie", "jwt", "bearer "),
)

# Each pattern is tried directly after a match of _START; its group `shown` stays. No pattern reads
# past the next match, so the time is linear in the text's length.

# user:password@host. The password reaches to the last @ of the word, as an @ or / in it may not be
# percent-encoded. It contains quotes only if no @ precedes them. Digits before a path, a query or a
# quote are a port.
_IN_URL = re.compile(
    r"""
    (?P<shown> [^\s/:@"'<>]* : )
    (?! \d{1,5} [/?\#"'<>,;)\]}] )
    (?> (?: (?!://) [^\s"'<>] )* (?=@) | (?: (?!://) \S )*? (?=@) )
    """,
    re.VERBOSE,
)
# password=..., as in a conninfo or a query; 'password': '...', as in a printed dict or JSON;
# \"password\": \"...\", as in JSON within JSON. A quoted value ends before another such key, as its
# quote was never closed. Numbers are secrets too, but not null, true, lists and objects.
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
# A digit or a length of 16 tells a token from a word, as in "the bearer of this".
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
    """Return the text with `***` in place of every secret.

    A secret is a password in a URL, or the value of a key such as `password`, `api_key`,
    `accessToken`, `client_secret` or `Authorization` in a conninfo, query, printed dict, JSON or
    header. An ambiguous text is masked rather too much than too little.
    """
    lower = text.lower()
    # Most texts hold no secret, and this test takes a tenth of the search's time.
    for hint in _HINTS:
        if hint in lower:
            break
    else:
        return text
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
