"""Models written by SANE: drawing weights, fitting them to a network, and making their batch norms work."""
