"""One file per slice, and one for the monitor end to end."""
