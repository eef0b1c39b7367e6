"""Secrets out of texts that are shown or kept."""

import re

# Up to the last @ before a blank or a quote: a raw / ? or @ in a password must not show its rest.
# Bounded, so that no text takes more than linear time; quotes end it, so that a line of JSON
# stays one.
_PASSWORD_IN_URL = re.compile(r"(://[^\s:/@\"']{0,128}:)[^\s\"']{1,512}@")
_PASSWORD_PARAMETER = re.compile(r"([?&](?:ssl)?password=)[^\s\"'&]{1,512}", re.IGNORECASE)

#: No secret that is found is longer: who cuts a text before masking it leaves this much more.
MAX_SECRET_LENGTH = 1_024


def mask_secrets(text: str) -> str:
    """Return the text with the passwords in its URLs replaced by ``***``."""
    if "://" not in text:
        return text
    return _PASSWORD_PARAMETER.sub(r"\1***", _PASSWORD_IN_URL.sub(r"\1***@", text))
