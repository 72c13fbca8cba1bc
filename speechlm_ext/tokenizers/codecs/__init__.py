"""Neural-codec tokenizers: sound to codes and back."""
