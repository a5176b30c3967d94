"""Draw the picture of README.md from a finished run: python -m tests.readme_picture RUN

The figure shows the test image of median D, its mask, the mean prediction and the uncertainty of
20 passes of MC Dropout; and the epsilons of the training images over the epochs. The picture in the
README is of this run, in about five minutes on one core (the images are those of BBBC038 in
public domain, 107 of stained histology):

    polyseg train --data dsb2018-histology --out RUN --epochs 30 --set data.size=128 \
      --set "network.kwargs={channels: [12, 24, 48, 96], strides: [2, 2, 2], num_res_units: 2}"
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from polyseg.commands.estimate_uncertainty import estimate_uncertainty
from polyseg.data.loading import load_images
from polyseg.figures.pictures import _outline
from polyseg.figures.run_figures import displayed
from polyseg.figures.style import BLUE, GRAY, place_axes, styled
from polyseg.runs import read_assessment, read_schedule
from polyseg.runs.trained_model import Inputs, read_trained

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "overview.png"
CELL, GAP, TOP, WIDTH = 1.55, 0.08, 0.3, 2.75
"""Sizes in inches: of an image, between images, above them, and of the curves of epsilon."""


@styled
def picture(image, mask, mean, uncertainty, schedule, limits):
    """Return a figure of four images in a square and a plot of epsilon over the epochs."""
    height = 2 * (CELL + TOP) + 0.05
    figure = Figure(figsize=(2 * (CELL + GAP) + WIDTH + 0.95, height))
    figure.set_layout_engine("none")
    panels = {
        "image": (image, {}),
        "mask": (mask, {"cmap": "gray"}),
        "prediction": (mean, {"cmap": "gray", "vmin": 0, "vmax": 1}),
        "uncertainty": (
            uncertainty,
            {"cmap": "magma", "vmin": 0, "vmax": np.percentile(uncertainty, 99)},
        ),
    }
    for i, (title, (pixels, style)) in enumerate(panels.items()):
        left, top = (i % 2) * (CELL + GAP), TOP + (i // 2) * (CELL + TOP)
        axes = place_axes(figure, left, top, CELL, CELL)
        axes.imshow(pixels, **style)
        axes.set(title=title, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if title == "prediction":
            _outline(axes, mask)
    left = 2 * (CELL + GAP) + 0.75
    axes = place_axes(figure, left, TOP, WIDTH, height - TOP - 0.75)
    quantiles = np.percentile(schedule.epsilon, (5, 25, 50, 75, 95), axis=1)
    steps = np.add.outer(schedule.epochs, (-0.5, 0.5)).ravel()
    low, lower, median, upper, high = quantiles.repeat(2, axis=1)
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.15, lw=0, label="5 to 95 %")
    axes.fill_between(steps, lower, upper, color=BLUE, alpha=0.35, lw=0, label="25 to 75 %")
    axes.plot(steps, median, color=BLUE, label="median")
    for limit in limits:
        axes.axhline(limit, color=GRAY, linestyle="--", linewidth=0.8)
    axes.set(title="ε over the training images", xlabel="epoch", xlim=(steps[0], steps[-1]))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=3, columnspacing=1, handlelength=1.2
    )
    return figure


def main():
    """Measure the test images of a run and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--image", help="id of a test image")
    options = parser.parse_args()
    trained = read_trained(options.run)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "test"
        estimate_uncertainty(options.run, Inputs(part="test"), save_maps=True, out=out)
        assessment = read_assessment(out / "assessment.h5", with_maps=True)
    order = np.argsort(assessment.difficulty)
    for i in order:
        values = f"D = {assessment.difficulty[i]:.4f}, Dice {assessment.dice[i]:.3f}"
        print(f"{assessment.ids[i]}: {values}")
    chosen = assessment.ids.index(options.image) if options.image else order[len(order) // 2]
    identity = assessment.ids[chosen]
    images = load_images(trained.config.data)
    control = trained.config.control
    figure = picture(
        displayed(images.pixels(identity)),
        images.masks(identity)[0],
        np.float64(assessment.maps["mean"][chosen]),
        np.float64(assessment.maps[assessment.metric][chosen]),
        read_schedule(options.run / "schedule.h5"),
        (control.epsilon_min, control.epsilon_max),
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    # 256 colours are enough, and a third of the bytes.
    few = Image.open(drawn).convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE)
    few.save(PICTURE, optimize=True)
    print(f"{PICTURE}: {identity}, {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
