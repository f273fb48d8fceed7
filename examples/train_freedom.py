"""Train FREEDOM with Mirror Gradient, with the replay control and plainly, and compare the test metrics.

    python examples/train_freedom.py [DATA]

DATA is a directory in MMRec format (`<name>.inter`, `image_feat.npy`, `text_feat.npy`) or "demo", the default: an
embedded dataset with a planted answer.
"""

from __future__ import annotations

import sys

import optax

from mgrad_jax import mirror_gradient, models, replay
from mgrad_jax.data import load_interactions
from mgrad_jax.training import fit


def main(source: str = "demo", epochs: int = 15) -> dict[str, float]:
    """Print one line per training and return its Recall@20 by name."""
    data = load_interactions(source)
    adam = optax.adam(1e-3)
    trainings = {
        "plain": adam,
        "replay": optax.chain(replay(interval=3), adam),
        "mirror": optax.chain(mirror_gradient(alpha1=1.0, alpha2=0.2, interval=3), adam),
    }
    recall = {}
    for name, tx in trainings.items():
        model = models.create("freedom", data, dropout=0.8, reg_weight=1e-3, seed=999)
        result = fit(model, data, tx, epochs=epochs, patience=20, batch_size=512, seed=999)
        recall[name] = result.test["recall@20"]
        print(f"{name:8} best epoch {result.best_epoch:3}  test Recall@20 {recall[name]:.4f}")
    return recall


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
