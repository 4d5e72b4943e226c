"""Draws all of them."""

from tools.pictures import house, kernels

house.draw()
kernels.draw()
