"""Which anchors and which stitches: KLAS Alg. 3 and the rules it is compared with."""
