"""What answers requests within a budget: the choice of an instance, and the predictor."""
