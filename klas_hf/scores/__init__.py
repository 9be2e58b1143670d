"""Scores of stitches, measured without training them: KLAS (Alg. 2), its relatives, and functional KL."""
