"""The unified continual-learning objective: its divergences, its terms, and each method as one choice of them."""
