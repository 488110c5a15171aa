"""What runs an instance beside XLA."""
