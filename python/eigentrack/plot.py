"""A picture of watched generations: eigenvalues and entropy over time."""

from collections.abc import Sequence
from pathlib import Path

from eigentrack.watch import Watched, printable
from rmtkernels import DESCRIPTORS


def plot_spectra(runs: Sequence[Watched], path: str | Path) -> Path:
    """Writes one column per generation: eigenvalues of the middle watched spectrum, entropy of all of them.

    Eigenvalues of windows of fewer rows than the window's length are those that exist. Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(runs), figsize=(6 * len(runs), 7), squeeze=False, sharex="col", sharey="row")
    colours = pyplot.get_cmap("viridis")
    for column, run in enumerate(runs):
        steps, spectra = run.descriptors.shape[:2]
        middle, joint = spectra // 2, run.recording.settings.spectra == "joint"
        top, bottom = axes[0, column], axes[1, column]
        eigenvalues = run.eigenvalues[:, middle].clone()
        eigenvalues[eigenvalues <= 0] = float("nan")
        for rank in range(eigenvalues.shape[1]):
            top.semilogy(eigenvalues[:, rank], color=colours(rank / eigenvalues.shape[1]), linewidth=0.9)
        name = "joint" if joint else f"layer {run.layers[middle]}"
        prompt = printable(run.prompt)
        title = prompt if len(prompt) < 60 else prompt[:57] + "..."
        top.set_title(title.replace("$", r"\$"), fontsize=10)
        for spectrum in range(spectra):
            label = "joint" if joint else f"layer {run.layers[spectrum]}"
            entropy = run.descriptors[:, spectrum, DESCRIPTORS.index("entropy")]
            bottom.plot(range(steps), entropy, color=colours(spectrum / max(spectra - 1, 1)), label=label, linewidth=1)
        bottom.set_xlabel("generated token")
        if column == 0:
            top.set_ylabel(f"eigenvalues of G / D, {name}")
            bottom.set_ylabel("spectral entropy (nats)")
    axes[1, -1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)
