"""Self-training between domains: whose cases are whose, class models of features, views, losses."""
