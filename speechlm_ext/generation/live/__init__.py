"""Generation while it is decoded or heard: streams, dialogues, transcripts of audio that arrives."""
