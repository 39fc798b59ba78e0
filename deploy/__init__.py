"""What runs around Tiergate: engine environments and, later, monitoring and cluster manifests."""
