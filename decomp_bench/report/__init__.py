"""Pages of results: one HTML file each, which asks nothing of the network and is the same for the same results."""
