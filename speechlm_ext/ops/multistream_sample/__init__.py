"""One decode step of all requests and streams."""
