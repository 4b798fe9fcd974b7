"""Writes models: latent densities, generation, selection, and the novelty audit."""
