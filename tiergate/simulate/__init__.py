"""`tiergate simulate`: what its options mean, and how its answer is shown."""
