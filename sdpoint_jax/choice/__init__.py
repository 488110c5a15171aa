"""What chooses among instances: rows of the table, budgets, fronts, cascades. It needs no JAX."""
