"""The whole loop on real product images: train, index, query, probe, and a report to look at."""
