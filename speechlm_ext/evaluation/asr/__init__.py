"""Transcripts of generated speech by an independent ASR model."""
