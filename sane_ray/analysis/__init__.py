"""What embeddings show: layers along depth, maps of a zoo, neighbours, and which layers a prediction rests on.

Pure functions of arrays and tables; ``pictures`` draws them, ``reports`` writes them down. Never uses Ray.
"""
