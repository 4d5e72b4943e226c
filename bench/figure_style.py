"""How all pictures look."""

STYLE = {
    "figure.figsize": (5.2, 3.6),
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "rmtkernels",  # so that the same results give the same file
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's
