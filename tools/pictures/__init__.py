"""Pictures of the documentation, drawn with matplotlib and committed: `python -m tools.pictures`."""
