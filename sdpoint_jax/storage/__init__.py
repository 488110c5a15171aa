"""What lies on disk: checkpoints, the artefact of a sweep, whole at any moment and checksummed."""
