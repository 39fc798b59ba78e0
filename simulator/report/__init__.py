"""Reports of simulated runs: JSON, parquet, figures and one HTML page that stands alone."""
