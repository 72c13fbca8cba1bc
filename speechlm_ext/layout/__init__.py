"""TokenLayout: what every token id means, as versioned data."""

from speechlm_ext.layout.layout import FILE_NAME, Interval, Stream, TokenLayout

__all__ = ["FILE_NAME", "Interval", "Stream", "TokenLayout"]
