"""``stunet crosseval``: every model on every dataset, compared on the classes that they share."""
