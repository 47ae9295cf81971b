"""How every figure looks: colors, axes, plain numbers."""
import matplotlib
import matplotlib.pyplot as plt  # noqa: E402

matplotlib.use("Agg")

# Okabe and Ito's colors: told apart by color-blind readers, and in gray by their order of lightness
BLUE, ORANGE, GREEN, PINK, VERMILION, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#000000"

DPI = 130


def axes(count=1, width=8.0, height=3.6, rows=1, **options):
    """A figure of `count` panels side by side, in so many rows; width, height: inches at DPI.
    Returns: (figure, its axes, row by row)."""
    figure, panels = plt.subplots(rows, count, figsize=(width, height), squeeze=False, layout="constrained",
                                  **options)
    for axis in panels.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, panels.ravel()


def plain_numbers(axis, x=()):
    """Instead of powers of ten, on a logarithmic y axis and, if its ticks are given, x axis."""
    low, high = axis.get_ylim()
    y = [value for value in (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50) if low <= value <= high]
    axis.set_yticks(y, [f"{value:g}" for value in y])
    if x:
        axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.minorticks_off()
