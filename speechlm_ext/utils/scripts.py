"""Scripts that put no spaces between words."""

from __future__ import annotations

#: Letters of Thai, Lao, Khmer and Burmese, of Chinese and of Japanese, as a set for the ``regex`` library.
NO_SPACES = r"[\p{Line_Break=SA}\p{Han}\p{Hiragana}\p{Katakana}\u30fc]"
