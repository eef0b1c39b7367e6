"""Passwords out of texts that people read: rows, log lines, messages."""

import re

MASK = "***"

# Every pattern starts at a fixed text and none looks past the next start, so the time is linear in the text.
_PATTERN = re.compile(
    r"""
    # redis://user:password@host. To the last @ of the word, for an @ or / that should have been percent-encoded; with
    # quotes in it only if there is no @ before them. A port, which a path, query or quote ends, is no password.
    (?P<url> :// [^\s/:@"'<>]* : )
    (?! \d{1,5} [/?\#"'<>,;)\]}] )
    (?> (?: (?!://) [^\s"'<>] )* @ | (?: (?!://) \S )*? @ )
    |
    # password=..., as in a conninfo or a query, and 'password': '...', as in a printed dict or JSON.
    (?P<key> (?i: password | passphrase | passwd | pwd ) (?: [ \t]*=(?!=)[ \t]* | ['"][ \t]*:[ \t]*(?=['"]) ) )
    (?> ' (?: [^'\\] | \\. )*+ ' | " (?: [^"\\] | \\. )*+ "
      | (?: [^\s'"&] | & (?! \w+= ) | ['"] (?! [,:}\])\s] | $ ) )++ )
    """,
    re.VERBOSE | re.DOTALL,
)


def mask_secrets(text: str) -> str:
    """Return the text with every password in a URL, conninfo or printed dict replaced by `***`.

    What looks like a password is one: where a text can be read in two ways, more of it is masked, not less.
    """
    return _PATTERN.sub(_masked, text)


def _masked(match: re.Match[str]) -> str:
    if match["url"] is not None:
        return f"{match['url']}{MASK}@"
    return f"{match['key']}{MASK}"
