"""Sound files: reading, converting, writing, and writing piece by piece."""

from speechlm_ext.audio.files import audio_seconds, read_audio, write_wav
from speechlm_ext.audio.waveform import check_wave, resample_audio

__all__ = ["audio_seconds", "check_wave", "read_audio", "resample_audio", "write_wav"]
