"""What an instance costs: MACs from shapes, time on the device at hand."""
