"""TokenLayout: the meaning of every token id, as versioned data."""

from speechlm_ext.layout.layout import FILE_NAME, TokenLayout
from speechlm_ext.layout.parts import Interval, Stream

__all__ = ["FILE_NAME", "Interval", "Stream", "TokenLayout"]
