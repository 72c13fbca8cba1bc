"""File names made from ids, and the inverse.

Ids come from users: they may hold separators, ``..``, any script, or differ in upper and lower case only. A name made
here is unique for its id on every file system, safe on every system, and readable where the id is:

    utt1        -> utt1.wav
    a/2         -> a%2F2.wav
    LJ001-0001  -> LJ001-0001+3.wav

Letters, digits, ``_``, ``-`` and ``.`` are kept; every other byte of the id's UTF-8 is percent-encoded as in URLs.
``+`` is followed by a hexadecimal mask of the capital letters, so that names differ on file systems that ignore case;
``@`` by the number of one of several results. An id whose name would be too long is cut and followed by ``~`` and its
hash: such a name has no inverse, its record has the id.
"""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote, unquote

#: File systems allow 255 bytes (some encrypted ones 143 of any script); temporary names add some to a name.
MAX_BYTES = 200
_HASH_DIGITS = 32
#: Names that Windows keeps for devices, whatever follows the first dot.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)


def file_name(item_id: str, suffix: str = "", *, number: int = 1) -> str:
    """A file name for an id: unique even if case is ignored, without separators, at most 200 bytes.

    Args:
        item_id: any string.
        suffix: end of the name, such as ``.wav``; short and plain ASCII.
        number: number of one of several files of the id; 1 adds nothing to the name.
    """
    # A leading dot hides a file, two are a folder, and Windows drops a final one; a leading dash is an option.
    stem = quote(item_id, safe="", errors="surrogatepass").replace("~", "%7E")
    stem = re.sub(r"\A\.|\.(?=\.|\Z)", "%2E", stem)
    if stem.startswith("-") or _RESERVED.match(stem):
        stem = f"%{ord(stem[0]):02X}{stem[1:]}"
    letters = re.findall("[A-Za-z]", re.sub("%..", "", stem))
    capitals = sum(letter.isupper() << place for place, letter in enumerate(letters))
    end = f"@{number}{suffix}" if number != 1 else suffix
    name = (stem or "%") + (f"+{capitals:x}" if capitals else "") + end
    if len(name) <= MAX_BYTES:
        return name
    digest = hashlib.sha256(item_id.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    head = stem[: MAX_BYTES - len(end) - len(digest) - 1]
    return f"{re.sub('%.?$', '', head)}~{digest}{end}"


def id_of(name: str, suffix: str = "") -> tuple[str, int] | None:
    """The id and number from which :func:`file_name` made ``name``; None for a name that was cut or is foreign."""
    stem, _, number = name.removesuffix(suffix).partition("@")
    stem = stem.partition("+")[0]
    try:
        found = "" if stem == "%" else unquote(stem, errors="surrogatepass")
        count = int(number) if number else 1
    except ValueError:
        return None
    return (found, count) if file_name(found, suffix, number=count) == name else None
