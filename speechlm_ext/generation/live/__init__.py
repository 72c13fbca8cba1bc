"""Generation in real time: streams, dialogues, and transcripts of audio as it arrives."""
