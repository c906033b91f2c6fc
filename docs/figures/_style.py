"""How the figures look: one set of sizes and colours."""

BLUE, ORANGE, GREY, GREEN, RED = "#2f6db3", "#d9772b", "#8a8a8a", "#3d8f5f", "#b5403a"
DIVERGING = "RdBu_r"
SEQUENTIAL = "Blues"


def subplots(*shape, size=(7.0, 3.2), **options):
    """Give a figure and its axes, without the frame above and on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot.subplots(*shape, figsize=size, layout="constrained", **options)


def heatmap(axes, values, *, rows, columns, title, unit, top=None):
    """Draw a matrix around zero in diverging colours, rows from the top, with a bar that says the unit."""
    top = top or max(abs(float(values.min())), abs(float(values.max()))) or 1.0
    drawn = axes.imshow(values, cmap=DIVERGING, vmin=-top, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, loc="left")
    axes.figure.colorbar(drawn, ax=axes, label=unit, shrink=0.9)
    return drawn
