"""Feature encoders: a waveform to frames of features, for K-Means units."""
