"""`tiergate state audit`: what the store counts, beside what replicas carry and what engines report."""
