"""Self-training between domains: whose cases are whose, views, loss."""
