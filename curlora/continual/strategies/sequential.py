"""Sequential fine-tuning: train the same adapter on one task after another without protection. The baseline."""

from curlora.continual.strategy import Strategy


class Sequential(Strategy):
    """No hook overridden."""

    name = "sequential"
    plain_at_first = True
