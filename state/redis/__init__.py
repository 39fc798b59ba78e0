"""The shared state in Redis or Valkey: one truth for many gateway replicas."""
