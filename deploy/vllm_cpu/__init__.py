"""A real vLLM server on CPU with a tiny random model: for tests and demonstrations, not for serving."""
