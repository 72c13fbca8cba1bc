"""Search beyond single samples: beams, and the best of several tries."""
