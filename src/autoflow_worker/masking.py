"""Passwords out of texts that people read: rows, log lines, messages."""

import re

MASK = "***"

# The patterns start at fixed texts and don't look past the next one: linear in the text's length.
_PATTERN = re.compile(
    r"""
    # redis://user:password@host. To the last @ of the word, for an @ or / that should have been
    # percent-encoded; with quotes in it only if there is no @ before them. What a path, a query or
    # a quote ends is a port.
    (?P<url> :// [^\s/:@"'<>]* : )
    (?! \d{1,5} [/?\#"'<>,;)\]}] )
    (?> (?: (?!://) [^\s"'<>] )* @ | (?: (?!://) \S )*? @ )
    |
    # password=..., as in a conninfo or a query; 'password': '...', as in a printed dict or JSON.
    # A quote that another of these follows was never closed.
    (?P<key> (?i: password | passphrase | passwd | pwd )
      (?: [ \t]*=(?!=)[ \t]* | ['"][ \t]*:[ \t]*(?=['"]) ) )
    (?> ' (?: (?! (?i:pass\w{2,6}|pwd) [ ]? = ) (?: [^'\\] | \\. ) )*+ '
      | " (?: (?! (?i:pass\w{2,6}|pwd) [ ]? = ) (?: [^"\\] | \\. ) )*+ "
      | (?: [^\s'"&] | & (?! \w+= ) | ['"] (?! [,:}\])\s] | $ ) )++ )
    """,
    re.VERBOSE | re.DOTALL,
)


def mask_secrets(text: str) -> str:
    """Return the text with every password in a URL, conninfo or printed dict replaced by `***`.

    Where a text can be read in two ways, more of it is masked, not less.
    """
    lower = text.lower()
    # Most texts hold nothing of the kind, and this costs a fifth of the search.
    if "://" not in lower and "pass" not in lower and "pwd" not in lower:
        return text
    return _PATTERN.sub(_masked, text)


def _masked(match: re.Match[str]) -> str:
    if match["url"] is not None:
        return f"{match['url']}{MASK}@"
    return f"{match['key']}{MASK}"
