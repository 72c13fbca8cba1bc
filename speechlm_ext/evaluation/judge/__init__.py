"""The speech recogniser that scores generated speech, and the transcripts that it has made so far."""
