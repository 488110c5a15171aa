"""Exports: SDPoint instances as files that run without this package."""
