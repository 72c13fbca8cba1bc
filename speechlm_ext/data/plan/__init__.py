"""Which samples go into which pack, before anything is read: the pack plan, its report, its memory estimate."""
