"""Feature encoders: a waveform to frames of features."""
