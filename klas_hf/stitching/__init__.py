"""Models from anchors' blocks: single paths and supernets, their stitching layers fitted by least squares."""
