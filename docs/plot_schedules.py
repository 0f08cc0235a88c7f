"""Draw the learning-rate schedules: python docs/plot_schedules.py writes docs/schedules.png."""

from pathlib import Path

import matplotlib

from lit_qlora.settings import TrainConfig
from lit_qlora.train.optim import learning_rate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = 200
CURVES = {
    "constant": {"schedule": "constant"},
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "cosine, floor 0.1": {"schedule": "cosine", "floor": 0.1},
    "cosine-restarts, cycles 3": {"schedule": "cosine-restarts"},
    "polynomial, power 2": {"schedule": "polynomial"},
    "inverse-sqrt": {"schedule": "inverse-sqrt"},
    "wsd, decay 0.1": {"schedule": "wsd"},
}


def main() -> None:
    """One panel a schedule, each with warm-up of 10 % (solid) and without (dashed)."""
    figure, panels = plt.subplots(2, 4, figsize=(12, 5), sharex=True, sharey=True, layout="constrained")
    for panel, (title, settings) in zip(panels.flat, CURVES.items(), strict=True):
        for warmup, style in ((0.1, "-"), (0.0, "--")):
            config = TrainConfig(learning_rate=1.0, warmup=warmup, **settings)
            rates = [learning_rate(step, STEPS, config) for step in range(STEPS)]
            panel.plot(range(1, STEPS + 1), rates, style, label=f"warm-up {warmup:g}")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("share of the peak")
    for panel in panels[1]:
        panel.set_xlabel(f"step of {STEPS}")
    panels[0, 0].set_ylim(0, 1.05)
    panels[0, 0].legend(loc="lower right", fontsize=9)
    figure.savefig(Path(__file__).with_name("schedules.png"), dpi=100)


if __name__ == "__main__":
    main()
