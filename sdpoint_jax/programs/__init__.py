"""How a (model, instance, shapes) becomes a compiled program, and what runs such programs over data."""
