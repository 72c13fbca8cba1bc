"""K-Means: fitting, artefacts, and the command line around them."""
