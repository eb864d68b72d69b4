"""``stunet demo``: an embedded data set, and the stock nnU-Net commands run on it."""
