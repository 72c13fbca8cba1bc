"""The ops once more in plain torch: short, obviously right, and slow. Tests compare with them."""
