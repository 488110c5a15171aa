"""One run: its plan, the step, the loop around it, and how it goes on after a stop."""
