"""Data that stitched models are made from and measured on: text, images, TruthfulQA."""
