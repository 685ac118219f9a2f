"""Grids: cells for every strategy, dataset, setting, class order and seed, and the engines that run them."""
