"""The nets: a table of architectures, their parts, and the one place where a point acts."""
