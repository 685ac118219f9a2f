"""Grids: the cells of strategies × datasets × settings × orders × seeds, and the engines that run them."""
