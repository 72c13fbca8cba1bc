"""The decode loop: slots of a batch, their sampler state, and captured CUDA graphs."""
