"""The paper's experiments and ours, as plain modules beside the recipes."""
